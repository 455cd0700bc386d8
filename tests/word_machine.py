"""The packing kernels' `Machine` on numpy: every thread of every block at once, bit for bit, without a GPU."""

from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np

from pallas_kernels.pack.blocks import Matrix
from pallas_kernels.pack.words import Machine
from pallas_kernels.permute import machine as permute

THREADS = 128


def run(body: Callable[..., None], matrix: Matrix, dtype: str, arrays: dict, out: dict, *, shared: int) -> dict:
    """What hopper._launch does: run `body` for each block; the outputs by name."""
    return run_blocks(body, matrix.blocks, dtype, arrays, out, shared=shared)


def run_blocks(
    body: Callable[..., None], blocks: int, dtype: str, arrays: dict, out: dict, *, shared: int, machine=None
) -> dict:
    """What hopper.launch does."""
    memory = {name: np.ascontiguousarray(array).reshape(-1).view(np.uint32) for name, array in arrays.items()}
    # A word that is never written stays recognisable.
    written = {name: np.full(_words(t), 0xDEADBEEF, np.uint32) for name, t in out.items()}
    with np.errstate(all="ignore"):
        body((machine or NumpyMachine)(blocks, memory | written, dtype, shared))
    return {name: written[name].view(t.dtype).reshape(t.shape) for name, t in out.items()}


def _words(type_: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(type_.shape)) * np.dtype(type_.dtype).itemsize // 4


