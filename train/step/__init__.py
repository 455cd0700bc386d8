"""One step of training: gradients, the update, and the guard over both."""
