"""A block's product over the stages of a tile: `cp.async` fills a ring, `ldmatrix` and `mma.sp` empty it.

Operands of B are in registers `ahead` blocks of 8 columns before they are multiplied, across stages too. One barrier a
stage: once all warps have what they need of a stage, its place is filled again, so that `stages` are in flight. The
last stages of a tile give their places to the first ones of the next, which come in while the result goes out.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels.warp import copies
from pallas_kernels.warp.copies import Layout, Place, Source
from pallas_kernels.warp.machine import Machine, Pointer, Real, Word
from pallas_kernels.warp.tiles import MMA_M, MMA_N, WARP_TILE

ROW_BLOCKS, COLUMN_BLOCKS = WARP_TILE // MMA_M, WARP_TILE // MMA_N
_INDICES_AHEAD = 4
"""Blocks of B that are multiplied between the loading of indices and the copies of their rows."""
_ALL = 1 << 16
"""More than any turn's index."""
_ITEMS = 2 * COLUMN_BLOCKS
"""Blocks of 32 rows and 8 columns of B that a warp multiplies with in a stage: both steps of 32 logical columns."""

type Sums = list[list[list[Real]]]
"""By 16-row block and by 8-column block four accumulators, as `Machine.multiply_sparse` holds them."""


class State(NamedTuple):
    """What a warp carries from stage to stage: sums, and of the stage to come the operands that it begins with."""

    sums: Sums
    a: list[list[Word]]
    words: list[Word]
    b: list[list[Word]]
    slot: Word
    """Byte of the ring where the stage begins."""
    pointers: list[Pointer]
    """What will take its place."""

    def flat(self) -> list:
        sums = [real for row in self.sums for block in row for real in block]
        operands = [word for group in (*self.a, self.words, *self.b) for word in group]
        return [*sums, *operands, self.slot, *self.pointers]

    def of(self, flat: list) -> "State":
        """The same structure with other values."""
        rest = iter(flat)

        def take(groups: list) -> list:
            return [[next(rest) for _ in group] for group in groups]

        sums, a = [take(row) for row in self.sums], take(self.a)
        (words,), b = take([self.words]), take(self.b)
        return State(sums, a, words, b, next(rest), list(rest))


