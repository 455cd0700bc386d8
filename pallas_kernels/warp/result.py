"""From accumulators to memory: the epilogue in registers, and stores of whole sectors.

A warp holds 64 x 64 of the output in blocks of 8 x 8: lane 4 g + t two neighbours of row g. Of 32 bits these are whole
sectors of memory already, transposed or not. Of 16 bits they pass through 2 KiB of shared memory, 16 rows of 128 bytes
at a time; `movmatrix` transposes a block before, where the output is.
"""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.epilogue import activate
from pallas_kernels.warp.machine import Condition, Pointer, Real, Word
from pallas_kernels.warp.main_loop import Sums, Warp
from pallas_kernels.warp.tiles import STAGING_BYTES, WARP_TILE

_ROW_BYTES = 128
_LANES_OF_ROW = _ROW_BYTES // 16
_TURNS = STAGING_BYTES // 512
"""Of 32 lanes with 16 bytes each."""
_PART_ROWS = STAGING_BYTES // _ROW_BYTES
_PARTS = WARP_TILE // _PART_ROWS


class Region(NamedTuple):
    """Where a tile lies in the output: its first row and column, and the row and column that it ends before."""

    m: Word
    n: Word
    m_end: Word
    n_end: Word
    scale: Word
    """Of its first row's scale: rows of all groups have their own."""


