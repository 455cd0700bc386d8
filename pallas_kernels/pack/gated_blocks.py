"""What one block of 128 threads does for a gated layer: as blocks.py, with two values, c and u, behind each h.

A thread's 16-bit pairs hold bfloat16, the upper half of f32; products of three are formed in f32 and rounded once.
"""

from pallas_kernels.pack import words
from pallas_kernels.pack.blocks import Directions, Matrix, Thread
from pallas_kernels.pack.words import Fours, Machine, PackedRows, Word

type Rows = list[list[Word]]
"""Pairs of two rows."""


def pack(m: Machine, matrix: Matrix, along: Directions, *, squared: bool, infinity: int) -> None:
    """y = (g, u) -> h, c = relu(g) and u packed where h is kept along features, and c and u where it is along tokens.

    matrix: that of h. y has twice its columns.
    """
    thread = Thread(m, matrix)
    gate, up = _load_halves(thread)
    gate = [[m.relu(pair) for pair in row] for row in gate]
    count = words.positives(gate[0] + gate[1], infinity)
    m.store_word("positives", thread.block * 4 + thread.warp, m.warp_sum(count))
    if along.features:
        packed, (of_gate, gate), (of_up, up) = _pack_rows(m, _hidden(m, gate, up, squared), gate, up)
        thread.store_pieces("features", thread.feature_piece, packed.first, packed.second)
        thread.store_pieces("feature_gate", thread.feature_piece, *of_gate)
        thread.store_pieces("feature_up", thread.feature_piece, *of_up)
        m.store_word("feature_metadata", thread.feature_word, packed.metadata)
    if along.tokens:
        for part, rows in enumerate((gate, up)):
            thread.to_tokens(rows, part)
        m.barrier()
        gate, up = (thread.from_tokens(part) for part in range(2))
        packed, (of_gate, _), (of_up, _) = _pack_rows(m, _hidden(m, gate, up, squared), gate, up)
        thread.store_pieces("token_gate", thread.token_piece, *of_gate)
        thread.store_pieces("token_up", thread.token_piece, *of_up)
        m.store_word("token_metadata", thread.token_word, packed.metadata)


def take(m: Machine, matrix: Matrix, along: Directions, *, squared: bool) -> None:
    """dh -> the gradients by c and u at the positions of h both ways, and h along tokens.

    Along features both lie side by side, in a matrix of twice the columns.
    """
    thread, loaded = Thread(m, matrix), {}
    for name, given, piece, word in (
        ("feature", along.features, thread.feature_piece, thread.feature_word),
        ("token", along.tokens, thread.token_piece, thread.token_word),
    ):
        if given:  # before any store, which no load could pass
            values = [thread.load_pieces(f"{name}_{part}", piece) for part in ("gate", "up")]
            loaded[name] = (m.load_word(f"{name}_metadata", word), *values)
    rows = thread.load_rows("y")
    if along.tokens:
        thread.to_tokens(rows)
    if along.features:
        metadata, gate, up = loaded["feature"]
        of_gate, of_up = _gradients(m, list(words.take_rows(m, rows, metadata)), gate, up, squared)
        first = _piece_of_half(thread, matrix)
        thread.store_pieces("feature_gradients", first, *of_gate)
        thread.store_pieces("feature_gradients", first + _half_pieces(matrix), *of_up)
    if along.tokens:
        metadata, gate, up = loaded["token"]
        thread.store_pieces("token_hidden", thread.token_piece, *_hidden(m, gate, up, squared))
        m.barrier()
        taken = list(words.take_rows(m, thread.from_tokens(), metadata))
        of_gate, of_up = _gradients(m, taken, gate, up, squared)
        thread.store_pieces("token_dg", thread.token_piece, *of_gate)
        thread.store_pieces("token_du", thread.token_piece, *of_up)


_TILE_PIECES = 256


