"""Stored values of a 2:4 matrix tile by tile, each tile one run of 4 KiB: the order the kernels load.

A tile is 64 rows of 64 bytes: 64 logical, so 32 stored, columns of 16 bits, or 128 logical columns of 8 bits. Row by
row it would be 64 pieces of 64 bytes, each half of a cache line; as one run it is copied whole and lies in shared
memory as the tensor core reads it: rows of four pieces of 16 bytes, piece c of row r at place c xor (r / 2 mod 4), so
that eight rows lie in all banks. The bytes of a tile lie alike whatever the width of its values.

Source: PTX ISA, "wgmma shared memory layout", K-major with swizzling over 64 bytes.
"""

import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float

TILE = 64
"""Rows of one tile, and logical columns of one with values of 16 bits."""
SHAPE = (8, 256)
"""A tile of 16-bit values in memory: 2048 of them, in rows short enough for the copy engine."""


def is_narrow(dtype) -> bool:
    """Whether values of this type have 8 bits, which doubles the columns of a tile."""
    return jnp.dtype(dtype).itemsize == 1


def shape(dtype) -> tuple[int, int]:
    """A tile of values of this type in memory: (8, 256), or (16, 256) of 8 bits."""
    return (16, 256) if is_narrow(dtype) else SHAPE


def columns(dtype) -> int:
    """Logical columns of a tile: 64, or 128 of 8 bits."""
    return 2 * TILE if is_narrow(dtype) else TILE


def to_tiles(values: Float[Array, "R C_2"]) -> Float[Array, "R_64 C_t _ 256"]:
    """Stored values [R, C/2] -> tiles [ceil(R/64), ceil(C/64), 8, 256], padded with zeros.

    Of 8 bits: [ceil(R/64), ceil(C/128), 16, 256].
    """
    rows, half = values.shape
    stored = _stored(values.dtype)
    values = jnp.pad(values, ((0, -rows % TILE), (0, -half % stored)))
    row_tiles, column_tiles = values.shape[0] // TILE, values.shape[1] // stored
    tiles = values.reshape(row_tiles, TILE, column_tiles, stored).swapaxes(1, 2)
    return _swizzle(_pieces(tiles, row_tiles, column_tiles, stored)).reshape(
        row_tiles, column_tiles, *shape(values.dtype)
    )


def from_tiles(
    tiles: Float[Array, "R_64 C_t _ 256"], rows: int | None = None, columns: int | None = None
) -> Float[Array, "R C_2"]:
    """The inverse of `to_tiles`; `rows` and `columns` (logical) cut the padding off."""
    row_tiles, column_tiles = tiles.shape[:2]
    stored = _stored(tiles.dtype)
    parts = _swizzle(_pieces(tiles, row_tiles, column_tiles, stored))
    values = parts.reshape(row_tiles, column_tiles, TILE, stored).swapaxes(1, 2)
    return values.reshape(row_tiles * TILE, -1)[:rows, : None if columns is None else columns // 2]


def _stored(dtype) -> int:
    """Stored values in a tile's row."""
    return columns(dtype) // 2


def _pieces(tiles: Array, row_tiles: int, column_tiles: int, stored: int) -> Array:
    """Tiles as `_swizzle` takes them: rows in octets of pairs, four pieces in each."""
    return tiles.reshape(row_tiles, column_tiles, 8, 4, 2, 2, 2, stored // 4)


def _swizzle(tiles: Array) -> Array:
    """Exchange piece c of row r with piece c xor (r / 2 mod 4): [..., octets, pairs, 2, c / 2, c % 2, piece]."""
    pairs = [tiles[..., pair, :, :, :, :] for pair in range(4)]
    flips = [[axis for bit, axis in ((2, -3), (1, -2)) if pair & bit] for pair in range(4)]
    return jnp.stack([jnp.flip(t, axis) if axis else t for t, axis in zip(pairs, flips, strict=True)], axis=-5)