class Result:
    """The output's part of one warp."""

    def __init__(self, warp: Warp, region: Region):
        self.machine, self.problem, self.warp = warp.m, warp.layout.problem, warp
        self.g, self.t = warp.lane // 4, warp.lane % 4
        self.row, self.column = region.m + warp.row, region.n + warp.column
        self.scale_row = region.scale + warp.row
        self.rows_left, self.columns_left = region.m_end - self.row, region.n_end - self.column

    def store(self, sums: Sums) -> None:
        """Apply the epilogue and write what the tile owns, 16 rows of out or of out^T after another."""
        whole_words = jnp.dtype(self.problem.out_dtype).itemsize == 4
        for part in range(_PARTS):
            # A part at a time: what is stored needs no register any more.
            finished = {block: self._finish(sums, *block) for block in self._blocks(part)}
            if whole_words:
                self._store_reals(finished)
            else:
                self._store_pairs(part, list(finished.values()))

    def _blocks(self, part: int) -> list[tuple[int, int]]:
        """Block row and block column of a part's 2 x 8 blocks, in the order of out, or of out^T."""
        blocks = [(2 * part + half, other) for half in range(2) for other in range(8)]
        return [block[::-1] for block in blocks] if self.problem.transpose_out else blocks

    def _owned(self, row: int, column: int) -> Condition:
        """Whether a block is the tile's: it is so whole or not at all."""
        m = self.machine
        rows = m.less(m.constant(8 * row), self.rows_left)
        return m.both(rows, m.less(m.constant(8 * column), self.columns_left))

    def _finish(self, sums: Sums, row: int, column: int) -> list[Real]:
        """The epilogue on a lane's two entries of a block."""
        m, epilogue = self.machine, self.problem.epilogue
        i, half = divmod(row, 2)
        reals = sums[i][column][2 * half : 2 * half + 2]
        if epilogue.row_scale:
            (scale,) = m.load_reals(m.pointer("row_scale", (self.scale_row + self.g, 4)), 4 * 8 * row, 1, None)
            reals = [real * scale for real in reals]
        if epilogue.column_scale:
            pointer = m.pointer("column_scale", (self.column + self.t * 2, 4))
            scales = m.load_reals(pointer, 4 * 8 * column, 2, None)
            reals = [real * scale for real, scale in zip(reals, scales, strict=True)]
        reals = [activate(epilogue, real, m.maximum) for real in reals]
        if epilogue.operand is None:
            return reals
        load = self._load_reals if jnp.dtype(self.problem.out_dtype).itemsize == 4 else self._load_pair
        pairs = zip(reals, load(row, column), strict=True)
        return [real * saved if epilogue.operand == "multiply" else real + saved for real, saved in pairs]

    # An array of the output's shape, at a lane's two neighbours of a block

    def _pointer(self, name: str, row: Word, column: Word, *, transposed: bool) -> Pointer:
        """Of an entry, given relative to the warp's part: row and column of out, not of out^T."""
        itemsize, width = jnp.dtype(self.problem.out_dtype).itemsize, self.problem.out_shape[1]
        row, column = self.row + row, self.column + column
        if transposed:
            row, column = column, row
        return self.machine.pointer(name, (row, width * itemsize), (column, itemsize))

    def _offset(self, rows: int, columns: int) -> int:
        itemsize, width = jnp.dtype(self.problem.out_dtype).itemsize, self.problem.out_shape[1]
        if self.problem.transpose_out:
            rows, columns = columns, rows
        return (rows * width + columns) * itemsize

    def _load_reals(self, row: int, column: int) -> list[Real]:
        m, transposed = self.machine, self.problem.transpose_out
        pointer = self._pointer("operand", self.g, self.t * 2, transposed=transposed)
        owned, offset = self._owned(row, column), self._offset(8 * row, 8 * column)
        if not transposed:
            return m.load_reals(pointer, offset, 2, owned)
        return [*m.load_reals(pointer, offset, 1, owned), *m.load_reals(pointer, offset + self._offset(0, 1), 1, owned)]

    def _load_pair(self, row: int, column: int) -> list[Real]:
        m, transposed = self.machine, self.problem.transpose_out
        at = (self.t * 2, self.g) if transposed else (self.g, self.t * 2)
        pointer = self._pointer("operand", *at, transposed=transposed)
        owned, offset = self._owned(row, column), self._offset(8 * row, 8 * column)
        word = m.load_word(pointer, offset, owned)
        return list(m.widen(m.transpose(word) if transposed else word))

    def _store_reals(self, finished: dict[tuple[int, int], list[Real]]) -> None:
        m, transposed = self.machine, self.problem.transpose_out
        pointer = self._pointer("out", self.g, self.t * 2, transposed=transposed)
        for (row, column), pair in finished.items():
            owned, offset = self._owned(row, column), self._offset(8 * row, 8 * column)
            if transposed:
                m.store_reals(pointer, offset, pair[:1], owned)
                m.store_reals(pointer, offset + self._offset(0, 1), pair[1:], owned)
            else:
                m.store_reals(pointer, offset, pair, owned)

    def _store_pairs(self, part: int, pairs: list[list[Real]]) -> None:
        m, transposed, lane = self.machine, self.problem.transpose_out, self.warp.lane
        staging = m.shared + self.warp.tile.ring_bytes + self.warp.warp * STAGING_BYTES
        if part:
            m.warp_barrier()  # every lane has read what lay there
        for block, pair in enumerate(pairs):
            half, piece = divmod(block, 8)
            word = m.round_pair(*pair)
            word = m.transpose(word) if transposed else word
            at = staging + self.g * _ROW_BYTES + (self.g ^ piece) * 16 + self.t * 4
            m.store_shared_word(at, 8 * half * _ROW_BYTES, word)
        m.warp_barrier()
        row, piece = lane // _LANES_OF_ROW, lane % _LANES_OF_ROW
        along = {True: (piece * 8, row), False: (row, piece * 8)}[transposed]
        pointer = self._pointer("out", *along, transposed=transposed)
        has_piece = m.less(piece * 8, self.rows_left if transposed else self.columns_left)
        left = self.columns_left if transposed else self.rows_left
        for turn in range(_TURNS):
            in_part = turn * (32 // _LANES_OF_ROW)
            at = staging + (row + in_part) * _ROW_BYTES + (piece ^ ((row + in_part) % 8)) * 16
            words, rows = m.load_shared_piece(at, 0), _PART_ROWS * part + in_part
            offset = self._offset(0, rows) if transposed else self._offset(rows, 0)
            m.store_piece(pointer, offset, words, m.both(has_piece, m.less(row + rows, left)))
