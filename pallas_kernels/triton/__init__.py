"""Packing and permutation once more, as Triton kernels through jax-triton: the optional extra `triton`.

What the benchmark `pallas_kernels.bandwidth` compares the Mosaic kernels with. Nothing else imports this package, and
it imports Triton when its functions are first called.
"""
