"""Choosing and packing two of four in 32-bit words that hold two 16-bit values: what one thread of the kernels does.

Two fours are worked on at once: word A holds their first entries, one in each half, B, C and D the others. One
subtraction compares in both halves, and the positions of both come out as the metadata word wants them, since the
halves of that word are two rows. Code here sees a `Machine`: on the GPU its words are MLIR values (hopper.py), in tests
arrays of one word a thread, so that every kernel runs bit for bit without a GPU.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

type Word = Any
"""32 bits with the operators of an unsigned integer."""

_SIGNS = 0x80008000
_MAGNITUDES = 0x7FFF7FFF
_LOW_HALVES, _HIGH_HALVES = 0x5410, 0x7632  # selectors of prmt: the halves of two words
_SPREAD_SIGNS = 0xBB99  # ... and the sign bit of each half over all of it
_F32_SIGN, _F32_MAGNITUDE, _F32_INF = 0x80000000, 0x7FFFFFFF, 0x7F800000


class Machine(abc.ABC):
    """One thread of a block of 128, its memory and the instructions that are no plain integer arithmetic.

    Addresses count pieces of 16 bytes, or words for `load_word` and `store_word`.
    """

    block: Word
    thread: Word

    @abc.abstractmethod
    def load(self, name: str, piece: Word) -> list[Word]: ...

    @abc.abstractmethod
    def store(self, name: str, piece: Word, words: list[Word]) -> None: ...

    @abc.abstractmethod
    def load_half(self, name: str, half: Word) -> list[Word]:
        """Two words; addresses count halves of pieces."""

    @abc.abstractmethod
    def store_half(self, name: str, half: Word, words: list[Word]) -> None: ...

    @abc.abstractmethod
    def load_word(self, name: str, index: Word) -> Word: ...

    @abc.abstractmethod
    def store_word(self, name: str, index: Word, word: Word) -> None: ...

    @abc.abstractmethod
    def store_shared(self, piece: Word, words: list[Word]) -> None: ...

    @abc.abstractmethod
    def load_shared(self, piece: Word) -> list[Word]: ...

    @abc.abstractmethod
    def barrier(self) -> None: ...

    @abc.abstractmethod
    def load_transposed(self, piece: Word) -> list[Word]:
        """`ldmatrix.x4.trans`: four 8 x 8 matrices, row l % 8 of matrix l / 8 at lane l's piece.

        Thread (g, t) of a warp, lane 4 g + t, gets column g of rows 2 t and 2 t + 1 of each matrix.
        """

    @abc.abstractmethod
    def permute(self, first: Word, second: Word, selector: int) -> Word:
        """`prmt`: the bytes of the result by nibbles of the selector; 8 added to a nibble spreads its byte's sign."""

    @abc.abstractmethod
    def relu(self, pair: Word) -> Word:
        """max(x, 0) in both halves; NaN stays NaN."""

    @abc.abstractmethod
    def multiply(self, pair: Word, other: Word) -> Word: ...

    @abc.abstractmethod
    def add(self, pair: Word, other: Word) -> Word: ...

    @abc.abstractmethod
    def warp_sum(self, word: Word) -> Word: ...

    @abc.abstractmethod
    def minimum(self, a: Word, b: Word) -> Word: ...

    @abc.abstractmethod
    def maximum(self, a: Word, b: Word) -> Word: ...

    @abc.abstractmethod
    def greater(self, a: Word, b: Word) -> Word:
        """All bits set where a > b, unsigned, else none."""

    @abc.abstractmethod
    def subtract_f32(self, a: Word, b: Word) -> Word: ...

    @abc.abstractmethod
    def multiply_f32(self, a: Word, b: Word) -> Word: ...

    @abc.abstractmethod
    def round_pair(self, low: Word, high: Word) -> Word:
        """Two f32 as a pair of 16-bit values, rounded to nearest even."""

    @abc.abstractmethod
    def narrow(self, four: list[Word]) -> Word:
        """Four f32 as e4m3, the first in the lowest byte: rounded to nearest even, saturated; NaN stays NaN."""

    @abc.abstractmethod
    def widen8(self, word: Word) -> list[Word]:
        """The inverse of `narrow`, exact."""

    @abc.abstractmethod
    def root(self, word: Word) -> Word:
        """The square root of an f32, to within 2^-22 of itself."""

    @abc.abstractmethod
    def maximum_pair(self, pair: Word, other: Word) -> Word:
        """The larger of both halves, as unsigned integers of 16 bits."""

    @abc.abstractmethod
    def warp_max(self, word: Word) -> Word: ...

    @abc.abstractmethod
    def exchange(self, word: Word) -> Word:
        """The word of the lane whose number differs in the last bit."""

    @abc.abstractmethod
    def loop(self, count: int, initial: list[Word], body: Callable[[Word, list[Word]], list[Word]]) -> list[Word]:
        """body(count - 1, ... body(0, initial)): a loop in the program, not unrolled."""


