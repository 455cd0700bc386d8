"""What the Hopper kernels share: the sparse MMA instruction, the tile schedule, the kernel itself."""