class Warp:
    """The code of one thread, as a part of its warp."""

    def __init__(self, m: Machine, layout: Layout):
        self.m, self.layout, self.tile = m, layout, layout.tile
        self.lane, self.warp = m.thread % 32, m.thread // 32
        self.row = self.warp // self.tile.warps_n * WARP_TILE
        self.column = self.warp % self.tile.warps_n * WARP_TILE

    def multiply(self, now: Place, following: Place, slot: Word, filled: Word, prefetch: Word) -> Sums:
        """The sums of a tile.

        Args:
          now, following: where this tile and the next one read.
          slot: byte of the ring where this tile's first stage lies.
          filled: 1 if its first stages are on their way already, else 0.
          prefetch: 1 to copy the first stages of the next tile, where this one has at least `stages` itself; else 0.
        """
        m, stages = self.m, self.tile.stages
        here = copies.sources(m, self.layout, now)
        m.when(m.equal(filled, 0), lambda: self._fill(here, now.steps, slot))
        state = self._begin(here, slot)
        # Either no stage of this tile is left to copy, or all of the last ones make room for the next tile's.
        last = m.least(now.steps, m.constant(stages))
        state = self._loop(now.steps - last, state, here, lambda _: None)
        there = copies.sources(m, self.layout, following)
        state = state._replace(pointers=self._pointers(there, 0))
        limit = m.least(following.steps, m.constant(stages)) * prefetch
        return self._loop(last, state, there, lambda i: m.less(i, limit)).sums

    def _loop(self, count: Word, state: State, sources: list[Source], exists: Callable[[Word], Any]):
        def body(i: Word, flat: list) -> list:
            return self._stage(state.of(flat), sources, exists(i)).flat()

        return state.of(self.m.loop(count, state.flat(), body))

    def _fill(self, sources: list[Source], steps: Word, slot: Word) -> None:
        """Copy the first stages, once nobody reads what lies there, and wait for the very first."""
        m = self.m
        m.barrier()
        for stage in range(self.tile.stages):
            exists, pointers = m.less(m.constant(stage), steps), self._pointers(sources, stage)
            for begin in self._copies(sources, pointers, slot, exists, self._load_indices(sources, pointers, exists)):
                begin()
            m.commit()
            slot = self._after(slot)
        m.wait(self.tile.stages - 1)
        m.barrier()

    def _begin(self, sources: list[Source], slot: Word) -> State:
        m = self.m
        return State(
            [[[m.zero()] * 4 for _ in range(COLUMN_BLOCKS)] for _ in range(ROW_BLOCKS)],
            self._load_a(slot, 0),
            self._load_words(slot),
            [self._load_b(slot, item) for item in range(self.tile.ahead)],
            slot,
            self._pointers(sources, self.tile.stages),
        )

    def _pointers(self, sources: list[Source], stage: int) -> list[Pointer]:
        """Of a stage: one of each source, then one of the indices that a source is gathered by."""
        found = [self.m.advance(source.pointer, stage * source.stride) for source in sources]
        gathered = [source.gathered for source in sources if source.gathered is not None]
        return found + [self.m.advance(g.pointer, stage * copies.INDEX_STRIDE) for g in gathered]

    def _load_indices(self, sources: list[Source], pointers: list[Pointer], exists: Any) -> list[Word]:
        """The rows that a stage gathers, of each turn one: to be loaded some time before they are used."""
        turns = [source.turns for source in sources if source.gathered is not None]
        return [self.m.load_word(pointers[-1], 4 * turn.index, exists) for turn in (turns[0] if turns else [])]

    def _copies(
        self, sources: list[Source], pointers: list[Pointer], slot: Word, exists: Any, indices: list[Word]
    ) -> list:
        """The copies of one stage, if it exists, each to be begun by a call."""
        m, begun = self.m, []
        for source, pointer in zip(sources, pointers, strict=False):
            to, left = m.shared + slot + source.to, source.left
            if exists is not None:
                left = m.select(exists, m.constant(_ALL) if left is None else left, m.constant(0))
            for i, turn in enumerate(source.turns):
                at, place = to ^ turn.flip if turn.flip else to, source.gathered
                if place is None:
                    copy = functools.partial(m.copy, at, turn.to, pointer, turn.offset, turn.index, left)
                else:
                    row = indices[i]
                    copy = functools.partial(m.copy_row, at, turn.to, pointer, row, place.rows, place.row_bytes, left)
                begun.append(copy)
        return begun

    def _stage(self, state: State, sources: list[Source], exists: Any) -> State:
        """Multiply a stage; the operands that the next one begins with are then in registers."""
        m, c = self.m, self.tile
        sums, a, words, b, slot, pointers = state
        sums, b, after = [list(row) for row in sums], list(b), self._after(slot)
        second_a, next_a, next_words, begun, indices = a, a, words, [], []
        for item in range(_ITEMS):
            step, block = divmod(item, COLUMN_BLOCKS)
            ahead = item + c.ahead
            if ahead == _ITEMS:
                # From here on the next stage is there, and every warp has all that it needs of this one.
                m.wait(c.stages - 2)
                m.barrier()
                next_a, next_words = self._load_a(after, 0), self._load_words(after)
                begun = self._copies(sources, pointers, slot, exists, indices)
            elif ahead == COLUMN_BLOCKS:
                second_a = self._load_a(slot, 1)
            elif ahead == _ITEMS - _INDICES_AHEAD:
                indices = self._load_indices(sources, pointers, exists)
            b.append(self._load_b(slot, ahead) if ahead < _ITEMS else self._load_b(after, ahead - _ITEMS))
            if item == COLUMN_BLOCKS:
                a = second_a
            own = b.pop(0)
            for row in range(ROW_BLOCKS):
                sums[row][block] = m.multiply_sparse(sums[row][block], a[row], own, words[row], step)
            share = -(-len(begun) // (_ITEMS - item))
            for begin in begun[:share]:
                begin()
            begun = begun[share:]
        m.commit()
        strides = [source.stride for source in sources] + [copies.INDEX_STRIDE] * (len(pointers) - len(sources))
        pointers = [m.advance(pointer, stride) for pointer, stride in zip(pointers, strides, strict=True)]
        return State(sums, next_a, next_words, b, after, pointers)

    def _after(self, slot: Word) -> Word:
        m, after = self.m, slot + self.tile.stage_bytes
        return m.select(m.equal(after, self.tile.ring_bytes), m.constant(0), after)

    # From shared memory to registers

    def _load_a(self, slot: Word, step: int) -> list[list[Word]]:
        at = self.m.shared + slot + self.row * 64 + (copies.a_lane(self.lane) ^ 32 * step)
        return [self.m.load_matrices(at, 1024 * i, transposed=False) for i in range(ROW_BLOCKS)]

    def _load_words(self, slot: Word) -> list[Word]:
        at = self.m.shared + slot + self.tile.a_bytes + self.row * 8 + self.lane * 4
        return [self.m.load_shared_word(at, 128 * i) for i in range(ROW_BLOCKS)]

    def _load_b(self, slot: Word, item: int) -> list[Word]:
        c, k_major = self.tile, self.layout.problem.b_k_major
        flip, offset = copies.b_block(*divmod(item, COLUMN_BLOCKS), c.tile_n, k_major)
        lane = copies.b_lane(self.lane, self.column, c.tile_n, k_major)
        at = self.m.shared + slot + (c.a_bytes + c.metadata_bytes) + (lane ^ flip)
        return self.m.load_matrices(at, offset, transposed=not k_major)
