"""What one thread of 128 does in each kernel of the permutation, against a `Machine` (machine.py).

Pieces are 16 bytes of a row. Where the number of pieces or copies is no multiple of a block's, the threads beyond the
end repeat the last one: they read and write what its own thread does.
"""

import dataclasses

from pallas_kernels.pack.words import Word, choose
from pallas_kernels.permute.machine import WARPS, Machine, constant, prefix_mask

THREADS = 32 * WARPS
_GATHER_PIECES = 8
"""Pieces that a thread has in flight."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """A copy of rows: `pieces` of 16 bytes a row; `count` rows are written, from `sources` of `top_k` copies each."""

    count: int
    pieces: int
    sources: int
    top_k: int = 1
    itemsize: int = 2
    weighted: bool = False
    """Each copy of a row is multiplied by an f32 of "weights" on its way."""

    @property
    def unroll(self) -> int:
        """Pieces that a thread writes."""
        return max(1, min(_GATHER_PIECES // self.top_k, -(-self.count * self.pieces // THREADS)))

    @property
    def blocks(self) -> int:
        return -(-self.count * self.pieces // (self.unroll * THREADS))

    def mine(self, m: Machine) -> list[Word]:
        """The pieces of this thread, those of neighbours beside each other."""
        first = m.block * (self.unroll * THREADS) + m.thread
        last = self.count * self.pieces - 1
        return [m.minimum(first + i * THREADS, last) for i in range(self.unroll)]


def gather(m: Machine, rows: Rows) -> None:
    """rows[r] = tokens[token_of_row[r]], times weights[r], zero where that is the number of tokens."""
    mine = rows.mine(m)
    tokens = [m.load_word("token_of_row", piece // rows.pieces) for piece in mine]
    weights = [m.load_word("weights", piece // rows.pieces) for piece in mine] if rows.weighted else []
    found = []
    for piece, token in zip(mine, tokens, strict=True):
        # A padding row reads the last token and keeps no bit of it: NaN would survive a product with zero.
        source = m.minimum(token, rows.sources - 1) * rows.pieces + piece % rows.pieces
        found.append(m.load("tokens", source))
    if rows.weighted:
        scaled = (_scaled(m, words, weight, rows.itemsize) for words, weight in zip(found, weights, strict=True))
        found = [_rounded(m, words, rows.itemsize) for words in scaled]
    for piece, token, words in zip(mine, tokens, found, strict=True):
        real = m.greater(constant(m, rows.sources), token)
        m.store("rows", piece, [word & real for word in words])


def add_up(m: Machine, rows: Rows) -> None:
    """tokens[t] = the sum of rows[row_of_slot[t, :]] from left to right in f32, rounded once; one copy is copied.

    Weighted, each is multiplied by weights[t, :] first. A slot beyond the rows reads the last one.
    """
    mine = rows.mine(m)
    copies = [[piece // rows.pieces * rows.top_k + j for j in range(rows.top_k)] for piece in mine]
    slots = [[m.load_word("row_of_slot", copy) for copy in of_piece] for of_piece in copies]
    weights = [[m.load_word("weights", copy) for copy in of_piece] for of_piece in copies] if rows.weighted else None
    slots = [[m.minimum(row, rows.sources - 1) for row in of_piece] for of_piece in slots]
    found = [
        [m.load("rows", row * rows.pieces + piece % rows.pieces) for row in of_piece]
        for piece, of_piece in zip(mine, slots, strict=True)
    ]
    for i, piece in enumerate(mine):
        if weights is None and rows.top_k == 1:
            m.store("tokens", piece, found[i][0])
            continue
        if weights is None:
            terms = [_widened(m, words, rows.itemsize) for words in found[i]]
        else:
            terms = [_scaled(m, *of_copy, rows.itemsize) for of_copy in zip(found[i], weights[i], strict=True)]
        m.store("tokens", piece, _rounded(m, _sum(m, terms), rows.itemsize))


def _sum(m: Machine, terms: list[list[Word]]) -> list[Word]:
    """Of f32, from left to right."""
    total = terms[0]
    for words in terms[1:]:
        total = [m.add_f32(a, b) for a, b in zip(total, words, strict=True)]
    return total


def _scaled(m: Machine, words: list[Word], weight: Word, itemsize: int) -> list[Word]:
    """A piece as f32, times a weight."""
    return [m.multiply_f32(f32, weight) for f32 in _widened(m, words, itemsize)]


def _widened(m: Machine, words: list[Word], itemsize: int) -> list[Word]:
    return words if itemsize == 4 else [f32 for pair in words for f32 in m.widen(pair)]


def _rounded(m: Machine, f32: list[Word], itemsize: int) -> list[Word]:
    return f32 if itemsize == 4 else [m.round_pair(f32[i], f32[i + 1]) for i in range(0, len(f32), 2)]


@dataclasses.dataclass(frozen=True)
class Sort:
    """A stable counting sort of `tokens` * `top_k` copies into `groups` groups of rows padded to `align`.

    Copies lie token after token. A block takes a chunk of `steps` x 128 of them.
    """

    tokens: int
    top_k: int
    groups: int
    align: int
    interleaved: bool
    rows: int

    @property
    def copies(self) -> int:
        return self.tokens * self.top_k

    @property
    def steps(self) -> int:
        return max(1, min(8, -(-self.copies // (THREADS * THREADS))))

    @property
    def chunks(self) -> int:
        return -(-self.copies // (THREADS * self.steps))

    @property
    def blocks(self) -> int:
        return self.chunks

    @property
    def columns(self) -> int:
        """Of the tables in shared memory: the groups, and one for copies beyond the end."""
        return self.groups + 1

    @property
    def padded_groups(self) -> int:
        """The next power of two."""
        return 1 << (self.groups - 1).bit_length()

    @property
    def table_words(self) -> int:
        return WARPS * self.steps * self.columns

    @property
    def shared_words(self) -> int:
        return self.table_words + 2 * THREADS + 3 * self.padded_groups


MAX_GROUPS = THREADS


def count(m: Machine, sort: Sort) -> None:
    """counts[chunk, g]: how many copies of a chunk belong to group g."""
    table = _Table(m, sort)
    m.barrier()
    table.fill()
    m.barrier()
    group = m.minimum(m.thread, sort.groups - 1)
    total = constant(m, 0)
    for value in table.column(group):
        total = total + value
    m.store_word("counts", m.block * sort.groups + group, total)


def place(m: Machine, sort: Sort) -> None:
    """token_of_row, row_of_slot and group_sizes, from the counts of all chunks and the groups of this block's copies.

    Every block adds up the counts for itself: a few kilobytes from the L2 cache cost less than one more launch.
    """
    table = _Table(m, sort)
    padded, partial, sizes = sort.padded_groups, sort.table_words, sort.table_words + 2 * THREADS
    starts, totals = sizes + padded, sizes + 2 * padded
    total, before = _add_counts(m, sort)
    m.store_word("shared", m.thread + partial, total)
    m.store_word("shared", m.thread + (partial + THREADS), before)
    m.barrier()
    copies = table.fill()
    # A thread now stands for a group, several threads for the same one: they store the same words.
    group = m.thread & (padded - 1)
    total, before = constant(m, 0), constant(m, 0)
    for slice_ in range(0, THREADS, padded):
        total = total + m.load_word("shared", group + (partial + slice_))
        before = before + m.load_word("shared", group + (partial + THREADS + slice_))
    size = (total + (sort.align - 1)) // sort.align * sort.align
    m.store_word("shared", group + sizes, size)
    m.store_word("shared", group + totals, total)
    m.store_word_if("group_sizes", group, size, m.greater(sort.groups, group))
    m.barrier()
    start, end = constant(m, 0), constant(m, 0)
    for other in range(sort.groups):
        size = m.load_word("shared", constant(m, sizes + other))
        start = start + (size & m.greater(group, other))
        end = end + size
    m.store_word("shared", group + starts, start)
    in_chunk = table.column(m.minimum(group, sort.groups - 1))
    m.barrier()
    table.set_column(group, before, in_chunk)
    m.barrier()

    def row(group: Word, rank: Word) -> Word:
        if sort.interleaved:
            quarter = m.maximum(m.load_word("shared", group + sizes) // 4, 1)
            rank = rank % quarter * 4 + rank // quarter
        return m.load_word("shared", group + starts) + rank

    for step, (copy, group, rank) in enumerate(copies):
        real, group = m.greater(sort.copies, copy), m.minimum(group, sort.groups - 1)
        place_of_copy = row(group, rank + table.load(step, group))
        m.store_word_if("row_of_slot", copy, place_of_copy, real)
        m.store_word_if("token_of_row", place_of_copy, copy // sort.top_k, real)
    everyone = sort.chunks * THREADS
    for first in range(0, sort.groups * sort.align, everyone):
        index = m.block * THREADS + m.thread + first
        group = m.minimum(index // sort.align, sort.groups - 1)
        rank = m.load_word("shared", group + totals) + index % sort.align
        padding = m.greater(m.load_word("shared", group + sizes), rank) & m.greater(sort.groups * sort.align, index)
        m.store_word_if("token_of_row", row(group, rank), constant(m, sort.tokens), padding)
        beyond = end + index
        m.store_word_if("token_of_row", beyond, constant(m, sort.tokens), m.greater(sort.rows, beyond))


class _Table:
    """Shared memory [4 * steps, groups + 1]: how many copies of each group 32 copies in a row hold; zeros at first."""

    def __init__(self, m: Machine, sort: Sort):
        self.m, self.sort = m, sort
        self.warp, self.lane = m.thread >> 5, m.thread & 31
        for first in range(0, sort.table_words, THREADS):
            m.store_word("shared", m.minimum(m.thread + first, sort.table_words - 1), constant(m, 0))

    def fill(self) -> list[tuple[Word, Word, Word]]:
        """For each step this thread's copy, its group, and how many of that group lie before it in its 32."""
        m, sort, found = self.m, self.sort, []
        for step in range(sort.steps):
            copy = m.block * (THREADS * sort.steps) + m.thread + step * THREADS
            group = m.load_word("group", m.minimum(copy, sort.copies - 1))
            group = choose(m.greater(sort.copies, copy), m.minimum(group, sort.groups), constant(m, sort.groups))
            equal = m.equal_lanes(group)
            m.store_word("shared", self._at(self.warp + step * WARPS, group), m.count_ones(equal))
            found.append((copy, group, m.count_ones(equal & prefix_mask(self.lane))))
        return found

    def load(self, step: int, group: Word) -> Word:
        return self.m.load_word("shared", self._at(self.warp + step * WARPS, group))

    def column(self, group: Word) -> list[Word]:
        rows = range(WARPS * self.sort.steps)
        return [self.m.load_word("shared", group + row * self.sort.columns) for row in rows]

    def set_column(self, group: Word, first: Word, values: list[Word]) -> None:
        """first, first + values[0], first + values[0] + values[1], ...; groups beyond the last are left alone."""
        inside = self.m.greater(self.sort.groups, group)
        for row, value in enumerate(values):
            self.m.store_word_if("shared", group + row * self.sort.columns, first, inside)
            first = first + value

    def _at(self, row: Word, group: Word) -> Word:
        return row * self.sort.columns + group


