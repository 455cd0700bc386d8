"""What measures the kernels: benchmarks and their rivals, the search for tiles, counters and power."""
