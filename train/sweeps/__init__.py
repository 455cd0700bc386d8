"""Several runs: the queue over the GPUs, their table, and the figures drawn from results."""
