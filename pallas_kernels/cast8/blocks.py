"""What one block of 128 threads does in each of the casting kernels.

Transposed copies go as in the packing kernels (pack/blocks.py): 64 rows and 64 columns through shared memory once, and
`ldmatrix` hands each thread 16 rows, in the order of the contraction, of two columns. 16 of them are 16 bytes of e4m3.
"""

import dataclasses
import functools

from pallas_kernels.pack import words
from pallas_kernels.pack.blocks import Matrix, Thread, halves, join
from pallas_kernels.pack.blocks8 import load_pair, scaled_gradients, scaled_squares
from pallas_kernels.pack.words import Machine, Word
from pallas_kernels.tiles import GRANULE

_THREADS, _WARPS = 128, 4
_MAGNITUDES, _INFINITY = 0x7FFFFFFF, 0x7F800000
_BOTH_MAGNITUDES = 0x7FFF7FFF
_LARGEST, _SMALLEST_SCALE, _LARGEST_SCALE = 0x43E00000, 67 << 23, 187 << 23  # 448, 2^-60 and 2^60 in f32
_ONE, _INVERSE = 127 << 23, 254 << 23


@dataclasses.dataclass(frozen=True)
class Rows:
    """An array [count, columns]: a block for each row, columns a multiple of 16 and at most `MAX_COLUMNS`."""

    count: int
    columns: int
    itemsize: int

    @property
    def turns(self) -> int:
        """Times 16 entries that a thread takes."""
        return -(-self.columns // (16 * _THREADS))


MAX_COLUMNS = 8192
"""Of a row in f32 a thread then keeps 64 registers."""


def by_row(m: Machine, rows: Rows) -> None:
    """x -> each row over its scale, in one read; and the scales."""
    per_row = rows.columns // 16
    found, places = [], []
    for turn in range(rows.turns):
        # Past the end the last 16 entries once more: written twice, the same.
        places.append(m.minimum(m.thread + turn * _THREADS, per_row - 1))
        first = (m.block * per_row + places[-1]) * rows.itemsize
        found.append([word for i in range(rows.itemsize) for word in m.load("x", first + i)])
    entries = found if rows.itemsize == 4 else [words.widen_all(pairs) for pairs in found]
    largest: Word = m.thread * 0
    for entry in (entry for taken in entries for entry in taken):
        largest = m.maximum(largest, entry & _MAGNITUDES)
    m.store_word("shared", m.thread >> 5, m.warp_max(largest))
    m.barrier()
    largest = m.load_word("shared", m.thread * 0)
    for warp in range(1, _WARPS):
        largest = m.maximum(largest, m.load_word("shared", m.thread * 0 + warp))
    scale, factor = scale_of(m, largest)
    for taken, place in zip(entries, places, strict=True):
        values = words.narrow_all(m, [m.multiply_f32(entry, factor) for entry in taken])
        m.store("values", m.block * per_row + place, values)
    m.store_word("scale", m.block, scale)


STRIP = 16
"""Rows whose largest magnitudes by column `by_row_and_maxima` finds on its way: a sixteenth of x to be read again."""
_AT_ONCE = 2
"""Rows of a strip that wait for one another."""


def by_row_and_maxima(m: Machine, rows: Rows) -> None:
    """x in bf16, a block for each strip: as `by_row`; and of each column the largest magnitude in the strip, bf16.

    Past the last row that one once more.
    """
    per_row = rows.columns // 16
    places = [m.minimum(m.thread + turn * _THREADS, per_row - 1) for turn in range(rows.turns)]

    def some_rows(turn: Word, maxima: list[Word]) -> list[Word]:
        first = turn * _AT_ONCE
        index = [m.minimum(m.block * STRIP + (first + i), rows.count - 1) for i in range(_AT_ONCE)]
        taken = []
        for row in index:
            pieces = [(row * per_row + place) * 2 for place in places]
            taken.append([pair for piece in pieces for half in range(2) for pair in m.load("x", piece + half)])
        for i, row in enumerate(taken):
            magnitudes, largest = [pair & _BOTH_MAGNITUDES for pair in row], m.thread * 0
            for pair in magnitudes:
                largest = m.maximum_pair(largest, pair)
            maxima = [m.maximum_pair(*pairs) for pairs in zip(maxima, magnitudes, strict=True)]
            largest = m.warp_max(m.maximum(largest << 16, largest & 0xFFFF0000))
            m.store_word("shared", (m.thread >> 5) + (first + i) * _WARPS, largest)
        m.barrier()
        for i, row in enumerate(taken):
            found = [m.load_word("shared", (first + i) * _WARPS + warp) for warp in range(_WARPS)]
            scale, factor = scale_of(m, functools.reduce(m.maximum, found))
            values = words.narrow_all(m, [m.multiply_f32(entry, factor) for entry in words.widen_all(row)])
            for j, place in enumerate(places):
                m.store("values", index[i] * per_row + place, values[4 * j : 4 * j + 4])
            m.store_word("scale", index[i], scale)
        return maxima

    maxima = m.loop(STRIP // _AT_ONCE, [m.thread * 0] * (8 * rows.turns), some_rows)
    for i, place in enumerate(places):
        for half in range(2):
            first = 8 * i + 4 * half
            m.store("maxima", (m.block * per_row + place) * 2 + half, maxima[first : first + 4])


def scale_of(m: Machine, amax: Word) -> tuple[Word, Word]:
    """`reference.scale_of` from the bits of amax, and its inverse; all bits set where it is not finite."""
    wrong = m.greater(amax, _INFINITY - 1)
    exponent = _SMALLEST_SCALE - _ONE
    clipped = m.minimum(m.maximum(amax, _LARGEST + exponent), _LARGEST + _LARGEST_SCALE - _ONE)
    scale = (clipped - (_LARGEST - _ONE - (1 << 23) + 1)) & 0xFF800000
    return scale | wrong, (~scale + (_INVERSE + 1)) | wrong


def by_column(m: Machine, matrix: Matrix) -> None:
    """x -> each column times its factor, transposed."""
    thread = Thread(m, matrix)
    rows = thread.load_rows("x")
    parts = [rows] if matrix.itemsize == 2 else [[halves(m, row, high) for row in rows] for high in (True, False)]
    for i, part in enumerate(parts):
        thread.to_tokens(part, i)
    factors = load_pair(thread, _column(thread))
    m.barrier()
    found = [thread.from_tokens(i) for i in range(len(parts))]
    if len(found) == 1:
        columns = [words.widen_all(column) for column in found[0]]
    else:
        columns = [join(m, *pair) for pair in zip(*found, strict=True)]
    scaled = [
        words.narrow_all(m, [m.multiply_f32(entry, factor) for entry in column])
        for column, factor in zip(columns, factors, strict=True)
    ]
    _store_columns(thread, "columns", scaled)


def fold(m: Machine, matrix: Matrix) -> None:
    """e4m3 -> each row times its factor, at most 1, transposed."""
    thread = Thread(m, matrix)
    factors, rows = load_pair(thread, thread.row), []
    for i in range(2):
        first = (thread.row + 8 * i) * (matrix.columns // 16) + thread.column_tile * 4 + thread.t
        entries = [value for word in m.load("a", first) for value in m.widen8(word)]
        scaled = [m.multiply_f32(entry, factors[i]) for entry in entries]
        # Four significant bits times a power of two: exact in bf16.
        rows.append([m.round_pair(scaled[i], scaled[i + 1]) for i in range(0, 16, 2)])
    thread.to_tokens(rows)
    m.barrier()
    columns = [words.narrow_all(m, words.widen_all(column)) for column in thread.from_tokens()]
    _store_columns(thread, "columns", columns)


def activate(m: Machine, matrix: Matrix) -> None:
    """y -> the square of relu(y) times the factor of its column, as it lies and transposed."""
    thread = Thread(m, matrix)
    rows = [[m.relu(pair) for pair in row] for row in thread.load_rows("y")]
    thread.to_tokens(rows)
    by_column, factors = _factors_of_columns(thread), load_pair(thread, _column(thread))
    _store_rows(thread, "rows", [scaled_squares(m, row, by_column) for row in rows])
    m.barrier()
    columns = zip(thread.from_tokens(), factors, strict=True)
    _store_columns(thread, "columns", [scaled_squares(m, column, [factor] * 16) for column, factor in columns])


def differentiate(m: Machine, matrix: Matrix) -> None:
    """dy2 and transposed squares of a -> dy2 times their roots times the factor, as it lies and transposed.

    The roots go through shared memory the other way, as if rows were columns.
    """
    thread = Thread(m, matrix)
    rows, by_column = thread.load_rows("y"), _factors_of_columns(thread)
    factors = load_pair(thread, _column(thread))
    squares = [m.load("squared", thread_piece) for thread_piece in _column_pieces(thread)]
    roots = [words.roots(m, column) for column in squares]
    thread.to_tokens(rows)
    thread.to_tokens([[m.round_pair(r[i], r[i + 1]) for i in range(0, 16, 2)] for r in roots], 1)
    m.barrier()
    turned = [words.widen_all(row) for row in thread.from_tokens(1)]
    _store_rows(thread, "rows", [scaled_gradients(m, *pair, by_column) for pair in zip(rows, turned, strict=True)])
    columns = zip(thread.from_tokens(), roots, factors, strict=True)
    done = [scaled_gradients(m, column, root, [factor] * 16) for column, root, factor in columns]
    _store_columns(thread, "columns", done)


def _column(thread: Thread) -> Word:
    """The first of the two columns that the thread has after the exchange; the other is eight further."""
    return thread.column_tile * GRANULE + thread.warp * 16 + thread.g


def _factors_of_columns(thread: Thread) -> list[Word]:
    """f32, of the 16 columns of this thread's rows."""
    first = thread.column_tile * 8 + thread.t * 2
    return words.widen_all([word for i in range(2) for word in thread.m.load("factor", first + i)])


def _column_pieces(thread: Thread) -> list[Word]:
    """Where 16 rows of both columns lie in the transposed array."""
    per_column = thread.matrix.rows // 16
    first = _column(thread) * per_column + thread.row_block * 4 + thread.t
    return [first, first + 8 * per_column]


def _store_columns(thread: Thread, name: str, columns: list[list[Word]]) -> None:
    for piece, column in zip(_column_pieces(thread), columns, strict=True):
        thread.m.store(name, piece, column)


def _store_rows(thread: Thread, name: str, rows: list[list[Word]]) -> None:
    per_row = thread.matrix.columns // 16
    for i, row in enumerate(rows):
        thread.m.store(name, (thread.row + 8 * i) * per_row + thread.column_tile * 4 + thread.t, row)
