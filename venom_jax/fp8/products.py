"""Dense products of e4m3 matrices, both with the contraction last, as the tensor core reads 8 bits."""

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float
from pallas_kernels.dispatch import Implementation

GRANULE = 16
"""Sizes that XLA's 8-bit products take: bytes that its copies move at once."""
_PRESETS = jax.lax.DotAlgorithmPreset


def dot(
    a: Float[Array, "m k"],
    b: Float[Array, "n k"],
    out_dtype: jax.typing.DTypeLike,
    *,
    exact: bool = False,
    implementation: Implementation,
) -> Float[Array, "m n"]:
    """a b^T, without scales.

    Args:
      exact: sum in f32 at least every 256 columns, as weight gradients want it: their sums may have a mean, which the
        tensor core's 14 bits bias towards 0. Else never, which is faster.
      implementation: "hopper" is XLA's FP8 product (cublasLt), for m > 1 and sizes in multiples of 16; "reference"
        multiplies in bf16, which holds e4m3 exactly, and sums in f32.
    """
    contraction = (((1,), (1,)), ((), ()))
    if implementation == "hopper":
        preset = _PRESETS.ANY_F8_ANY_F8_F32 if exact else _PRESETS.ANY_F8_ANY_F8_F32_FAST_ACCUM
        return jax.lax.dot_general(a, b, contraction, precision=preset, preferred_element_type=out_dtype)
    a, b = (t.astype(jnp.bfloat16) for t in (a, b))
    return jax.lax.dot_general(a, b, contraction, preferred_element_type=jnp.float32).astype(out_dtype)


def unscaled(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """What to round a product to that is scaled to `dtype` later: without scales it may be beyond float16."""
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