_CHUNKS_AT_ONCE = 16


def _add_counts(m: Machine, sort: Sort) -> tuple[Word, Word]:
    """This thread's share of the copies of its group in all chunks, and in those before this block's."""
    slices = THREADS // sort.padded_groups
    group, slice_ = m.thread & (sort.padded_groups - 1), m.thread // sort.padded_groups

    def body(i: Word, sums: list[Word]) -> list[Word]:
        chunks = [slice_ + (i * _CHUNKS_AT_ONCE + j) * slices for j in range(_CHUNKS_AT_ONCE)]
        column = m.minimum(group, sort.groups - 1)
        loaded = [m.load_word("counts", m.minimum(c, sort.chunks - 1) * sort.groups + column) for c in chunks]
        total, before = sums
        for chunk, value in zip(chunks, loaded, strict=True):
            value = value & m.greater(sort.chunks, chunk) & m.greater(sort.groups, group)
            total, before = total + value, before + (value & m.greater(m.block, chunk))
        return [total, before]

    rounds = -(-sort.chunks // (slices * _CHUNKS_AT_ONCE))
    total, before = m.loop(rounds, [constant(m, 0), constant(m, 0)], body)
    return total, before


@dataclasses.dataclass(frozen=True)
class Choice:
    """The `top_k` best of `experts` for each of `tokens`; x and the means are rows of d_model 16-bit values."""

    tokens: int
    d_model: int
    experts: int
    top_k: int
    cosine: bool

    @property
    def padded_experts(self) -> int:
        return -(-self.experts // 8) * 8

    @property
    def blocks(self) -> int:
        return -(-self.tokens // TOKENS_OF_BLOCK)

    @property
    def stride(self) -> int:
        """Words of shared memory for a token and a warp: its products, its squares by lane, odd in all."""
        return self.padded_experts + 5

    @property
    def shared_words(self) -> int:
        return WARPS * TOKENS_OF_BLOCK * self.stride


TOKENS_OF_BLOCK = 32
MAX_EXPERTS = 32
PARTS = 3
"""16-bit parts that a mean is given in: 24 bits, as many as f32 has."""
EPSILON_BITS = 0x2B8CBCCC  # 1e-12 in f32


def choose_experts(m: Machine, c: Choice) -> None:
    """chosen[t] = the experts with the largest <x_t, mean_e> (over |x_t|, if cosine) + bias_e, ascending.

    Each warp takes a quarter of d_model for 32 tokens, 64 (or 32) features at a time. The order of the contraction is
    free, so a lane gives the tensor core the 8 features that one load brings.
    """
    lane, warp = m.thread & 31, m.thread >> 5
    g, t = lane >> 2, lane & 3
    pieces = c.d_model // 8
    in_warp = pieces // WARPS
    at_once = 2 if in_warp % 8 == 0 else 1
    tiles = c.padded_experts // 8
    first_token = m.block * TOKENS_OF_BLOCK
    rows = [m.minimum(first_token + 8 * i + g, c.tokens - 1) * pieces for i in range(4)]
    columns = [[(g + (part * tiles + tile) * 8) * pieces for tile in range(tiles)] for part in range(PARTS)]

    def body(i: Word, state: list[Word]) -> list[Word]:
        at = [warp * in_warp + (i * at_once + j) * 4 + t for j in range(at_once)]
        x = [[m.load("x", row + piece) for piece in at] for row in rows]
        means = [[[m.load("means", column + piece) for piece in at] for column in part] for part in columns]
        squares, sums = state[:4], state[4:]
        for row in range(4):
            for pair in (pair for words in x[row] for pair in words):
                for value in m.widen(pair):
                    squares[row] = m.add_f32(squares[row], m.multiply_f32(value, value))
        for j in range(at_once):
            for half in (slice(0, 2), slice(2, 4)):
                for pair in range(2):
                    a = [
                        word
                        for words in zip(x[2 * pair][j][half], x[2 * pair + 1][j][half], strict=True)
                        for word in words
                    ]
                    for part in reversed(range(PARTS)):  # the smallest first
                        for tile in range(tiles):
                            span = slice((pair * tiles + tile) * 4, (pair * tiles + tile) * 4 + 4)
                            sums[span] = m.mma(a, means[part][tile][j][half], sums[span])
        return squares + sums

    state = m.loop(in_warp // (4 * at_once), [constant(m, 0) for _ in range(4 + 8 * tiles)], body)
    squares, sums = state[:4], state[4:]
    for row in range(4):
        place = (warp * TOKENS_OF_BLOCK + 8 * row + g) * c.stride
        for tile in range(tiles):
            for i in range(2):
                word = sums[(row // 2 * tiles + tile) * 4 + row % 2 * 2 + i]
                m.store_word("shared", place + t * 2 + (8 * tile + i), word)
        m.store_word("shared", place + t + c.padded_experts, squares[row])
    m.barrier()
    # Four threads a token from here on; they store the same words.
    token = m.thread >> 2
    places = [(token + w * TOKENS_OF_BLOCK) * c.stride for w in range(WARPS)]

    def total(column: int) -> Word:
        return _sum_f32(m, [m.load_word("shared", place + column) for place in places])

    scores = [total(expert) for expert in range(c.experts)]
    if c.cosine:
        norm = m.root_f32(_sum_f32(m, [total(c.padded_experts + i) for i in range(4)]))
        norm = m.add_f32(norm, constant(m, EPSILON_BITS))
        scores = [m.divide_f32(score, norm) for score in scores]
    biases = [m.load_word("bias", constant(m, expert)) for expert in range(c.experts)]
    keys = [_key(m, m.add_f32(*pair)) for pair in zip(scores, biases, strict=True)]
    found, chosen = constant(m, 0), []
    for _ in range(c.top_k):
        best, index = keys[0], constant(m, 0)
        for expert in range(1, c.experts):
            better = m.greater(keys[expert], best)  # not where equal: the lower expert stays
            best, index = choose(better, keys[expert], best), choose(better, constant(m, expert), index)
        keys = [key & (m.greater(index, e) | m.greater(constant(m, e), index)) for e, key in enumerate(keys)]
        chosen.append(index)
        found = found | (constant(m, 1) << index)
    first = m.minimum(first_token + token, c.tokens - 1) * c.top_k
    for index in chosen:
        m.store_word("chosen", first + m.count_ones(found & prefix_mask(index)), index)


def _sum_f32(m: Machine, words: list[Word]) -> Word:
    total = words[0]
    for word in words[1:]:
        total = m.add_f32(total, word)
    return total


def _key(m: Machine, f32: Word) -> Word:
    """An unsigned number ordered like the f32, above zero; all NaN alike and the largest."""
    negative = (f32 >> 31) * 0xFFFFFFFF
    return (f32 ^ (negative | 0x80000000)) | m.greater(f32 & 0x7FFFFFFF, 0x7F800000)
