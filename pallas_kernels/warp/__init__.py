"""2:4 products by single warps (`mma.sp`): one kernel for every NVIDIA GPU from compute capability 8.0 on."""
