"""Activations packed in eight bits, in plain jnp: the specification of the kernels that are given scales.

Two of four are chosen by the magnitudes of 16 bits: in e4m3, with eight mantissas, ties would be common. What is kept
of a is its square alone, over a scale for each neuron, along features and along tokens; a is the square's root, rounded
to bf16, times the scale's. Scales are powers of two (of y2 powers of four), so that no order of multiplications
matters and each entry is rounded once.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float, Int
from pallas_kernels.cast8.reference import E4M3 as DTYPE
from pallas_kernels.cast8.reference import gradient_factor, inverse, largest, narrow, root, scale_of
from pallas_kernels.dispatch import check_multiple
from pallas_kernels.grouped24.reference import tile_groups
from pallas_kernels.pack import activations, reference
from pallas_kernels.pack.activations import Packed
from pallas_kernels.tile_order import columns
from pallas_kernels.tiles import GRANULE

COLUMNS = columns(DTYPE)
"""The contraction is a multiple of this, and groups of tokens start at multiples of it."""


def check(y: Any, features: bool, tokens: bool, group_sizes: Array | None, **scales: Array | None) -> None:
    """Raise ValueError for sizes and scales that do not belong to y [R, C]."""
    rows, neurons = y.shape
    check_multiple(COLUMNS if tokens or group_sizes is not None else GRANULE, rows=rows)
    check_multiple(COLUMNS if features else GRANULE, columns=neurons)
    wanted = (neurons * (1 if group_sizes is None else group_sizes.shape[0]),)
    for name, scale in scales.items():
        if scale is None or scale.shape != wanted or scale.dtype != jnp.float32:
            found = None if scale is None else f"{scale.dtype}{list(scale.shape)}"
            raise ValueError(f"{name} is {found}; want float32{list(wanted)}, a power of two for each neuron")


def group_of_rows(group_sizes: Int[Array, "G"], rows: int, unit: int) -> Int[Array, "_"]:
    """The group of each `unit` of rows, as the kernels take sizes; behind the last group that one's."""
    padded = -(-jnp.clip(group_sizes, 0, rows) // COLUMNS) * COLUMNS
    sizes = jnp.diff(jnp.minimum(jnp.cumsum(padded), rows), prepend=0)
    return jnp.minimum(tile_groups(sizes, rows // unit, unit), group_sizes.shape[0] - 1)


def first_neurons(group_sizes: Int[Array, "G"] | None, y: Float[Array, "R C"]) -> Int[Array, "_"] | None:
    """The first neuron of the group of each 64 rows."""
    return None if group_sizes is None else group_of_rows(group_sizes, y.shape[0], GRANULE) * y.shape[1]


def of_each(factor: Array, like: Array, group_sizes: Array | None) -> Array:
    """Factors [C], or [G C], of neurons for each entry of an array [R, C]."""
    if group_sizes is not None:
        factor = factor.reshape(group_sizes.shape[0], -1)[group_of_rows(group_sizes, like.shape[0], 1)]
    return jnp.broadcast_to(factor, like.shape)


def _over_tokens(a: Array, interleaved: bool) -> Array:
    """[R, C] -> [C, R], tokens in the order of the contraction."""
    return reference.contraction_order(a, interleaved=interleaved).T


def pack(
    a: Float[Array, "R C"],
    scale: Float[Array, "_"],
    *,
    features: bool,
    tokens: bool,
    interleaved: bool,
    group_sizes: Int[Array, "G"] | None,
) -> tuple[Packed | None, Packed | None]:
    """a^2 / scale in e4m3 along features and along tokens: with both, there what is left of a along features."""
    factor = of_each(inverse(scale), a, group_sizes)
    squared = narrow(jnp.square(a.astype(jnp.float32)) * factor)
    along_features = activations.pack_features(a, squared) if features else None
    if not tokens:
        return along_features, None
    if features:
        a = jnp.where(reference.select24(a), a, jnp.zeros((), a.dtype))
        squared = narrow(jnp.square(a.astype(jnp.float32)) * factor)
    return along_features, activations.pack_features(*(_over_tokens(v, interleaved) for v in (a, squared)))


def take(
    dy2: Float[Array, "R C"],
    features: Packed | None,
    tokens: Packed | None,
    squared_scale: Float[Array, "_"],
    scale: Float[Array, "_"],
    *,
    interleaved: bool,
    group_sizes: Int[Array, "G"] | None,
) -> tuple[Packed | None, Packed | None]:
    """dy1 = 2 dy2 a over `scale` in e4m3 where the squares `features` and `tokens` of a are stored."""
    factor = of_each(gradient_factor(squared_scale, scale), dy2, group_sizes)

    def at(packed: Packed | None, dy2: Array, factor: Array) -> Packed | None:
        if packed is None:
            return None
        dy1 = narrow(dy2.astype(jnp.float32) * root(activations.unpack(packed)) * factor)
        return Packed(activations.take_features(dy1, packed.metadata), packed.metadata)

    return at(features, dy2, factor), at(tokens, *(_over_tokens(v, interleaved) for v in (dy2, factor)))


def thresholded(w: Float[Array, "R C"], beta: Float[Array, ""], axis: int) -> Float[Array, "R C"]:
    """round(beta S(w)) in bf16, as f32: what is chosen among, and then cast."""
    s = reference.soft_threshold(w.astype(jnp.float32), axis)
    return jax.lax.reduce_precision(beta * s, exponent_bits=8, mantissa_bits=7)


def row_scales(w: Float[Array, "R C"], beta: Float[Array, ""], axis: int) -> Float[Array, "_"]:
    """The scale of each row of the packed weights: that of beta times the largest |w|, which no |beta S(w)| exceeds.

    So S is computed where it is packed, and nowhere before. It is 1.1 times smaller than the largest |w|, or so.
    """
    return scale_of(jnp.abs(beta) * largest(w, axis))


def pack_thresholded(w: Float[Array, "R C"], beta: Float[Array, ""], axis: int) -> tuple[Packed, Float[Array, "_"]]:
    """round(beta S(w)) / scale in e4m3, 2:4 along `axis`, and the scale of each of its rows."""
    dense, scale = thresholded(w, beta, axis), row_scales(w, beta, axis)
    dense = dense if axis == 1 else dense.T
    dense = jnp.pad(dense, ((0, -dense.shape[0] % GRANULE), (0, -dense.shape[1] % COLUMNS)))
    scale = jnp.pad(scale, (0, dense.shape[0] - scale.shape[0]), constant_values=1)
    return activations.pack_features(dense, narrow(dense * inverse(scale)[:, None])), scale
