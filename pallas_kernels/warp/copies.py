"""What each thread copies of a stage, and where it lies in shared memory: addresses of A, its metadata and B.

A stage holds A's 64 x 64 tiles as they lie in memory (tile_order.py), their metadata words, then B: rows of whole
pieces of 16 bytes, exchanged within 128 bytes so that eight rows that `ldmatrix` takes at once lie in all banks.
"""

from typing import Any, NamedTuple

from pallas_kernels.tiles import TILE_K, Problem
from pallas_kernels.warp.machine import Machine, Pointer, Word
from pallas_kernels.warp.tiles import WarpTile

PIECE = 8
"""Elements of 16 bits in the 16 bytes of one copy."""
_TILE_BYTES = 4096
_TILE_WORD_BYTES = 512


class Place(NamedTuple):
    """Where a tile of the output reads: first row and logical column of A, first row and column of B; its stages."""

    a_row: Word
    a_k: Word
    b_k: Word
    b_n: Word
    steps: Word


class Turn(NamedTuple):
    """One copy of a thread in each stage."""

    offset: int
    """Bytes after the source's pointer."""
    to: int
    """Bytes after the source's place in the stage."""
    index: int = 0
    """The array has it where this is less than the source's `left`."""
    flip: int = 0
    """Bits to exchange in the byte of the stage: rows that are no multiple of 8 apart are swizzled otherwise."""


class Gathered(NamedTuple):
    """Rows of B by index: of turn t the index that lies 4 x its `index` bytes after the pointer."""

    pointer: Pointer
    """Of the first turn's index in the tile's first stage."""
    rows: int
    """Rows that B has: any other index stands for a row of zeros."""
    row_bytes: int


INDEX_STRIDE = 4 * TILE_K
"""Bytes of indices to the next stage."""


class Source(NamedTuple):
    """What a thread copies of one operand, stage after stage."""

    pointer: Pointer
    """Of its first turn, in the tile's first stage."""
    stride: int
    """Bytes to the next stage."""
    to: Word
    """Byte of the stage."""
    turns: list[Turn]
    left: Any
    """None: the array has all of it. A word and not one condition a turn: those would not fit the registers."""
    gathered: Gathered | None = None


class Layout(NamedTuple):
    """The arrays as the copies see them."""

    problem: Problem
    tile: WarpTile
    in_rows: bool
    """A's values are rows [m, k/2], not tiles."""
    a_rows: int
    """Rows that A has."""
    b_columns: int
    """Columns that B has."""
    b_rows: int
    """Rows that B has: of all groups."""


def sources(m: Machine, layout: Layout, place: Place) -> list[Source]:
    """A's values, its metadata, and B."""
    a = _rows_of_a(m, layout, place) if layout.in_rows else _tiles_of_a(m, layout, place)
    return [a, _metadata(m, layout, place), (_b_k_major if layout.problem.b_k_major else _b_n_major)(m, layout, place)]


def _a_is_whole(layout: Layout) -> bool:
    """Whether no tile reaches beyond the rows of A."""
    p = layout.problem
    rows = p.m // p.groups if p.mode == "columns" else layout.a_rows
    return p.mode != "rows" and rows % layout.tile.tile_m == 0


def _b_is_whole(layout: Layout) -> bool:
    return layout.problem.mode != "columns" and layout.b_columns % layout.tile.tile_n == 0


