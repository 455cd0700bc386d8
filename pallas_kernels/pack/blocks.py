"""What one block of 128 threads does in each of the packing kernels: 64 rows and 64 columns of a matrix.

Thread 32 w + 4 g + t owns rows 16 w + g and 16 w + g + 8 and columns 16 t .. 16 t + 15 of whatever it packs: the part
whose positions make its metadata word, and whose stored values are one 16-byte piece of each row of a tile
(`pallas_kernels.metadata`, `pallas_kernels.tile_order`). So nothing is exchanged between threads. To pack along rows
(tokens) a block passes through shared memory once, and `ldmatrix` with rows picked by address hands each thread its
fours along the other axis.

Interleaved, a block takes 16 rows from each quarter of the matrix: warp w's rows are one run of quarter w, so that
along features it writes whole runs of a tile, and row j of the four quarters is a four along tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from pallas_kernels.pack import words
from pallas_kernels.pack.words import Machine, PackedRows, Word
from pallas_kernels.tiles import GRANULE

_TILE_PIECES = 256
_TILE_WORDS = 128


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The matrix that is read, [rows, columns], both multiples of 64, and which rows a block takes."""

    rows: int
    columns: int
    interleaved: bool = False
    itemsize: int = 2

    @property
    def blocks(self) -> int:
        return self.rows // GRANULE * (self.columns // GRANULE)


