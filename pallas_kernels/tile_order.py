"""Stored values of a 2:4 matrix tile by tile, each tile one run of 4 KiB: the order the kernels load.

A tile is 64 rows and 64 logical, so 32 stored, columns. Row by row it would be 64 pieces of 64 bytes, each half of a
cache line; as one run it is copied whole and lies in shared memory as the tensor core reads it: rows of four
pieces of 16 bytes, piece c of row r at place c xor (r / 2 mod 4), so that eight rows lie in all banks.

Source: PTX ISA, "wgmma shared memory layout", K-major with swizzling over 64 bytes.
"""

import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float

TILE = 64
"""Rows, and logical columns, of one tile."""
SHAPE = (8, 256)
"""A tile in memory: 2048 values, in rows short enough for the copy engine."""


def to_tiles(values: Float[Array, "R C_2"]) -> Float[Array, "R_64 C_64 8 256"]:
    """Stored values [R, C/2] -> tiles [ceil(R/64), ceil(C/64), 8, 256], padded with zeros."""
    rows, half = values.shape
    values = jnp.pad(values, ((0, -rows % TILE), (0, -half % (TILE // 2))))
    row_tiles, column_tiles = values.shape[0] // TILE, values.shape[1] // (TILE // 2)
    tiles = values.reshape(row_tiles, TILE, column_tiles, TILE // 2).swapaxes(1, 2)
    return _swizzle(tiles.reshape(row_tiles, column_tiles, 8, 4, 2, 2, 2, 8)).reshape(row_tiles, column_tiles, *SHAPE)


def from_tiles(
    tiles: Float[Array, "R_64 C_64 8 256"], rows: int | None = None, columns: int | None = None
) -> Float[Array, "R C_2"]:
    """The inverse of `to_tiles`; `rows` and `columns` (logical) cut the padding off."""
    row_tiles, column_tiles = tiles.shape[:2]
    parts = _swizzle(tiles.reshape(row_tiles, column_tiles, 8, 4, 2, 2, 2, 8))
    values = parts.reshape(row_tiles, column_tiles, TILE, TILE // 2).swapaxes(1, 2)
    return values.reshape(row_tiles * TILE, -1)[:rows, : None if columns is None else columns // 2]


SHAPE8 = (16, 256)
"""A tile of 8-bit values in memory: 64 rows and 128 logical columns, the same 4 KiB."""


def to_tiles8(values: Array) -> Array:
    """Stored values of 8 bits [R, C/2] -> tiles [R/64, C/128, 16, 256]: 64 bytes of a row, pieces of 16 as above."""
    rows, half = values.shape
    row_tiles, column_tiles = rows // TILE, half // TILE
    if rows % TILE or half % TILE:
        raise ValueError(f"values {list(values.shape)}: want multiples of 64 rows and 128 logical columns")
    tiles = values.reshape(row_tiles, TILE, column_tiles, TILE).swapaxes(1, 2)
    return _swizzle(tiles.reshape(row_tiles, column_tiles, 8, 4, 2, 2, 2, 16)).reshape(row_tiles, column_tiles, *SHAPE8)


def _swizzle(tiles: Array) -> Array:
    """Exchange piece c of row r with piece c xor (r / 2 mod 4): [..., octets, pairs of rows, 2, c / 2, c % 2, 8]."""
    pairs = [tiles[..., pair, :, :, :, :] for pair in range(4)]
    flips = [[axis for bit, axis in ((2, -3), (1, -2)) if pair & bit] for pair in range(4)]
    return jnp.stack([jnp.flip(t, axis) if axis else t for t, axis in zip(pairs, flips, strict=True)], axis=-5)