def _half_pieces(matrix: Matrix) -> int:
    """From a tile of the first half of a row of tiles to that of the second."""
    return matrix.columns // 64 * _TILE_PIECES


def _piece_of_half(thread: Thread, matrix: Matrix) -> Word:
    """The thread's piece along features in a matrix of twice the columns, in the first half."""
    row_of_tiles = thread.feature_piece // _half_pieces(matrix)
    return thread.feature_piece + row_of_tiles * _half_pieces(matrix)


def _load_halves(thread: Thread) -> tuple[Rows, Rows]:
    """16 columns of g and the same of u, of rows g and g + 8 of the block, from an array of twice the columns."""
    pieces = thread.matrix.columns // 8  # of a row of either half
    start = thread.row * (2 * pieces) + thread.column_tile * 8 + thread.t * 2
    halves = []
    for half in range(2):
        rows = []
        for row in range(2):
            first = start + row * (8 * 2 * pieces) + half * pieces
            rows.append([word for i in range(2) for word in thread.m.load("y", first + i)])
        halves.append(rows)
    return halves[0], halves[1]


def _pack_rows(m: Machine, hidden: Rows, *others: Rows) -> tuple[PackedRows, *tuple[tuple[Rows, Rows], ...]]:
    """h packed, as `words.pack_rows`; and each other at its positions, and with +0.0 where h is not kept."""
    packed, *_ = words.pack_rows(m, *hidden)
    found = []
    for rows in others:
        pruned: Rows = [[], []]
        for group in range(4):
            span = slice(2 * group, 2 * group + 2)
            x = words.fours(m, rows[0][span], rows[1][span])
            masks = _kept_masks(m, packed.metadata, group)
            kept = [entry & mask for entry, mask in zip(x, masks, strict=True)]
            for pair in (kept[:2], kept[2:]):
                for row, word in zip(pruned, words.separate(m, *pair), strict=True):
                    row.append(word)
        found.append((list(words.take_rows(m, rows, packed.metadata)), pruned))
    return packed, *found


def _kept_masks(m: Machine, metadata: Word, group: int) -> Fours:
    """Masks of the four entries that a metadata word names for a group of both rows."""
    low_0, low_1, high_0, high_1 = words.kept_at(m, metadata, group)
    first, second = ~low_1 & ~low_0, ~high_1 & high_0  # the lower is 0; the higher is 1
    return Fours(first, (~low_1 & low_0) | second, (low_1 & ~low_0) | (high_1 & ~high_0), high_1 & high_0)


def _hidden(m: Machine, gate: Rows, up: Rows, squared: bool) -> Rows:
    def one(c: Word, u: Word) -> Word:
        return m.multiply_f32(m.multiply_f32(c, c) if squared else c, u)

    return _each(m, one, gate, up)


def _gradients(m: Machine, dh: Rows, gate: Rows, up: Rows, squared: bool) -> tuple[Rows, Rows]:
    def of_gate(d: Word, c: Word, u: Word) -> Word:
        if squared:
            return m.multiply_f32(m.multiply_f32(m.multiply_f32(d, m.thread * 0 + _TWO), c), u)
        # c is not negative, and a NaN of it is above zero as far as its bits go.
        return m.multiply_f32(d, u) & m.greater(c, 0)

    def of_up(d: Word, c: Word) -> Word:
        return m.multiply_f32(d, m.multiply_f32(c, c) if squared else c)

    return _each(m, of_gate, dh, gate, up), _each(m, of_up, dh, gate)


_TWO = 0x40000000


def _each(m: Machine, function, *arrays: Rows) -> Rows:
    """A function of f32 on the entries of pairs of bfloat16, rounded once."""
    out: Rows = []
    for rows in zip(*arrays, strict=True):
        out.append([])
        for pairs in zip(*rows, strict=True):
            halves = [function(*(pair << 16 for pair in pairs)), function(*(pair & 0xFFFF0000 for pair in pairs))]
            out[-1].append(m.round_pair(*halves))
    return out