def _tiles_of_a(m: Machine, layout: Layout, place: Place) -> Source:
    c, k_tiles = layout.tile, layout.problem.k // TILE_K
    pointer = m.pointer(
        "values", (place.a_row // 64, k_tiles * _TILE_BYTES), (place.a_k // 64, _TILE_BYTES), (m.thread % 256, 16)
    )
    turns = []
    for turn in range(c.a_bytes // 16 // c.threads):
        tile, within = divmod(turn * c.threads, 256)  # a turn is of one tile, or of two halves of it
        turns.append(Turn(tile * k_tiles * _TILE_BYTES + within * 16, turn * c.threads * 16, tile))
    left = None if _a_is_whole(layout) else _tiles_left(m, layout, place)
    return Source(pointer, _TILE_BYTES, m.thread * 16, turns, left)


def _rows_of_a(m: Machine, layout: Layout, place: Place) -> Source:
    c, row_bytes = layout.tile, layout.problem.k
    row, piece, rows = m.thread // 4, m.thread % 4, c.threads // 4
    pointer = m.pointer("values", (place.a_row + row, row_bytes), (place.a_k, 1), (piece, 16))
    turns = [Turn(first * row_bytes, first * 64, first) for first in range(0, c.tile_m, rows)]
    left = None if _a_is_whole(layout) else m.constant(layout.a_rows) - place.a_row - row
    return Source(pointer, 64, row * 64 + (piece ^ (row // 2 % 4)) * 16, turns, left)


def _metadata(m: Machine, layout: Layout, place: Place) -> Source:
    c, k_tiles, tile = layout.tile, layout.problem.k // TILE_K, m.thread // 32
    pointer = m.pointer(
        "metadata",
        (place.a_row // 64 + tile, k_tiles * _TILE_WORD_BYTES),
        (place.a_k // 64, _TILE_WORD_BYTES),
        (m.thread % 32, 16),
    )
    left = m.constant(c.warps_m)
    if not _a_is_whole(layout):
        left = m.least(left, _tiles_left(m, layout, place))
    elif c.warps_m == c.warps:
        return Source(pointer, _TILE_WORD_BYTES, m.thread * 16 + c.a_bytes, [Turn(0, 0)], None)
    return Source(pointer, _TILE_WORD_BYTES, m.thread * 16 + c.a_bytes, [Turn(0, 0)], left - tile)


def _tiles_left(m: Machine, layout: Layout, place: Place) -> Word:
    return m.constant(-(-layout.a_rows // 64)) - place.a_row // 64


def _b_k_major(m: Machine, layout: Layout, place: Place) -> Source:
    c, row_bytes = layout.tile, 2 * layout.b_rows
    row, piece, rows = m.thread // 8, m.thread % 8, c.threads // 8
    pointer = m.pointer("b", (place.b_n + row, row_bytes), (place.b_k, 2), (piece, 16))
    turns = [Turn(first * row_bytes, first * 128, first) for first in range(0, c.tile_n, rows)]
    left = None if _b_is_whole(layout) else m.constant(layout.b_columns) - place.b_n - row
    to = row * 128 + (piece ^ (row % 8)) * 16 + (c.a_bytes + c.metadata_bytes)
    return Source(pointer, 2 * TILE_K, to, turns, left)


def _b_n_major(m: Machine, layout: Layout, place: Place) -> Source:
    """Interleaved, row k of B is row k mod 4 * K/4 + k div 4 of the array; with V:N:M it is given by an index."""
    c, p, row_bytes, pieces = layout.tile, layout.problem, 2 * layout.b_columns, layout.tile.tile_n // PIECE
    row, piece, rows = m.thread // pieces, m.thread % pieces, c.threads // pieces
    column = (piece * PIECE) + place.b_n
    left = None if _b_is_whole(layout) else m.constant(layout.b_columns) - column
    to = _n_major_byte(row, piece, c.tile_n) + (c.a_bytes + c.metadata_bytes)
    firsts = range(0, TILE_K, rows)
    if p.v:
        indices = m.pointer("columns", (place.a_row // p.v, 4 * p.k), (row, 4))
        turns = [Turn(0, first * 2 * c.tile_n, first, first % 8 * 16) for first in firsts]
        gathered = Gathered(indices, layout.b_rows, row_bytes)
        return Source(m.pointer("b", (column, 2)), 0, to, turns, left, gathered)
    if p.b_interleaved:
        members = 4
        first = row % 4 * (layout.b_rows // 4) + row // 4
    else:
        members, first = 1, place.b_k + row
    pointer = m.pointer("b", (first, row_bytes), (column, 2))
    turns = [Turn(first // members * row_bytes, first * 2 * c.tile_n, 0, first % 8 * 16) for first in firsts]
    return Source(pointer, TILE_K // members * row_bytes, to, turns, left)


def _n_major_byte(row: Word, piece: Word, tile_n: int) -> Word:
    return row * (2 * tile_n) + piece // 8 * 128 + (piece % 8 ^ (row % 8)) * 16


# From shared memory to registers


def a_lane(lane: Word) -> Word:
    """Bytes from 16 rows of A to the row that a lane names to `ldmatrix.x4`; the second 32 logical columns: xor 32."""
    row, piece = lane % 16, lane // 16
    return row * 64 + (piece ^ (row // 2 % 4)) * 16


def b_lane(lane: Word, column: Word, tile_n: int, k_major: bool) -> Word:
    """Bytes from the stage's B to the row that a lane names for the 32 x 8 block at `column`, a multiple of 64."""
    if k_major:
        return (column + lane % 8) * 128 + (lane // 8 ^ (lane % 8)) * 16
    return lane * (2 * tile_n) + column // 64 * 128 + lane % 8 * 16


def b_block(step: int, block: int, tile_n: int, k_major: bool) -> tuple[int, int]:
    """(xor, add): from a warp's first block to its block of 8 columns number `block`, of 32 rows number `step`."""
    if k_major:
        return 64 * step, 1024 * block
    return block * 16, step * 32 * 2 * tile_n
