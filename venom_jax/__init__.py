"""Sparse FFN training as a library: 2:4 weights, 2:4 and V:N:M activations."""
