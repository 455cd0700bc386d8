"""Positions of the stored entries of a 2:4 matrix, in the order Hopper's tensor core reads them.

`wgmma.mma_async.sp` takes, next to 64 rows of stored values, one 32-bit word from each of the 128 threads of a
warpgroup. A word covers two rows and 16 columns of a 64 x 64 tile of the logical matrix. Thread
`32 w + 4 g + 2 s + h` (warp w of 4, g of 8, s and h of 2) holds

    bits  0..15   row 16 w + g,      columns 32 s + 16 h + 0..15
    bits 16..31   row 16 w + g + 8,  the same columns

and each group of four columns takes four bits: the lower position, then the higher one shifted by two. The
instruction's selector picks the words of s = 0 for the tile's first 32 columns and those of s = 1 for the rest.

Values of 8 bits have another order: there one instruction covers 64 columns and takes all 128 words at once, each of
one row. Thread `32 w + 4 g + 2 h + r` holds row 16 w + g + 8 r, columns 32 h + 0..31.

Source: measured on an H100 and, of 8 bits, on an H200; the same orders as in PTX ISA, "sparse matrix storage" for
`.m64nNk32` and in CUTLASS's `ELayout_64x64`.
"""

import jax.numpy as jnp

from pallas_kernels.array_types import Array, Metadata, Positions
from pallas_kernels.tile_order import is_narrow

TILE = 64
"""Rows, and logical columns, that one word per thread of a warpgroup describes."""

_ROW_AXES = (4, 2, 8)  # rows of a tile: w, half word or r, g


def _column_axes(dtype) -> tuple[int, int, int]:
    """Groups of four columns of a tile: s, h, nibble; of 8 bits h, 1, nibble."""
    return (2, 1, 8) if is_narrow(dtype) else (2, 2, 4)


def pack_positions(positions: Positions, dtype=jnp.bfloat16) -> Metadata:
    """Positions [R, C/4, 2] -> hardware words [R/64, C/64, 128].

    Args:
      positions: the two stored indices (0..3) of each group of four columns, the lower first.
      dtype: the values' type, whose width decides the order.

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
    nibbles = nibbles.reshape(rows // TILE, *_ROW_AXES, 4 * groups // TILE, *_column_axes(dtype))
    words = jnp.sum(nibbles.transpose(_TO_WORDS[is_narrow(dtype)]) << _shifts(dtype), axis=(-1, -2), dtype=jnp.uint32)
    return words.reshape(rows // TILE, 4 * groups // TILE, 128)


def unpack_positions(metadata: Metadata, dtype=jnp.bfloat16) -> Positions:
    """The inverse of `pack_positions`: words [R/64, C/64, 128] -> positions [R, C/4, 2], int32."""
    row_tiles, column_tiles, _ = metadata.shape
    words = metadata.reshape(row_tiles, column_tiles, 4, 8, 2, 2, 1, 1)
    nibbles = (words >> _shifts(dtype) & 0xF).astype(jnp.int32)
    nibbles = nibbles.transpose(_FROM_WORDS[is_narrow(dtype)])
    nibbles = nibbles.reshape(row_tiles * TILE, column_tiles * TILE // 4)
    return jnp.stack([nibbles & 3, nibbles >> 2], axis=-1)


# By axes: row tile, w, half, g, column tile, s, h, nibble -> row tile, column tile, w, g, s, h, half, nibble
# and of 8 bits:   row tile, w, r, g, column tile, h, 1, nibble -> row tile, column tile, w, g, h, r, 1, nibble
_TO_WORDS = {False: (0, 4, 1, 3, 5, 6, 2, 7), True: (0, 4, 1, 3, 5, 2, 6, 7)}
_FROM_WORDS = {False: (0, 2, 6, 3, 1, 4, 5, 7), True: (0, 2, 5, 3, 1, 4, 6, 7)}


def _shifts(dtype) -> Array:
    """Where in its word a nibble lies: [half word, nibble]."""
    halves, nibbles = (1, 8) if is_narrow(dtype) else (2, 4)
    half = jnp.arange(halves, dtype=jnp.uint32)[:, None] * 16
    nibble = jnp.arange(nibbles, dtype=jnp.uint32)[None, :] * 4
    return half + nibble
