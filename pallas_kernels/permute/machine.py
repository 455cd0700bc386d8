"""What the permutation's kernels need of a thread beyond the packing's `Machine`: its warp, and one dense product."""

import abc

from pallas_kernels.pack import words
from pallas_kernels.pack.words import Word

WARPS = 4


class Machine(words.Machine):
    """One thread of a block of 128. Shared memory is an array named "shared" of words."""

    @abc.abstractmethod
    def store_word_if(self, name: str, index: Word, word: Word, mask: Word) -> None:
        """Store where the mask has any bit; elsewhere the index may be anything."""

    @abc.abstractmethod
    def equal_lanes(self, word: Word) -> Word:
        """`match.any`: which lanes of the warp hold the same word, this one among them."""

    @abc.abstractmethod
    def count_ones(self, word: Word) -> Word: ...

    @abc.abstractmethod
    def widen(self, pair: Word) -> tuple[Word, Word]:
        """Two 16-bit values as f32."""

    @abc.abstractmethod
    def add_f32(self, a: Word, b: Word) -> Word: ...

    @abc.abstractmethod
    def divide_f32(self, a: Word, b: Word) -> Word: ...

    @abc.abstractmethod
    def root_f32(self, a: Word) -> Word: ...

    @abc.abstractmethod
    def mma(self, a: list[Word], b: list[Word], sums: list[Word]) -> list[Word]:
        """`mma.m16n8k16`: sums + a b, with a [16, 16] and b [16, 8] of 16-bit pairs, sums [16, 8] in f32.

        Lane 4 g + t holds of a rows g, g + 8, g, g + 8 at k = 2 t (twice) and 2 t + 8 (twice), of b column g at the
        same two k, of sums row g and then g + 8 at columns 2 t and 2 t + 1.
        """


def prefix_mask(lane: Word) -> Word:
    """The bits of the lanes below this one."""
    return ((lane * 0 + 1) << lane) - 1


def constant(m: Machine, value: int) -> Word:
    return m.thread * 0 + value