class NumpyMachine(Machine):
    """A word is uint32 [blocks, 128]."""

    def __init__(self, blocks: int, memory: dict[str, np.ndarray], dtype: str, shared: int):
        self._memory, self._dtype = memory, {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
        self._shared = np.full((blocks, shared * 512, 4), 0xDEADBEEF, np.uint32)
        self.thread = np.broadcast_to(np.arange(THREADS, dtype=np.uint32), (blocks, THREADS))
        self.block = np.broadcast_to(np.arange(blocks, dtype=np.uint32)[:, None], (blocks, THREADS))

    def load(self, name, piece):
        return list(np.moveaxis(self._memory[name].reshape(-1, 4)[piece], -1, 0))

    def store(self, name, piece, words):
        self._memory[name].reshape(-1, 4)[piece] = np.stack(words, -1)

    def load_half(self, name, half):
        return list(np.moveaxis(self._memory[name].reshape(-1, 2)[half], -1, 0))

    def store_half(self, name, half, words):
        self._memory[name].reshape(-1, 2)[half] = np.stack(words, -1)

    def load_word(self, name, index):
        return self._memory[name][index]

    def store_word(self, name, index, word):
        self._memory[name][index] = word

    def store_shared(self, piece, words):
        self._shared[self.block, piece] = np.stack(words, -1)

    def load_shared(self, piece):
        return list(np.moveaxis(self._shared[self.block, piece], -1, 0))

    def barrier(self):
        pass  # threads run in step

    def load_transposed(self, piece):
        rows = self._shared[self.block, piece].view(np.uint16)  # [blocks, 128, 8]: what each lane points at
        matrices = rows.reshape(-1, THREADS // 32, 4, 8, 8)  # block, warp, matrix, row, column
        pairs = np.ascontiguousarray(matrices.swapaxes(3, 4)).view(np.uint32)  # block, warp, matrix, g, t
        return list(np.moveaxis(pairs.reshape(-1, THREADS // 32, 4, 32), 2, 0).reshape(4, -1, THREADS))

    def permute(self, first, second, selector):
        sources = np.stack([np.broadcast_to(word, self.thread.shape) for word in (first, second)], -1)
        sources = sources.view(np.uint8)
        out = np.empty((*self.thread.shape, 4), np.uint8)
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = sources[..., nibble & 7]
            out[..., i] = np.where(byte >= 128, 255, 0) if nibble & 8 else byte
        return out.view(np.uint32)[..., 0]

    def _pairs(self, operation, *words):
        halves = [np.ascontiguousarray(word).view(self._dtype).astype(np.float32) for word in words]
        return operation(*halves).astype(self._dtype).view(np.uint32)

    def relu(self, pair):
        return self._pairs(lambda x: np.where(np.isnan(x), np.nan, np.maximum(x, 0.0) + 0.0), pair)

    def multiply(self, pair, other):
        return self._pairs(np.multiply, pair, other)

    def add(self, pair, other):
        return self._pairs(np.add, pair, other)

    def warp_sum(self, word):
        return np.repeat(word.reshape(-1, THREADS // 32, 32).sum(-1, dtype=np.uint32), 32).reshape(word.shape)

    def minimum(self, a, b):
        return np.minimum(a, np.uint32(b))

    def maximum(self, a, b):
        return np.maximum(a, np.uint32(b))

    def greater(self, a, b):
        return np.where(a > b, np.uint32(0xFFFFFFFF), np.uint32(0))

    def subtract_f32(self, a, b):
        return (a.view(np.float32) - b.view(np.float32)).view(np.uint32)

    def multiply_f32(self, a, b):
        return (a.view(np.float32) * np.ascontiguousarray(b).view(np.float32)).view(np.uint32)

    def round_pair(self, low, high):
        return np.stack([x.view(np.float32).astype(self._dtype) for x in (low, high)], -1).view(np.uint32)[..., 0]

    def narrow(self, four):
        values = np.clip(np.stack([np.ascontiguousarray(x).view(np.float32) for x in four], -1), -448, 448)
        return values.astype(ml_dtypes.float8_e4m3fn).view(np.uint32)[..., 0]

    def widen8(self, word):
        values = np.ascontiguousarray(word)[..., None].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return list(np.moveaxis(values.view(np.uint32), -1, 0))

    def root(self, word):
        return np.sqrt(np.ascontiguousarray(word).view(np.float32)).view(np.uint32)

    def maximum_pair(self, pair, other):
        halves = (np.ascontiguousarray(np.broadcast_to(w, self.thread.shape)).view(np.uint16) for w in (pair, other))
        return np.maximum(*halves).view(np.uint32)

    def warp_max(self, word):
        return np.repeat(word.reshape(-1, THREADS // 32, 32).max(-1), 32).reshape(word.shape)

    def exchange(self, word):
        return word[..., np.arange(THREADS) ^ 1]

    def loop(self, count, initial, body):
        state = initial
        for i in range(count):
            state = body(self.thread * 0 + i, list(state))
        return state


class NumpyPermuteMachine(NumpyMachine, permute.Machine):
    """With shared memory in words, and what lanes of a warp do together."""

    def load_word(self, name, index):
        if name != "shared":
            return super().load_word(name, index)
        return self._shared_words()[self.block, index]

    def store_word(self, name, index, word):
        if name != "shared":
            super().store_word(name, index, word)
        else:
            self._shared_words()[self.block, index] = word

    def store_word_if(self, name, index, word, mask):
        chosen, index, word = (np.broadcast_to(x, self.thread.shape) for x in (mask != 0, index, word))
        if name != "shared":
            self._memory[name][index[chosen]] = word[chosen]
        else:
            self._shared_words()[self.block[chosen], index[chosen]] = word[chosen]

    def _shared_words(self):
        return self._shared.reshape(len(self._shared), -1)

    def equal_lanes(self, word):
        lanes = word.reshape(-1, 32)
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        equal = np.where(lanes[:, :, None] == lanes[:, None, :], bits, np.uint32(0))
        return equal.sum(-1, dtype=np.uint32).reshape(word.shape)

    def count_ones(self, word):
        return np.bitwise_count(word).astype(np.uint32)

    def widen(self, pair):
        halves = np.ascontiguousarray(pair).view(self._dtype).astype(np.float32).view(np.uint32)
        return halves[..., 0::2], halves[..., 1::2]

    def _f32(self, operation, *words):
        return operation(*(np.ascontiguousarray(word).view(np.float32) for word in words)).view(np.uint32)

    def add_f32(self, a, b):
        return self._f32(np.add, a, b)

    def multiply_f32(self, a, b):
        return self._f32(np.multiply, a, b)

    def divide_f32(self, a, b):
        return self._f32(np.divide, a, b)

    def root_f32(self, a):
        return self._f32(np.sqrt, a)

    def mma(self, a, b, sums):
        left = np.concatenate([self._rows(a[0], a[2]), self._rows(a[1], a[3])], 1)
        product = left @ self._rows(b[0], b[1]).swapaxes(1, 2)  # warp, 16 rows, 8 columns
        out = []
        for i, word in enumerate(sums):
            mine = product[:, i // 2 * 8 : i // 2 * 8 + 8, i % 2 :: 2].reshape(self.thread.shape)  # warp, g, t
            out.append((np.ascontiguousarray(word).view(np.float32) + mine).astype(np.float32).view(np.uint32))
        return out

    def _rows(self, low, high):
        """Pairs of lane 4 g + t at k = 2 t and 2 t + 8 -> f64 [warp, g, k]."""
        halves = [np.ascontiguousarray(w).view(self._dtype).reshape(-1, 8, 8).astype(np.float64) for w in (low, high)]
        return np.concatenate(halves, 2)
