"""Positions of the stored entries of a 2:4 matrix, in the order Hopper's tensor core reads them.

`wgmma.mma_async.sp` takes, next to 64 rows of stored values, one 32-bit word from each of the 128 threads of a
warpgroup. A word covers two rows and 16 columns of a 64 x 64 tile of the logical matrix. Thread
`32 w + 4 g + 2 s + h` (warp w of 4, g of 8, s and h of 2) holds

    bits  0..15   row 16 w + g,      columns 32 s + 16 h + 0..15
    bits 16..31   row 16 w + g + 8,  the same columns

and each group of four columns takes four bits: the lower position, then the higher one shifted by two. The
instruction's selector picks the words of s = 0 for the tile's first 32 columns and those of s = 1 for the rest.

Source: measured on an H100; the same order as in PTX ISA, "sparse matrix storage" for `.m64nNk32`.
"""

import jax.numpy as jnp

from pallas_kernels.array_types import Metadata, Positions

TILE = 64
"""Rows, and logical columns, that one word per thread of a warpgroup describes."""

_TILE_AXES = (4, 2, 8)  # rows of a tile: warp, half word, g
_COLUMN_AXES = (2, 2, 4)  # groups of four columns of a tile: s, h, nibble


def pack_positions(positions: Positions) -> Metadata:
    """Positions [R, C/4, 2] -> hardware words [R/64, C/64, 128].

    Args:
      positions: the two stored indices (0..3) of each group of four columns, the lower first.

    Returns:
      One uint32 for each thread of a warpgroup and each 64 x 64 tile.

    Raises:
      ValueError: R is no multiple of 64, or C (four times the second axis) is none.
    """
    rows, groups, _ = positions.shape
    if rows % TILE or 4 * groups % TILE:
        raise ValueError(
            f"metadata covers tiles of {TILE} x {TILE}; got {rows} rows and {4 * groups} columns. "
            f"Pad both to a multiple of {TILE}."
        )
    nibbles = (positions[..., 0] | positions[..., 1] << 2).astype(jnp.uint32)
    nibbles = nibbles.reshape(rows // TILE, *_TILE_AXES, 4 * groups // TILE, *_COLUMN_AXES)
    # axes: row tile, w, half, g, column tile, s, h, nibble -> row tile, column tile, w, g, s, h, half, nibble
    nibbles = nibbles.transpose(0, 4, 1, 3, 5, 6, 2, 7)
    words = jnp.sum(nibbles << _shifts(), axis=(-1, -2), dtype=jnp.uint32)
    return words.reshape(rows // TILE, 4 * groups // TILE, 128)


def unpack_positions(metadata: Metadata) -> Positions:
    """The inverse of `pack_positions`: words [R/64, C/64, 128] -> positions [R, C/4, 2], int32."""
    row_tiles, column_tiles, _ = metadata.shape
    words = metadata.reshape(row_tiles, column_tiles, 4, 8, 2, 2, 1, 1)
    nibbles = (words >> _shifts() & 0xF).astype(jnp.int32)
    # axes: row tile, column tile, w, g, s, h, half, nibble -> row tile, w, half, g, column tile, s, h, nibble
    nibbles = nibbles.transpose(0, 2, 6, 3, 1, 4, 5, 7).reshape(row_tiles * TILE, column_tiles * TILE // 4)
    return jnp.stack([nibbles & 3, nibbles >> 2], axis=-1)


def _shifts():
    half = jnp.arange(2, dtype=jnp.uint32)[:, None] * 16
    nibble = jnp.arange(4, dtype=jnp.uint32)[None, :] * 4
    return half + nibble


def pack_positions8(positions: Positions) -> Metadata:
    """As `pack_positions` for 8-bit values: [R, C/4, 2] -> [R/64, C/64, 128].

    `.m64nNk64` takes all 128 words at once (selector 0), each of one row: thread `32 w + 4 g + 2 h + r` holds row
    16 w + g + 8 r, columns 32 h + 0..31, eight nibbles in order.

    Source: CUTLASS `SM90::GMMA::ELayout_64x64`; TileLang `metadata_8bit_load_32x4_to_shared_16x8_layout_8bit`.
    """
    rows, groups, _ = positions.shape
    if rows % TILE or 4 * groups % TILE:
        raise ValueError(f"metadata covers tiles of {TILE} x {TILE}; got {rows} rows and {4 * groups} columns")
    nibbles = (positions[..., 0] | positions[..., 1] << 2).astype(jnp.uint32)
    nibbles = nibbles.reshape(rows // TILE, *_TILE_AXES, 4 * groups // TILE, 2, 8)
    # axes: row tile, w, r, g, column tile, h, nibble -> row tile, column tile, w, g, h, r, nibble
    nibbles = nibbles.transpose(0, 4, 1, 3, 5, 2, 6)
    words = jnp.sum(nibbles << (4 * jnp.arange(8, dtype=jnp.uint32)), axis=-1, dtype=jnp.uint32)
    return words.reshape(rows // TILE, 4 * groups // TILE, 128)
