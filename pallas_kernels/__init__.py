"""Kernels: raw arrays in, raw arrays out. Knows tiles, layouts and GPUs; nothing of Flax or training."""
