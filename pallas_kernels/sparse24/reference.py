"""out = A B with A 2:4 sparse, in plain jnp: the specification, the CPU path and the oracle."""

import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float, Metadata, accumulator
from pallas_kernels.dispatch import widened
from pallas_kernels.metadata import unpack_positions
from pallas_kernels.pack.reference import decompress24


def to_dense(values: Float[Array, "m k_2"], metadata: Metadata) -> Float[Array, "m k"]:
    """The logical matrix A [m, k] of packed values [m, k/2] and hardware metadata [m/64, k/64, 128]."""
    return decompress24(values, unpack_positions(metadata, values.dtype))


def sparse24(
    values: Float[Array, "m k_2"], metadata: Metadata, b: Float[Array, "k n"], *, out_dtype=jnp.float32
) -> Float[Array, "m n"]:
    """out[m, n] = sum_k A[m, k] b[k, n], accumulated in f32 (f64 for f64 operands), of 8 bits multiplied in f32.

    The hardware never multiplies a pruned position of A; here it meets b as a zero. The results differ only where b
    holds inf or NaN, which a zero of A turns into NaN and a pruned position does not touch.
    """
    a, b = widened(to_dense(values, metadata), b)
    accumulate = accumulator(a.dtype)
    return jnp.dot(a, b, precision="highest", preferred_element_type=accumulate).astype(out_dtype)
