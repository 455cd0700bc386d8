"""The dimension key: what each letter means in every signature of this repository.

    T   tokens (batch x sequence, flattened)         R   rows of a matrix, or of all token groups together
    D   d_model                                      C   columns along which 2:4 runs (the contraction)
    F   d_ffn, the hidden neurons                    G   groups of rows (experts, or expert x batch block)
    E   experts (equal, contiguous slices of F)      m, n, k   sizes of a matrix product: [m, k] x [k, n]
    Fe  neurons of one expert, F / E                 v, n, m of a V:N:M pattern are always written pattern.v, ...
    L   layers        B  batch        S  sequence

Shapes in signatures are jaxtyping annotations. They are checked at run time under pytest only.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

__all__ = ["Array", "Bool", "Float", "Int", "Metadata", "Positions", "UInt32", "accumulator"]

Positions = Int[Array, "R C_4 2"]
"""Which two of four neighbours are stored: the two indices 0..3 of each group, the lower first."""

Metadata = UInt32[Array, "R_64 C_64 128"]
"""Positions in the order the tensor core reads: one word per thread of a warpgroup and 64 x 64 tile."""


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which products of operands of `dtype` are accumulated: f32, or f64 for f64 operands."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
