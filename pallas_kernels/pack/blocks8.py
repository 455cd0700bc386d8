"""What one block of 128 threads does where e4m3 is stored: blocks.py with a cast, and the order of 8-bit values.

A thread chooses among the same 16 columns of the same two rows, in bf16. What it stores of a row then are 8 bytes, half
a piece of a tile of 128 columns, which two blocks share; and of two lanes that are neighbours the even one has the
metadata word of 32 columns of the first row, the odd one of the second, so that half a word changes lanes.

Factors of neurons come as bf16, two in a word. Along features each column has its own, and it is picked with the value.
"""

from pallas_kernels.pack import words
from pallas_kernels.pack.blocks import Directions, Thread
from pallas_kernels.pack.words import PackedRows, Word
from pallas_kernels.tiles import GRANULE

_TILE_HALVES, _TILE_WORDS = 512, 128
_EIGHT_ROWS = 64
"""From a half piece to that eight rows below."""
_FEATURE_FACTORS, _TOKEN_FACTORS = 8, 2
_TAKEN_WORDS = 5
"""Of each direction: a metadata word, and half a piece of squares of both rows."""


class Place:
    """Where a thread reads and writes values of 8 bits, and the factors of its neurons."""

    def __init__(self, thread: Thread, first_neuron: Word):
        """first_neuron: of the group that the block's rows are in."""
        self.thread, self.m = thread, thread.m
        t, column, row = thread.t, thread.column_tile, thread.row_block
        column_tiles, row_tiles = thread.matrix.columns // GRANULE, thread.matrix.rows // GRANULE

        def half(tile: Word, in_tile: Word, parity: Word) -> Word:
            piece = ((parity & 1) * 2 + (t >> 1)) ^ (thread.g >> 1)
            return tile * _TILE_HALVES + in_tile * 8 + piece * 2 + (t & 1)

        first = thread.first_row
        tile = (first >> 6) * (column_tiles // 2) + (column >> 1)
        self.feature_half = half(tile, (first & (GRANULE - 1)) + thread.g, column)
        tile = column * (row_tiles // 2) + (row >> 1)
        self.token_half = half(tile, thread.warp * 16 + thread.g, row)
        self.neuron = first_neuron + column * GRANULE

    def load_columns(self) -> list[Word]:
        """The factors of this thread's 16 columns: 8 words of two."""
        first = (self.neuron >> 3) + self.thread.t * 2
        return [word for i in range(2) for word in self.m.load("factor", first + i)]

    def load_rows(self) -> list[Word]:
        """The factors of features 16 w + g and 16 w + g + 8, f32."""
        return load_pair(self.thread, self.neuron + self.thread.warp * 16 + self.thread.g)

    def load_halves(self, name: str, start: Word) -> list[Word]:
        return [word for i in range(2) for word in self.m.load_half(name, start + i * _EIGHT_ROWS)]

    def store_halves(self, name: str, start: Word, rows: list[list[Word]]) -> None:
        for i, row in enumerate(rows):
            self.m.store_half(name, start + i * _EIGHT_ROWS, row)


def load_pair(thread: Thread, index: Word) -> list[Word]:
    """The factors of a row and of that eight rows below it, f32."""
    shift = (index & 1 ^ 1) << 4
    found = [thread.m.load_word("factor", (index >> 1) + 4 * i) for i in range(2)]
    return [(word << shift) & 0xFFFF0000 for word in found]


def load_factors(place: Place, along: Directions) -> list[Word]:
    """What every block reads of factors."""
    return (place.load_columns() if along.features else []) + (place.load_rows() if along.tokens else [])


def pack(place: Place, along: Directions, loaded: list[Word], *, infinity: int) -> None:
    """y -> the square of a = relu(y) times the factor, packed along features and along tokens; and how many a > 0.

    loaded: by `load_factors`.
    """
    m, thread, rows = place.m, place.thread, place.thread.load_rows("y")
    rows = [[m.relu(pair) for pair in row] for row in rows]
    count = words.positives(rows[0] + rows[1], infinity)
    m.store_word("positives", thread.block * 4 + thread.warp, m.warp_sum(count))
    if along.features:
        packed, *rows = words.pack_rows(m, rows[0], rows[1], loaded[:_FEATURE_FACTORS])
        squares = [
            scaled_squares(place.m, row, words.widen_all(factors))
            for row, factors in zip((packed.first, packed.second), packed.factors, strict=True)
        ]
        place.store_halves("squared", place.feature_half, squares)
        word = words.to_eight_bits(m, packed.metadata, thread.lane)
        m.store_word("feature_metadata", thread.feature_word, word)
    if along.tokens:
        thread.to_tokens(rows)
        m.barrier()
        packed, *_ = words.pack_rows(m, *thread.from_tokens())
        squares = [
            scaled_squares(place.m, row, [factor] * 8)
            for row, factor in zip((packed.first, packed.second), loaded[-_TOKEN_FACTORS:], strict=True)
        ]
        place.store_halves("tokens", place.token_half, squares)
        m.store_word("token_metadata", thread.token_word, words.to_eight_bits(m, packed.metadata, thread.lane))


def load_taken(place: Place, along: Directions) -> list[Word]:
    """What `take` reads beside dy2: to be loaded before any store, which no load could pass."""
    m, thread, found = place.m, place.thread, load_factors(place, along)
    if along.features:
        found.append(m.load_word("feature_metadata", thread.feature_word))
        found += place.load_halves("squared", place.feature_half)
    if along.tokens:
        found.append(m.load_word("token_metadata", thread.token_word))
        found += place.load_halves("tokens", place.token_half)
    return found


def take(place: Place, along: Directions, loaded: list[Word]) -> None:
    """dy2 -> 2 dy2 a times the factor at the positions of the squares of a along features and along tokens.

    loaded: by `load_taken`.
    """
    m, thread, rows = place.m, place.thread, place.thread.load_rows("y")
    count = _FEATURE_FACTORS * along.features + _TOKEN_FACTORS * along.tokens
    factors, kept = loaded[:count], loaded[count:]
    if along.tokens:
        thread.to_tokens_again(rows)
    if along.features:
        metadata, *squares = kept[:_TAKEN_WORDS]
        metadata = words.to_eight_bits(m, metadata, thread.lane)
        columns = factors[:_FEATURE_FACTORS]
        picked = words.take_rows(m, [columns, columns], metadata)
        taken = words.take_rows(m, rows, metadata)
        dy1 = [
            _gradients(place, row, squares[2 * i : 2 * i + 2], words.widen_all(picked[i]))
            for i, row in enumerate(taken)
        ]
        place.store_halves("feature_dy1", place.feature_half, dy1)
    if along.tokens:
        metadata, *squares = kept[-_TAKEN_WORDS:]
        metadata = words.to_eight_bits(m, metadata, thread.lane)
        m.barrier()
        taken = words.take_rows(m, thread.from_tokens(), metadata)
        dy1 = [
            _gradients(place, row, squares[2 * i : 2 * i + 2], [factors[i - _TOKEN_FACTORS]] * 8)
            for i, row in enumerate(taken)
        ]
        place.store_halves("token_dy1", place.token_half, dy1)


def scaled_squares(m: words.Machine, pairs: list[Word], factors: list[Word]) -> list[Word]:
    """The squares of bf16 pairs times factors in f32, in e4m3: exact up to the cast."""
    values = words.widen_all(pairs)
    squares = [m.multiply_f32(value, value) for value in values]
    return words.narrow_all(m, [m.multiply_f32(v, f) for v, f in zip(squares, factors, strict=True)])


def scaled_gradients(m: words.Machine, pairs: list[Word], roots: list[Word], factors: list[Word]) -> list[Word]:
    """dy2 in bf16 pairs times roots of squares times factors, in e4m3: exact up to the cast."""
    products = [m.multiply_f32(dy2, a) for dy2, a in zip(words.widen_all(pairs), roots, strict=True)]
    return words.narrow_all(m, [m.multiply_f32(v, f) for v, f in zip(products, factors, strict=True)])


def _gradients(place: Place, pairs: list[Word], squares: list[Word], factors: list[Word]) -> list[Word]:
    return scaled_gradients(place.m, pairs, words.roots(place.m, squares), factors)


def store_packed(thread: Thread, packed: PackedRows, along_rows: bool) -> None:
    """Weights packed in bf16, times the factor of each row: `blocks.Store`."""
    m, place = thread.m, Place(thread, thread.m.thread * 0)
    start, word = place.feature_half, thread.feature_word
    factors = load_pair(thread, thread.row) if not along_rows else place.load_rows()
    if along_rows:
        start, word = place.token_half, thread.token_word
    rows = []
    for row, factor in zip((packed.first, packed.second), factors, strict=True):
        rows.append(words.narrow_all(m, [m.multiply_f32(value, factor) for value in words.widen_all(row)]))
    place.store_halves("values", start, rows)
    m.store_word("metadata", word, words.to_eight_bits(m, packed.metadata, thread.lane))
