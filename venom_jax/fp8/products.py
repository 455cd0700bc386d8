"""Dense products of e4m3 matrices, both with the contraction last, as the tensor core reads 8 bits."""

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float
from pallas_kernels.cast8.api import Cast
from pallas_kernels.dense8.api import dense8
from pallas_kernels.dispatch import Implementation
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.tiles import PROMOTE

GRANULE = 16
"""Sizes that XLA's 8-bit products take: bytes that its copies move at once."""
OWN_KERNELS = True
"""Whether this library's kernel multiplies, whose epilogue scales, rather than XLA, which scales behind the product.

So the dense layer takes 0.95 of the time on an H200 (D = 2048 and 4096, T = 16384).
"""
SMALLEST = 128
"""Rows and columns of a product that is worth a kernel of tiles."""
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
    # Behind a barrier, or XLA would drop the casts to e4m3, which these take back.
    a, b = (t.astype(jnp.bfloat16) for t in jax.lax.optimization_barrier((a, b)))
    return jax.lax.dot_general(a, b, contraction, preferred_element_type=jnp.float32).astype(out_dtype)


def over_one(
    a: Float[Array, "m k"],
    b: Float[Array, "n k"],
    scale: Float[Array, ""],
    out_dtype: jax.typing.DTypeLike,
    *,
    implementation: Implementation,
) -> Float[Array, "m n"]:
    """scale a b^T; XLA's product takes one number as it is."""
    if uses_own_kernels(a, b, implementation):
        columns = jnp.broadcast_to(scale, b.shape[:1])
        return dense8(a, b, out_dtype=out_dtype, epilogue=Epilogue(column_scale=True), column_scale=columns)
    unscaled = _unscaled(out_dtype)
    return (dot(a, b, unscaled, implementation=implementation) * scale.astype(unscaled)).astype(out_dtype)


def scaled(
    a: Cast, b: Cast, out_dtype: jax.typing.DTypeLike, *, exact: bool = False, implementation: Implementation
) -> Float[Array, "m n"]:
    """a b^T with the scales of a's rows and of b's; arguments as in `dot`.

    XLA multiplies with the scales while it hands the product on to what comes next.
    """
    if uses_own_kernels(a.values, b.values, implementation):
        options = {"row_scale": a.scale, "column_scale": b.scale, "promote": PROMOTE if exact else None}
        epilogue = Epilogue(row_scale=True, column_scale=True)
        return dense8(a.values, b.values, out_dtype=out_dtype, epilogue=epilogue, **options)
    product = dot(a.values, b.values, _unscaled(out_dtype), exact=exact, implementation=implementation)
    return (product.astype(jnp.float32) * a.scale[:, None] * b.scale).astype(out_dtype)


def _unscaled(out_dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """What a product is rounded to that is scaled later: it may be beyond float16."""
    return jnp.bfloat16 if out_dtype == jnp.bfloat16 else jnp.float32


def uses_own_kernels(a: Array, b: Array, implementation: Implementation) -> bool:
    """Whether a b^T is this library's kernel's."""
    large = min(a.shape[0], b.shape[0]) >= SMALLEST and a.shape[1] % 128 == 0
    return OWN_KERNELS and implementation == "hopper" and large


def casting(implementation: Implementation) -> Implementation | None:
    """Which casts go with products: kernels where they take the array, else XLA's."""
    return None if implementation == "hopper" else implementation
