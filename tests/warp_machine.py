"""The warp kernels' `Machine` on numpy: all threads of a block in step, on a model of the instructions, without a GPU.

Copies land as late as the program allows, or at once. Two rules stand for what threads in step cannot show: a copy is
seen after a barrier that follows its thread's wait, and may go where others have read only after a barrier too.
"""

import collections
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from pallas_kernels.warp.machine import Machine

_TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
_GAP = 1 << 12


class NumpyMachine(Machine):
    """A word is uint32 [threads], a real f32 [threads], a pointer int64 [threads] into one space of all arrays."""

    def __init__(self, threads: int, shared_bytes: int, arrays: dict[str, np.ndarray], dtype, out_dtype, *, late: bool):
        self._types, self._late = (_TYPES[dtype], _TYPES[out_dtype]), late
        self._base, size = {}, _GAP
        for name, array in arrays.items():
            self._base[name] = size
            size += -(-array.nbytes // 16) * 16 + _GAP
        self._memory, self._exists = np.zeros(size, np.uint8), np.zeros(size, bool)
        self._arrays = arrays
        for name, array in arrays.items():
            span = slice(self._base[name], self._base[name] + array.nbytes)
            self._memory[span], self._exists[span] = np.ascontiguousarray(array).reshape(-1).view(np.uint8), True
        self._bytes = np.full(shared_bytes, 0xEE, np.uint8)
        self._epoch, self._read_at = 0, np.full(shared_bytes // 16, -1)
        self._copies: list = []
        self._groups: list = []
        self._arrived: list = []
        self.conflicts: collections.Counter = collections.Counter()
        self.thread = np.arange(threads, dtype=np.uint32)
        self.shared = self.constant(0)

    def array(self, name: str) -> np.ndarray:
        """An array as it is in memory."""
        like = self._arrays[name]
        return self._memory[self._base[name] :][: like.nbytes].view(like.dtype).reshape(like.shape)

    # Words and conditions

    def constant(self, value):
        return np.full(self.thread.shape, value, np.uint32)

    def less(self, a, b):
        return a.view(np.int32) < np.asarray(b, np.uint32).view(np.int32)

    def equal(self, a, b):
        return a == b

    def both(self, a, b):
        return a & b

    def select(self, condition, a, b):
        return np.where(condition, a, b)

    # Control

    def when(self, condition, body):
        if _same(condition):
            body()

    def loop(self, count, state, body):
        for i in range(int(_same(count))):
            state = body(self.constant(i), list(state))
        return state

    def barrier(self):
        self._epoch += 1
        self._land(self._arrived)
        self._arrived = []

    def warp_barrier(self):
        pass

    # From memory to shared memory

    def pointer(self, name, *terms):
        address = np.full(self.thread.shape, self._base[name], np.int64)
        for word, factor in terms:
            address = address + word.astype(np.int64) * factor
        return address

    def advance(self, pointer, by):
        return pointer + by

    def copy(self, to, to_offset, pointer, offset, index, left):
        on = np.ones(len(to), bool) if left is None else index < left.view(np.int32)
        self._begin(to + to_offset, on, lambda: self._load((pointer + offset)[on], 16))

    def copy_row(self, to, to_offset, pointer, row, rows, row_bytes, left):
        on = np.ones(len(to), bool) if left is None else left.view(np.int32) > 0

        def read():
            pieces, real = np.zeros((int(on.sum()), 16), np.uint8), row[on] < rows
            pieces[real] = self._load((pointer[on] + row[on].astype(np.int64) * row_bytes)[real], 16)
            return pieces

        self._begin(to + to_offset, on, read)

    def _begin(self, to, on, read):
        self._count_conflicts("cp.async", to, 16, on)
        assert (self._read_at[to[on] // 16] < self._epoch).all(), "a copy goes where others may still read"
        if self._late:
            self._copies.append((to[on], read()))
        else:
            self._land([(to[on], read())])

    def _land(self, copies):
        for to, pieces in copies:
            self._bytes[to[:, None] + np.arange(16)] = pieces

    def commit(self):
        self._groups.append(self._copies)
        self._copies = []

    def wait(self, pending):
        while len(self._groups) > pending:
            self._arrived += self._groups.pop(0)

    def _load(self, pointer, size):
        at = pointer[:, None] + np.arange(size)
        assert (pointer % size == 0).all(), "not aligned"
        assert self._exists[at].all(), "beyond an array"
        return self._memory[at]

    # From shared memory to registers, and the product

    def load_matrices(self, address, offset, *, transposed):
        address = address + offset
        self._count_conflicts("ldmatrix", address, 16)
        self._read_at[address // 16] = self._epoch
        rows = self._bytes[address[:, None] + np.arange(16)].view(np.uint16).reshape(-1, 4, 8, 8)
        return self._words(rows.swapaxes(2, 3) if transposed else rows)

    def _words(self, matrices):
        """u16 [warps, matrices, 8, 8] -> the words of each lane."""
        pairs = np.ascontiguousarray(matrices).view(np.uint32)
        return list(np.moveaxis(pairs.reshape(len(pairs), -1, 32), 1, 0).reshape(-1, len(self.thread)))

    def load_shared_word(self, address, offset):
        address = address + offset
        self._count_conflicts("ld.shared", address, 4)
        self._read_at[address // 16] = self._epoch
        return self._bytes[address[:, None] + np.arange(4)].view(np.uint32)[:, 0]

    def multiply_sparse(self, sums, a, b, word, selector):
        """PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16", and metadata.py's order."""
        stored = np.concatenate([np.concatenate(self._pairs(a[i::2]), 2) for i in range(2)], 1)  # warp, 16 rows, 16
        right = np.concatenate(self._pairs(b), 2).swapaxes(1, 2)  # warp, 32 rows, 8 columns
        words = word.reshape(-1, 8, 4)[:, :, 2 * selector : 2 * selector + 2]  # warp, g, h
        nibbles = words[..., None, None] >> (np.arange(2)[:, None] * 16 + np.arange(4) * 4).astype(np.uint32) & 15
        nibbles = nibbles.transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)  # warp, half and g, group of four
        positions = np.stack([nibbles & 3, nibbles >> 2], -1).astype(np.int64)
        assert (positions[..., 0] < positions[..., 1]).all(), "metadata is not ordered"
        dense = np.zeros((*stored.shape[:2], 8, 4), np.float32)
        np.put_along_axis(dense, positions, stored.reshape(*stored.shape[:2], 8, 2), -1)
        product = dense.reshape(-1, 16, 32) @ right
        mine = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)  # half, pair, warp, g, t
        return [real + part for real, part in zip(sums, mine, strict=True)]

    def _pairs(self, words: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of lanes 4 g + t: f32 [warp, g, 8]."""
        return [np.ascontiguousarray(w).view(self._types[0]).reshape(-1, 8, 8).astype(np.float32) for w in words]

    # The result

    def zero(self):
        return np.zeros(len(self.thread), np.float32)

    def maximum(self, a, b):
        return np.maximum(a, np.float32(b))

    def widen(self, pair):
        halves = np.ascontiguousarray(pair).view(self._types[1]).astype(np.float32)
        return halves[0::2], halves[1::2]

    def round_pair(self, low, high):
        return np.stack([low.astype(self._types[1]), high.astype(self._types[1])], -1).view(np.uint32)[:, 0]

    def transpose(self, word):
        (found,) = self._words(np.ascontiguousarray(word).view(np.uint16).reshape(-1, 1, 8, 8).swapaxes(2, 3))
        return found

    def load_reals(self, pointer, offset, count, condition):
        found = self._load_where(pointer + offset, 4 * count, condition).view(np.float32)
        return [found[:, i] for i in range(count)]

    def load_word(self, pointer, offset, condition):
        return self._load_where(pointer + offset, 4, condition).view(np.uint32)[:, 0]

    def _load_where(self, pointer, size, condition):
        found = np.zeros((len(pointer), size), np.uint8)
        on = np.ones(len(pointer), bool) if condition is None else condition
        if on.any():
            found[on] = self._load(pointer[on], size)
        return found

    def store_reals(self, pointer, offset, reals, condition):
        self._store(pointer + offset, np.stack(reals, -1).view(np.uint8), condition)

    def store_piece(self, pointer, offset, words, condition):
        self._store(pointer + offset, np.stack(words, -1).view(np.uint8), condition)

    def _store(self, pointer, content, condition):
        size = content.shape[1]
        self._load(pointer[condition], size)  # it exists
        out = self._base["out"]
        assert ((pointer >= out) & (pointer < out + self._arrays["out"].nbytes) | ~condition).all()
        self._memory[pointer[condition][:, None] + np.arange(size)] = content[condition]

    def store_shared_word(self, address, offset, word):
        address = address + offset
        self._count_conflicts("st.shared", address, 4)
        self._bytes[address[:, None] + np.arange(4)] = word[:, None].view(np.uint8)

    def load_shared_piece(self, address, offset):
        address = address + offset
        self._count_conflicts("ld.shared.v4", address, 16)
        return list(self._bytes[address[:, None] + np.arange(16)].view(np.uint32).T)

    def _count_conflicts(self, what, address, size, on=None):
        """How many more times than once each instruction meets a bank, in each group of lanes that goes at once."""
        words = (address[:, None].astype(np.int64) + np.arange(0, size, 4)).reshape(-1, 32) // 4
        on = np.ones(words.shape, bool) if on is None else np.repeat(on, size // 4).reshape(words.shape)
        words = np.sort(np.where(on, words, -1), 1)
        different = (words >= 0) & (np.diff(words, axis=1, prepend=-1) != 0)
        met = np.zeros(words.shape, int)
        np.add.at(met, (np.arange(len(words))[:, None], words % 32), different)
        self.conflicts[what] += int((met.max(1) - 1).clip(0).sum())


def _same(value):
    """Control is the same for all threads."""
    assert (value == value[0]).all()
    return value[0]