class Fours(NamedTuple):
    """Two fours: their first entries in the halves of `a`, and so on."""

    a: Word
    b: Word
    c: Word
    d: Word


def fours(m: Machine, first: list[Word], second: list[Word]) -> Fours:
    """Two fours, each given as two words (a, b) and (c, d)."""
    (ab, cd), (other_ab, other_cd) = first, second
    return Fours(
        m.permute(ab, other_ab, _LOW_HALVES),
        m.permute(ab, other_ab, _HIGH_HALVES),
        m.permute(cd, other_cd, _LOW_HALVES),
        m.permute(cd, other_cd, _HIGH_HALVES),
    )


def separate(m: Machine, low: Word, high: Word) -> tuple[Word, Word]:
    """The words (low, high) of the first four, and of the second."""
    return m.permute(low, high, _LOW_HALVES), m.permute(low, high, _HIGH_HALVES)


class Kept(NamedTuple):
    """Which of two fours are kept: a mask for each entry, and the positions in bits 12..15 and 28..31."""

    masks: Fours
    positions: Word


def keep_two(m: Machine, x: Fours) -> Kept:
    """The two largest magnitudes of each four, ties to the lower index, as `reference.select24`.

    (0x8000 + p) - q keeps its top bit exactly where p >= q, for magnitudes p and q of 15 bits, and never borrows from
    the other half. An entry is kept where it comes before two of the three others. Only top bits mean anything until
    they are spread.
    """
    top = [entry | _SIGNS for entry in x[:3]]
    low = [entry & _MAGNITUDES for entry in x]
    ab, ac, ad = (top[0] - low[i] for i in (1, 2, 3))
    bc, bd, cd = top[1] - low[2], top[1] - low[3], top[2] - low[3]
    a, b = _majority(ab, ac, ad), _majority(~ab, bc, bd)
    c, d = _majority(~ac, ~bc, cd), _majority(~ad, ~bd, ~cd)
    lower = [~a & b & _SIGNS, ~a & ~b & _SIGNS]  # 0, 1 or 2 in two bits
    higher = [(d | ~c) & _SIGNS, (d | c) & _SIGNS]  # 1, 2 or 3
    positions = lower[0] >> 3 | lower[1] >> 2 | higher[0] >> 1 | higher[1]
    return Kept(Fours(*(m.permute(word, word, _SPREAD_SIGNS) for word in (a, b, c, d))), positions)


def kept_at(m: Machine, word: Word, group: int) -> tuple[Word, Word, Word, Word]:
    """Masks for the bits of both positions that a metadata word holds for a group: lower (0, 1), higher (0, 1)."""
    spread = []
    for bit in range(4):
        aligned = word << (15 - 4 * group - bit)
        spread.append(m.permute(aligned, aligned, _SPREAD_SIGNS))
    return spread[0], spread[1], spread[2], spread[3]


def choose(mask: Word, if_set: Word, otherwise: Word) -> Word:
    return if_set & mask | otherwise & ~mask


class PackedRows(NamedTuple):
    """16 columns of two rows, packed: four words of stored values for each, and the metadata word of both."""

    first: list[Word]
    second: list[Word]
    metadata: Word
    factors: tuple[list[Word], list[Word]]
    """Of each stored value that of its column, where columns have any."""


def pack_rows(
    m: Machine, first: list[Word], second: list[Word], factors: list[Word] | None = None
) -> tuple[PackedRows, list[Word], list[Word]]:
    """Two of each four of 8 words of two rows; and the rows again with +0.0 where nothing is kept.

    factors: 8 words of what is to be picked beside them, of each column; the same for both rows.
    """
    packed: tuple[list[Word], list[Word]] = ([], [])
    pruned: tuple[list[Word], list[Word]] = ([], [])
    picked: tuple[list[Word], list[Word]] = ([], [])
    metadata: Word = None
    for group in range(4):
        span = slice(2 * group, 2 * group + 2)
        x = fours(m, first[span], second[span])
        masks, positions = keep_two(m, x)
        _append(m, packed, _kept_of(masks, x))
        if factors is not None:
            _append(m, picked, _kept_of(masks, fours(m, factors[span], factors[span])))
        kept = [entry & mask for entry, mask in zip(x, masks, strict=True)]
        for pair in (kept[:2], kept[2:]):
            _append(m, pruned, pair)
        shifted = positions >> (12 - 4 * group) if group < 3 else positions
        metadata = shifted if metadata is None else metadata | shifted
    return PackedRows(*packed, metadata, picked), *pruned


