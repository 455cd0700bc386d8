"""Stored values of a 2:4 matrix tile by tile, each tile one run of 4 KiB: the order the kernels load.

A tile is 64 rows and 64 logical, so 32 stored, columns. Row by row it would be 64 pieces of 64 bytes, each half of a
cache line; as one run it takes half the requests of L2 and lands in shared memory as the tensor core reads it without
any swizzle, in matrices of 8 rows x 16 bytes: `tile[octet of columns, octet of rows, row, column]`.

Source: PTX ISA, "wgmma shared memory layout", K-major without swizzling.
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
    parts = values.reshape(row_tiles, 8, 8, column_tiles, 4, 8)
    return parts.transpose(0, 3, 4, 1, 2, 5).reshape(row_tiles, column_tiles, *SHAPE)


def from_tiles(
    tiles: Float[Array, "R_64 C_64 8 256"], rows: int | None = None, columns: int | None = None
) -> Float[Array, "R C_2"]:
    """The inverse of `to_tiles`; `rows` and `columns` (logical) cut the padding off."""
    row_tiles, column_tiles = tiles.shape[:2]
    parts = tiles.reshape(row_tiles, column_tiles, 4, 8, 8, 8)
    values = parts.transpose(0, 3, 4, 1, 2, 5).reshape(row_tiles * TILE, column_tiles * TILE // 2)
    return values[:rows, : None if columns is None else columns // 2]
