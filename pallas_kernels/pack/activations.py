"""Activations as sparse operands: two of four kept along features, or along tokens, and packed.

A token-major array a [R, C] (rows are tokens) is the sparse operand of products over features as it stands, and of
products over tokens transposed. Which tokens make a four along tokens:

    consecutive   4 p, 4 p + 1, 4 p + 2, 4 p + 3             (rows already lie as the fours want them)
    interleaved   p, p + R/4, p + R/2, p + 3 R/4             (rows in batch order; far apart)

and the packed matrix's columns are then tokens in the order four after four (`reference.contraction_order`).

Everything is branch-free jnp that XLA fuses into single passes.
"""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float, Metadata, UInt32
from pallas_kernels.metadata import pack_positions, unpack_positions
from pallas_kernels.pack import reference
from pallas_kernels.sparse24.reference import to_dense
from pallas_kernels.tile_order import from_tiles, to_tiles


class Packed(NamedTuple):
    """A 2:4 matrix ready for the tensor core."""

    values: Array
    """[R/64, C/64, 8, 256] stored entries, of 8 bits [R/64, C/128, 16, 256] (`pallas_kernels.tile_order`)."""
    metadata: Array
    """uint32 [R/64, C/64, 128] positions in hardware order."""


def pack_features(a: Float[Array, "R C"], stored: Float[Array, "R C"] | None = None) -> Packed:
    """Two of each four neighbouring features by magnitude, as a matrix [R, C].

    R is a multiple of 64, and C, or of 128 where what is stored has 8 bits.

    stored: the entries to store where those of a are chosen, in any type; None: a's own.
    """
    values, positions = reference.compress24(a, reference.select24(a))
    if stored is not None:
        values = reference.take24(stored, positions)
    return Packed(to_tiles(values), pack_positions(positions, values.dtype))


def take_features(a: Float[Array, "R C"], metadata: Metadata) -> Float[Array, "R_64 C_t _ 256"]:
    """The entries of another array, of the packed one's width, at the positions that `pack_features` chose."""
    return to_tiles(reference.take24(a, unpack_positions(metadata, a.dtype)))


def unpack(packed: Packed) -> Float[Array, "R C"]:
    """The matrix again, +0.0 where nothing is stored."""
    return to_dense(from_tiles(packed.values), packed.metadata)


def pack_tokens(a: Float[Array, "R C"], *, interleaved: bool) -> Packed:
    """Two of each four tokens by magnitude, for each feature, as a matrix [C, R]; R and C multiples of 64."""
    fours = _token_fours(a, interleaved)
    mask = reference.select24(jnp.stack(fours, axis=-1))
    low, high = reference.kept_positions([mask[..., i] for i in range(4)])
    positions = jnp.stack([low.T, high.T], axis=-1)
    return Packed(_feature_major(*reference.pick(fours, low, high)), pack_positions(positions))


def take_tokens(
    a: Float[Array, "R C"], metadata: UInt32[Array, "C_64 R_64 128"], *, interleaved: bool
) -> Float[Array, "C_64 R_64 8 256"]:
    """The entries of another array at the positions that `pack_tokens` chose, in the same order."""
    positions = unpack_positions(metadata)
    low, high = positions[..., 0].T, positions[..., 1].T
    return _feature_major(*reference.pick(_token_fours(a, interleaved), low, high))


def _token_fours(a: Array, interleaved: bool) -> tuple[Array, ...]:
    """The first, second, third and fourth token of each four, all features: four arrays [R/4, C]."""
    rows, columns = a.shape
    if interleaved:
        return tuple(a.reshape(4, rows // 4, columns))
    fours = a.reshape(rows // 4, 4, columns)
    return tuple(fours[:, i] for i in range(4))


def _feature_major(low: Array, high: Array) -> Array:
    """Two arrays [R/4, C] of stored entries as the values of a matrix [C, R]."""
    return to_tiles(jnp.stack([low, high], axis=1).reshape(-1, low.shape[1]).T)