def _append(m: Machine, rows: tuple[list[Word], list[Word]], pair: Any) -> None:
    """A word (low, high) to each of two rows."""
    for row, word in zip(rows, separate(m, *pair), strict=True):
        row.append(word)


def _kept_of(masks: Fours, x: Fours) -> tuple[Word, Word]:
    return choose(masks.a, x.a, choose(masks.b, x.b, x.c)), choose(masks.d, x.d, choose(masks.c, x.c, x.b))


def take_rows(m: Machine, rows: list[list[Word]], metadata: Word) -> tuple[list[Word], list[Word]]:
    """The entries of two rows at the positions of a metadata word: four words for each row."""
    first, second = rows
    taken: tuple[list[Word], list[Word]] = ([], [])
    for group in range(4):
        span = slice(2 * group, 2 * group + 2)
        x = fours(m, first[span], second[span])
        lower_0, lower_1, higher_0, higher_1 = kept_at(m, metadata, group)
        low = choose(lower_1, x.c, choose(lower_0, x.b, x.a))
        high = choose(higher_1, choose(higher_0, x.d, x.c), x.b)
        _append(m, taken, (low, high))
    return taken


def to_eight_bits(m: Machine, word: Word, lane: Word) -> Word:
    """A metadata word of both rows' 16 columns -> one of 32 columns of one row, or the other way.

    Of two lanes that are neighbours the even one has the first row afterwards. 16 bits change places.
    """
    odd = (lane & 1) * 0xFFFFFFFF
    received = m.exchange(choose(odd, word & 0xFFFF, word >> 16))
    return choose(odd, received | word & 0xFFFF0000, word & 0xFFFF | received << 16)


def widen(pair: Word) -> list[Word]:
    """Two bf16 as f32."""
    return [pair << 16, pair & 0xFFFF0000]


def widen_all(pairs: list[Word]) -> list[Word]:
    return [f32 for pair in pairs for f32 in widen(pair)]


def narrow_all(m: Machine, values: list[Word]) -> list[Word]:
    """f32 as e4m3, four in a word."""
    return [m.narrow(values[i : i + 4]) for i in range(0, len(values), 4)]


def roots(m: Machine, words: list[Word]) -> list[Word]:
    """The roots of numbers in e4m3, rounded to bf16, as f32."""
    values = [m.root(value) for word in words for value in m.widen8(word)]
    return widen_all([m.round_pair(values[i], values[i + 1]) for i in range(0, len(values), 2)])


def positives(pairs: list[Word], infinity: int) -> Word:
    """How many of some values, none of them negative, are above zero and no NaN; at most 65,535 in each half."""
    above_zero, not_nan = 0x7FFF * 0x00010001, (0x7FFF - infinity) * 0x00010001
    counts: Word = None
    for pair in pairs:
        flags = (pair + above_zero) & ~(pair + not_nan) & _SIGNS
        counts = flags >> 15 if counts is None else counts + (flags >> 15)
    return (counts & 0xFFFF) + (counts >> 16)


def thresholded(m: Machine, four: list[Word], beta: Word) -> list[Word]:
    """round(beta S(w)) of four f32 as two pairs, S as `reference.soft_threshold`.

    A NaN is above every threshold. Of three or four NaN in one group all stay here, and the selection that follows
    keeps two: NaN like in the reference, by index and not by payload.
    """
    keys = [w & _F32_MAGNITUDE for w in four]
    low = m.maximum(m.minimum(keys[0], keys[1]), m.minimum(keys[2], keys[3]))
    high = m.minimum(m.maximum(keys[0], keys[1]), m.maximum(keys[2], keys[3]))
    t = m.minimum(low, high)
    limit = m.minimum(t, _F32_INF)
    out = []
    for w, key in zip(four, keys, strict=True):
        shrunk = m.subtract_f32(w, t | (w & _F32_SIGN))
        out.append(m.multiply_f32(shrunk & m.greater(key, limit), beta))
    return [m.round_pair(out[0], out[1]), m.round_pair(out[2], out[3])]


def _majority(x: Word, y: Word, z: Word) -> Word:
    return x & y | z & (x | y)
