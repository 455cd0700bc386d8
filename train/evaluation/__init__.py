"""A trained model at work: restored, evaluated, sampled from, exported, pruned, started from."""