class Thread:
    """Where a thread reads and writes."""

    def __init__(self, m: Machine, matrix: Matrix):
        self.m, self.matrix, self.block = m, matrix, m.block
        column_tiles, row_tiles = matrix.columns // GRANULE, matrix.rows // GRANULE
        row_block, self.column_tile = m.block // column_tiles, m.block % column_tiles
        self.warp, self.lane = m.thread >> 5, m.thread & 31
        self.g, self.t = self.lane >> 2, self.lane & 3
        if matrix.interleaved:
            first_row = self.warp * (matrix.rows // 4) + row_block * 16
        else:
            first_row = row_block * GRANULE + self.warp * 16
        self.row, self.row_block, self.first_row = first_row + self.g, row_block, first_row
        piece = self.t ^ (self.g >> 1)
        tile, in_tile = (first_row >> 6) * column_tiles + self.column_tile, first_row & (GRANULE - 1)
        self.feature_piece = tile * _TILE_PIECES + (in_tile + self.g) * 4 + piece
        self.feature_word = tile * _TILE_WORDS + in_tile * 2 + self.lane
        tile = self.column_tile * row_tiles + row_block
        self.token_piece = tile * _TILE_PIECES + (self.warp * 16 + self.g) * 4 + piece
        self.token_word = tile * _TILE_WORDS + m.thread

    def load_rows(self, name: str) -> list[list[Word]]:
        """16 columns of rows g and g + 8: 8 words each, or 16 of f32."""
        in_row = self.matrix.itemsize  # pieces of 8 columns
        start = self.row * (self.matrix.columns * in_row // 16) + self.column_tile * (4 * in_row) + self.t * in_row
        rows = []
        for row in range(2):
            first = start + row * (8 * self.matrix.columns * in_row // 16)
            rows.append([word for i in range(in_row) for word in self.m.load(name, first + i)])
        return rows

    def to_tokens(self, rows: list[list[Word]], part: int = 0) -> None:
        """8 words of both rows into shared memory; wait before `from_tokens`."""
        for row, half in zip(rows, range(2), strict=True):
            index = self._own_row(half)
            for i in range(2):
                self.m.store_shared(self._shared(index, self.t * 2 + i) + part * 512, row[4 * i : 4 * i + 4])

    def to_tokens_again(self, rows: list[list[Word]]) -> None:
        """As `to_tokens`, for rows that are as `load_rows` found them."""
        self.to_tokens(rows)

    def from_tokens(self, part: int = 0) -> list[list[Word]]:
        """16 rows, four after four, of features 16 w + g and 16 w + g + 8: 8 words each."""
        matrix, row = self.lane >> 3, self.lane & 7
        out = []
        for half in range(2):
            found = []
            for pair in range(2):
                member, four = (matrix & 1) * 2 + (row & 1), (row >> 1) * 4 + 2 * pair + (matrix >> 1)
                index = self._row_of(member, four)
                found += self.m.load_transposed(self._shared(index, self.warp * 2 + half) + part * 512)
            out.append(found)
        return out

    def _own_row(self, half: int) -> Word:
        """The row in shared memory of the first or the second row that this thread owns."""
        if self.matrix.interleaved:
            return self._row_of(self.warp, self.g + 8 * half)
        return self._row_of(self.g & 3, self.warp * 4 + (self.g >> 2) + 2 * half)

    def _row_of(self, member: Word, four: Word) -> Word:
        """The row in shared memory of a member (0..3) of a four (0..15) along rows."""
        return member * 16 + four if self.matrix.interleaved else four * 4 + member

    def _shared(self, index: Word, piece: Word) -> Word:
        """Where a piece of a row lies: rows that are written, or read, together lie in different banks."""
        if self.matrix.interleaved:
            key = ((index ^ (index >> 4)) & 1) | ((index >> 2) & 3) << 1
        else:
            key = (index & 1) | ((index >> 4) & 3) << 1
        return index * 8 + (piece ^ key)

    def load_pieces(self, name: str, start: Word) -> list[list[Word]]:
        return [self.m.load(name, start), self.m.load(name, start + 32)]

    def store_pieces(self, name: str, start: Word, first: list[Word], second: list[Word]) -> None:
        self.m.store(name, start, first)
        self.m.store(name, start + 32, second)


class ChunkThread(Thread):
    """A thread whose 64 x 64 entries lie in shared memory already: a chunk of a product's result.

    Rows of 128 bytes, piece p of row r at p ^ (r mod 8), as the copy engine swizzles them. The product's other operand
    was loaded such that the two fours and two members that `ldmatrix` takes at once are rows of different r mod 8:
    the row of member m of four f is [f mod 4, m div 2, f div 4, m mod 2] in bits (2, 1, 2, 1).
    """

    def load_rows(self, name: str) -> list[list[Word]]:
        del name  # there is one array in shared memory
        rows = []
        for half in range(2):
            index = self._own_row(half)
            rows.append([word for i in range(2) for word in self.m.load_shared(self._shared(index, self.t * 2 + i))])
        return rows

    def to_tokens_again(self, rows: list[list[Word]]) -> None:
        """Where nothing has changed there is nothing to write."""

    def _row_of(self, member: Word, four: Word) -> Word:
        return (four & 3) * 16 + (member >> 1) * 8 + (four >> 2) * 2 + (member & 1)

    def _shared(self, index: Word, piece: Word) -> Word:
        return index * 8 + (piece ^ (index & 7))


@dataclasses.dataclass(frozen=True)
class Directions:
    """Along which axes a kernel packs."""

    features: bool
    tokens: bool


def pack(thread: Thread, along: Directions, *, relu: bool, infinity: int) -> None:
    """y -> packed a = relu(y) (or y), its square along features, and packed again along tokens.

    Along tokens it packs what is left along features where both are asked for. With relu each warp writes how many of
    its a are positive.
    """
    m, rows = thread.m, thread.load_rows("y")
    if relu:
        rows = [[m.relu(pair) for pair in row] for row in rows]
        count = words.positives(rows[0] + rows[1], infinity)
        m.store_word("positives", thread.block * 4 + thread.warp, m.warp_sum(count))
    if along.features:
        packed, *rows = words.pack_rows(m, *rows)
        thread.store_pieces("features", thread.feature_piece, packed.first, packed.second)
        thread.store_pieces("squared", thread.feature_piece, _square(m, packed.first), _square(m, packed.second))
        m.store_word("feature_metadata", thread.feature_word, packed.metadata)
    if along.tokens:
        thread.to_tokens(rows)
        m.barrier()
        _store_tokens(thread, *thread.from_tokens())


_TAKEN_WORDS = 9
"""Of each direction: a metadata word, and two pieces of a."""


def load_taken(thread: Thread, along: Directions) -> list[Word]:
    """What `take` reads beside dy2, in words: to be loaded before any store, which no load could pass."""
    found = []
    if along.features:
        found.append(thread.m.load_word("feature_metadata", thread.feature_word))
        found += [word for piece in thread.load_pieces("features", thread.feature_piece) for word in piece]
    if along.tokens:
        found.append(thread.m.load_word("token_metadata", thread.token_word))
        found += [word for piece in thread.load_pieces("tokens", thread.token_piece) for word in piece]
    return found


def take(thread: Thread, along: Directions, loaded: list[Word]) -> None:
    """dy2 -> 2 dy2 a at the positions of a along features and along tokens, and a^2 along tokens.

    loaded: by `load_taken`.
    """
    m, rows = thread.m, thread.load_rows("y")
    if along.tokens:
        thread.to_tokens_again(rows)
    if along.features:
        metadata, a = loaded[0], [loaded[1:5], loaded[5:9]]
        thread.store_pieces("feature_dy1", thread.feature_piece, *_dy1(m, words.take_rows(m, rows, metadata), a))
    if along.tokens:
        metadata, *values = loaded[-_TAKEN_WORDS:]
        a = [values[:4], values[4:]]
        thread.store_pieces("token_squared", thread.token_piece, *(_square(m, row) for row in a))
        m.barrier()
        taken = words.take_rows(m, thread.from_tokens(), metadata)
        thread.store_pieces("token_dy1", thread.token_piece, *_dy1(m, taken, a))


def pack_thresholded(m: Machine, matrix: Matrix, *, along_rows: bool, store: "Store | None" = None) -> None:
    """w -> packed round(beta S(w)), S along the columns or, `along_rows`, along the rows and transposed.

    store: how, other than as it is.
    """
    thread = Thread(m, matrix)
    beta = m.load_word("beta", m.thread * 0)
    rows = thread.load_rows("w")
    if along_rows:
        # ldmatrix moves 16 bits at a time: f32 goes through shared memory as high and low halves.
        parts = [rows] if matrix.itemsize == 2 else [[halves(m, row, high) for row in rows] for high in (True, False)]
        for i, part in enumerate(parts):
            thread.to_tokens(part, i)
        m.barrier()
        parts = [thread.from_tokens(i) for i in range(len(parts))]
        rows = parts[0] if len(parts) == 1 else [join(m, *halves) for halves in zip(*parts, strict=True)]
    if matrix.itemsize == 2:
        rows = [[f32 for pair in row for f32 in (pair << 16, pair & 0xFFFF0000)] for row in rows]
    rows = [[w for i in range(0, 16, 4) for w in words.thresholded(m, row[i : i + 4], beta)] for row in rows]
    packed, *_ = words.pack_rows(m, *rows)
    (store or _store_packed)(thread, packed, along_rows)


type Store = Callable[[Thread, PackedRows, bool], None]


def _store_packed(thread: Thread, packed: PackedRows, along_rows: bool) -> None:
    piece, word = thread.feature_piece, thread.feature_word
    if along_rows:
        piece, word = thread.token_piece, thread.token_word
    thread.store_pieces("values", piece, packed.first, packed.second)
    thread.m.store_word("metadata", word, packed.metadata)


def _store_tokens(thread: Thread, first: list[Word], second: list[Word]) -> None:
    packed, *_ = words.pack_rows(thread.m, first, second)
    thread.store_pieces("tokens", thread.token_piece, packed.first, packed.second)
    thread.m.store_word("token_metadata", thread.token_word, packed.metadata)


def _square(m: Machine, pairs: list[Word]) -> list[Word]:
    return [m.multiply(pair, pair) for pair in pairs]


def _dy1(m: Machine, taken: Any, a: list[list[Word]]) -> list[list[Word]]:
    return [
        [m.multiply(m.add(dy2, dy2), pair) for dy2, pair in zip(row, a_row, strict=True)]
        for row, a_row in zip(taken, a, strict=True)
    ]


def halves(m: Machine, row: list[Word], high: bool) -> list[Word]:
    """16 f32 -> 8 pairs of their high, or low, 16 bits."""
    selector = 0x7632 if high else 0x5410
    return [m.permute(row[i], row[i + 1], selector) for i in range(0, 16, 2)]


def join(m: Machine, high: list[Word], low: list[Word]) -> list[Word]:
    """The inverse of `halves`."""
    return [m.permute(a, b, selector) for a, b in zip(low, high, strict=True) for selector in (0x5410, 0x7632)]
