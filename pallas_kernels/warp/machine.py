"""What one thread of the warp kernels can do: words, and the instructions that every GPU since sm_80 has.

The kernels are written once against this interface. On the GPU its words are values of MLIR (words.py); in tests they
are numpy arrays of one entry a thread, so that addresses, barriers and the order of copies run without a GPU.
"""

import abc
from collections.abc import Callable
from typing import Any

type Word = Any
"""32 bits with the operators of an unsigned integer."""
type Real = Any
"""An f32 with * and +."""
type Pointer = Any
"""A byte of one of the arrays in memory."""
type Condition = Any
"""True or false, by thread."""


class Machine(abc.ABC):
    """One thread of a block. Addresses of shared memory are words that count bytes."""

    thread: Word
    shared: Word
    """Where the block's shared memory begins, a multiple of 128."""

    # Words and conditions

    @abc.abstractmethod
    def constant(self, value: int) -> Word: ...

    @abc.abstractmethod
    def less(self, a: Word, b: Word) -> Condition:
        """a < b, signed."""

    @abc.abstractmethod
    def equal(self, a: Word, b: Word) -> Condition: ...

    @abc.abstractmethod
    def both(self, a: Condition, b: Condition) -> Condition: ...

    @abc.abstractmethod
    def select(self, condition: Condition, a: Any, b: Any) -> Any:
        """a where the condition holds, else b: two words, reals or pointers."""

    def least(self, a: Word, b: Word) -> Word:
        """Signed."""
        return self.select(self.less(a, b), a, b)

    # Control: the same for all threads of a block

    @abc.abstractmethod
    def when(self, condition: Condition, body: Callable[[], None]) -> None: ...

    @abc.abstractmethod
    def loop(self, count: Word, state: list, body: Callable[[Word, list], list]) -> list:
        """body(count - 1, ... body(0, state)); any kinds of values."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """All threads of the block."""

    @abc.abstractmethod
    def warp_barrier(self) -> None: ...

    # From memory to shared memory

    @abc.abstractmethod
    def pointer(self, name: str, *terms: tuple[Word, int]) -> Pointer:
        """The byte of an array that lies the sum of word x factor after its first, in 64 bits."""

    @abc.abstractmethod
    def advance(self, pointer: Pointer, by: int) -> Pointer: ...

    @abc.abstractmethod
    def copy(self, to: Word, to_offset: int, pointer: Pointer, offset: int, index: int, left: Any) -> None:
        """Begin to copy 16 bytes to shared memory, where `left` is None or index < left."""

    @abc.abstractmethod
    def copy_row(self, to: Word, to_offset: int, pointer: Pointer, row: Word, rows: int, row_bytes: int, left: Any):
        """As `copy`, from a row that the pointer's array has `rows` of: zeros where row >= rows, unsigned."""

    @abc.abstractmethod
    def commit(self) -> None:
        """The copies begun since the last call are one group."""

    @abc.abstractmethod
    def wait(self, pending: int) -> None:
        """Until this thread's copies are there, all but those of the last `pending` groups."""

    # From shared memory to registers, and the product

    @abc.abstractmethod
    def load_matrices(self, address: Word, offset: int, *, transposed: bool) -> list[Word]:
        """`ldmatrix.x4`: four 8 x 8 matrices, row l % 8 of matrix l / 8 at lane l's address.

        Lane 4 g + t gets entries 2 t and 2 t + 1 of row g of each matrix, or of column g if `transposed`.
        """

    @abc.abstractmethod
    def load_shared_word(self, address: Word, offset: int) -> Word: ...

    @abc.abstractmethod
    def multiply_sparse(self, sums: list[Real], a: list[Word], b: list[Word], word: Word, selector: int) -> list[Real]:
        """`mma.sp.m16n8k32`: sums + a b, with a [16, 32] 2:4 and b [32, 8] of 16-bit pairs, sums [16, 8] in f32.

        Lane 4 g + t holds of stored a [16, 16] rows g, g + 8, g, g + 8 at columns 2 t (twice) and 2 t + 8 (twice); of
        b column g at rows 8 r + 2 t of register r; of sums row g, then g + 8, at columns 2 t and 2 t + 1. The metadata
        are the words of lanes t = 2 selector and 2 selector + 1, as in metadata.py.
        """

    # The result

    @abc.abstractmethod
    def zero(self) -> Real: ...

    @abc.abstractmethod
    def maximum(self, a: Real, b: float) -> Real:
        """NaN stays NaN."""

    @abc.abstractmethod
    def widen(self, pair: Word) -> tuple[Real, Real]:
        """Two 16-bit values of the output's type as f32."""

    @abc.abstractmethod
    def round_pair(self, low: Real, high: Real) -> Word:
        """Two f32 as a pair of the output's type, rounded to nearest even."""

    @abc.abstractmethod
    def transpose(self, word: Word) -> Word:
        """`movmatrix`: an 8 x 8 matrix of 16 bits, held as `load_matrices` gives it, transposed."""

    @abc.abstractmethod
    def load_reals(self, pointer: Pointer, offset: int, count: int, condition: Any) -> list[Real]:
        """One f32 from memory, or two neighbours; zeros where the condition does not hold."""

    @abc.abstractmethod
    def load_word(self, pointer: Pointer, offset: int, condition: Any) -> Word:
        """From memory; zero where there is a condition that does not hold."""

    @abc.abstractmethod
    def store_reals(self, pointer: Pointer, offset: int, reals: list[Real], condition: Condition) -> None: ...

    @abc.abstractmethod
    def store_shared_word(self, address: Word, offset: int, word: Word) -> None: ...

    @abc.abstractmethod
    def load_shared_piece(self, address: Word, offset: int) -> list[Word]:
        """16 bytes."""

    @abc.abstractmethod
    def store_piece(self, pointer: Pointer, offset: int, words: list[Word], condition: Condition) -> None:
        """16 bytes to memory."""
