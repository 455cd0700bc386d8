"""Scales and casts to eight bits in plain jnp: the specification of the kernels, and what runs without them.

A stored value times its scale is the value. Scales are powers of two, so that multiplying by one is exact and in any
order the same: reference and kernels agree to the bit. Casts round once, to nearest even, and saturate.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float
from pallas_kernels.pack.reference import contraction_order, magnitude_key

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
MAX_EXPONENT = 60
"""Scales lie between 2^-60 and 2^60: a product of two of them, and its inverse, are normal numbers of f32."""
_BIAS, _MANTISSA_BITS, _INFINITY = 127, 23, 0x7F800000


class Cast(NamedTuple):
    """An array in eight bits."""

    values: Array
    """The value is values * scale."""
    scale: Array
    """f32 powers of two, one for each row of `values`; [] where one serves all."""


class Both(NamedTuple):
    """An array in eight bits in both orientations, with scales that are given."""

    rows: Float[Array, "R C"]
    columns: Float[Array, "C R"]


def scale_of(amax: Float[Array, "..."], power: int = 1, dtype: jax.typing.DTypeLike = E4M3) -> Float[Array, "..."]:
    """The smallest scale under which `amax` does not saturate: 2^ceil(log2(amax / max of dtype)), from the bits.

    Nothing at all, amax = 0, gives the smallest scale: such a row never decides what the others' common scale is.

    Args:
      amax: the largest magnitude, f32.
      power: 2 takes powers of four, whose roots are powers of two.

    Returns:
      f32, at least 2^-60 and at most 2^60; NaN where amax is not finite.
    """
    largest = jax.lax.bitcast_convert_type(jnp.float32(jnp.finfo(dtype).max), jnp.int32)
    bits = jax.lax.bitcast_convert_type(amax.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF
    # One more in the exponent where the mantissa exceeds that of the largest number.
    exponent = (bits - largest + (1 << _MANTISSA_BITS) - 1) >> _MANTISSA_BITS
    exponent = jnp.clip(-(-exponent // power) * power, -MAX_EXPONENT, MAX_EXPONENT)
    scale = jax.lax.bitcast_convert_type((exponent + _BIAS) << _MANTISSA_BITS, jnp.float32)
    return jnp.where(bits < _INFINITY, scale, jnp.nan)


def narrow(v: Float[Array, "..."], dtype: jax.typing.DTypeLike = E4M3) -> Float[Array, "..."]:
    """f32 -> eight bits, rounded once to nearest even; what is too large, inf too, saturates; NaN stays NaN."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(v, -largest, largest).astype(dtype)


def cast(v: Float[Array, "..."], scale: Float[Array, "..."], dtype: jax.typing.DTypeLike = E4M3) -> Float[Array, "..."]:
    """round(v / scale), saturating; `scale` broadcasts against v. Where scale is NaN so is the result."""
    return narrow(v.astype(jnp.float32) * inverse(scale), dtype)


def inverse(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / scale of powers of two, from the bits: a GPU's division is not exact. 2^127 for zero, NaN for NaN."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32) & 0x7FFFFFFF
    exact = jax.lax.bitcast_convert_type((2 * _BIAS << _MANTISSA_BITS) - bits, jnp.float32)
    return jnp.where(bits < _INFINITY, exact, jnp.nan)


def widen(cast: Cast) -> Float[Array, "R C"]:
    """values * scale in f32."""
    return cast.values.astype(jnp.float32) * (cast.scale[:, None] if cast.scale.ndim else cast.scale)


def largest(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """max |x| along an axis in f32, by its bits: NaN where there is one, which a maximum of floats may lose."""
    key = jnp.max(magnitude_key(x), axis, initial=0)
    return jax.lax.bitcast_convert_type(key, x.dtype).astype(jnp.float32)


def by_row(x: Float[Array, "R C"], dtype: jax.typing.DTypeLike = E4M3) -> Cast:
    """Each row over its own scale: values [R, C], scale [R]."""
    scale = scale_of(largest(x, 1), dtype=dtype)
    return Cast(cast(x, scale[:, None], dtype), scale)


def by_column(x: Float[Array, "R C"], *, interleaved: bool, dtype: jax.typing.DTypeLike = E4M3) -> Cast:
    """Each column over its own scale, transposed: values [C, R], scale [C].

    interleaved: R in the order of the contraction, four after four of rows far apart (`pack.activations`).
    """
    scale = scale_of(largest(x, 0), dtype=dtype)
    return Cast(cast(contraction_order(x, interleaved=interleaved), scale, dtype).T, scale)


def fold(a: Cast, factor: Float[Array, "R"]) -> Cast:
    """factor[r] a[r, c], transposed, under one scale: values [C, R], scale [] = max over r of factor[r] scale[r].

    The operand B [n, k] of a product whose other operand has the scales `factor` along k. Made from a's eight bits: a
    product with a power of two is exact but where it falls below the normal numbers.

    factor: f32 powers of two.
    """
    scales = factor * a.scale
    scale = largest(scales, 0)
    share = (scales * inverse(scale))[:, None]
    return Cast(narrow(a.values.astype(jnp.float32) * share).T, scale)


def root(squared: Float[Array, "..."]) -> Float[Array, "..."]:
    """sqrt of stored y2, rounded to bf16, as f32: a over the root of its scale."""
    # A conversion to bf16 and back is something XLA may leave out.
    return jax.lax.reduce_precision(jnp.sqrt(squared.astype(jnp.float32)), exponent_bits=8, mantissa_bits=7)


def gradient_factor(squared_scale: Float[Array, "_"], scale: Float[Array, "_"]) -> Float[Array, "_"]:
    """What dy2 root(y2) is multiplied by to give dy1 = 2 dy2 a over its scale: 2 sqrt(s) / q, s a power of four."""
    bits = jax.lax.bitcast_convert_type(squared_scale, jnp.int32) & 0x7FFFFFFF
    exact = jax.lax.bitcast_convert_type((bits >> 1) + (_BIAS << _MANTISSA_BITS - 1), jnp.float32)
    return jnp.where(bits < _INFINITY, 2 * exact, jnp.nan) * inverse(scale)


def activate(y: Float[Array, "R C"], scale: Float[Array, "C"]) -> Both:
    """y2 = relu(y)^2 over `scale`, both ways."""
    a = jax.nn.relu(y).astype(jnp.float32)
    values = cast(a * a, scale)
    return Both(values, values.T)


def differentiate(
    dy2: Float[Array, "R C"], squared: Float[Array, "C R"], squared_scale: Float[Array, "C"], scale: Float[Array, "C"]
) -> Both:
    """dy1 = 2 dy2 a over `scale`, both ways, a from `activate`'s transposed y2."""
    dy1 = dy2.astype(jnp.float32) * root(squared.T)
    values = narrow(dy1 * gradient_factor(squared_scale, scale))
    return Both(values, values.T)
