"""The sizes of a stored V:N:M matrix, and the one statement of which patterns can be stored.

Of each block of v rows and m neighbouring columns four columns are kept; one block after another they make the
*compressed* matrix [R, 4 C / m], which is 2:4. It is stored padded to multiples of v rows and 64 columns.
"""

from typing import NamedTuple

BLOCK_ROWS = (64, 128, 256)
KEPT = 4
"""Columns that are kept of a block."""
MAX_M = 128
_TILE = 64


class Stored(NamedTuple):
    """Sizes of the stored matrix, padding included."""

    rows: int
    columns: int
    """Compressed columns: a multiple of 64."""
    blocks: int
    """Blocks of v rows: each has its own choice of columns."""


def check_pattern(v: int, m) -> None:
    """Raise ValueError for a pattern that cannot be stored."""
    if v not in BLOCK_ROWS:
        raise ValueError(f"pattern.v = {v}: a stored V:N:M matrix has blocks of 64, 128 or 256 rows; use one of them.")
    if not KEPT <= m <= MAX_M or m % KEPT:  # in this order: inf and NaN have no remainder
        raise ValueError(f"pattern.m = {m}: a stored V:N:M matrix takes a multiple of 4 from 4 to {MAX_M}.")


def stored(rows: int, columns: int, v: int, m) -> Stored:
    """Sizes of a stored matrix [rows, columns].

    Raises:
      ValueError: the pattern cannot be stored, or the columns do not split into blocks of m.
    """
    check_pattern(v, m)
    m = int(m)
    if rows < 1 or columns < 1 or columns % m:
        raise ValueError(
            f"a matrix of {rows} x {columns} does not split into blocks of pattern.m = {m} columns; "
            f"use a multiple of {m} columns, or another pattern."
        )
    blocks = -(-rows // v)
    compressed = KEPT * columns // m
    return Stored(blocks * v, compressed + -compressed % _TILE, blocks)
