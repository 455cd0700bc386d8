"""Which tile a block computes next: the order of tiles, and where ragged groups begin and end.

All of it runs on the device from `group_sizes`; the host never learns a size.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref

from pallas_kernels.tiles import Problem, TileConfig

type Index = jax.Array | int


class Tile(NamedTuple):
    """Where a tile reads and writes, in elements; k counts logical columns of A."""

    a_row: Index
    a_k: Index
    b_k: Index
    b_n: Index
    out_m: Index
    out_n: Index
    m_end: Index  # the tile owns output rows below m_end ...
    n_end: Index  # ... and columns below n_end
    steps: Index
    turn: Index = 0
    """Which of the block's tiles it is."""


class Cursor(NamedTuple):
    """The group under the cursor: its index, first tile, first row, rows, and number of tiles."""

    group: jax.Array
    first: jax.Array
    start: jax.Array
    size: jax.Array
    tiles: jax.Array


def ceil_div(a, b):
    return lax.div(a + (b - 1), b)


def next_in_place(stage, stages: int, steps: int):
    """The stage that takes the place of a tile's `stage` in a ring of `stages`, where every tile has `steps`.

    Returns: the fewest tiles that it may be on, whether it is one more, and which of that tile's stages it is.
    """
    near = stages // steps
    ahead = stage + stages - near * steps
    return near, ahead >= steps, ahead - jnp.where(ahead >= steps, steps, 0)


def raster(index, m_tiles, n_tiles, config: TileConfig):
    """The (m, n) tile of a linear index: strip by strip along n, in a strip band by band along m, in a band down m."""
    strip = lax.div(index, config.raster_n * m_tiles)
    in_strip = index - strip * (config.raster_n * m_tiles)
    width = jnp.minimum(config.raster_n, n_tiles - strip * config.raster_n)
    band = lax.div(in_strip, config.raster_m * width)
    in_band = in_strip - band * (config.raster_m * width)
    height = jnp.minimum(config.raster_m, m_tiles - band * config.raster_m)
    return band * config.raster_m + lax.rem(in_band, height), strip * config.raster_n + lax.div(in_band, height)


def sort_groups(sizes_gmem, sorted_smem, rows: int, unit: int) -> None:
    """sorted_smem [3, G] = group, start and size of each group, in multiples of `unit`, largest first: the contraction.

    There a tile costs what its group's size is: started largest first, they end together. Each thread ranks one group.
    Every warpgroup writes the whole table, so that none has to wait for another.
    """
    groups = sizes_gmem.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def sort(_, sizes, table):
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()

        def c(value):
            return arith.constant(i32, value)

        def at(value):
            return arith.constant(index, value)

        def is_(predicate, a, b):
            return arith.cmpi(getattr(arith.CmpIPredicate, predicate), a, b)

        thread = arith.remui(utils.thread_idx(), c(utils.WARPGROUP_SIZE))
        own, start, left, clipped = c(0), c(0), c(rows), []
        for j in range(groups):
            # Cut before it is rounded: a size near 2^31 would overflow. What is left is a multiple of the unit.
            size = arith.minsi(arith.maxsi(memref.load(sizes, [at(j)]), c(0)), left)
            size = arith.andi(arith.addi(size, c(unit - 1)), c(-unit))
            own = arith.select(is_("eq", thread, c(j)), size, own)
            start = arith.addi(start, arith.select(is_("sgt", thread, c(j)), size, c(0)))
            left = arith.subi(left, size)
            clipped.append(size)
        rank = c(0)
        for j, size in enumerate(clipped):
            tie_before = arith.andi(is_("eq", size, own), is_("sgt", thread, c(j)))
            before = arith.ori(is_("sgt", size, own), tie_before)
            rank = arith.addi(rank, arith.extui(i32, before))
        with utils.when(is_("slt", thread, c(groups))):
            place = arith.index_cast(index, rank)
            for row, value in enumerate((thread, start, own)):
                memref.store(value, table, [at(row), place])
        utils.warpgroup_barrier()

    sort(sizes_gmem, sorted_smem)


def round_up(size, unit: int):
    return ceil_div(jnp.maximum(size, 0), jnp.int32(unit)) * unit


class Schedule:
    """The tiles of a problem. `groups_ref` holds group_sizes [G], or for the contraction what `sort_groups` writes."""

    def __init__(self, problem: Problem, config: TileConfig, groups_ref):
        self.problem, self.config, self.groups_ref = problem, config, groups_ref
        p = problem
        self.m_tiles, self.n_tiles = -(-p.m // config.tile_m), -(-p.n // config.tile_n)
        if p.mode == "columns":
            self.m_tiles = -(-(p.m // p.groups) // config.tile_m)

    def count(self) -> jax.Array | int:
        """The number of tiles."""
        p = self.problem
        if p.mode in ("dense", "contraction"):
            return self.m_tiles * self.n_tiles * p.groups
        rows_left, tiles = jnp.int32(self._ragged_rows()), jnp.int32(0)
        for g in range(p.groups + 1):
            size = self._size(g, rows_left)
            rows_left -= size
            tiles += self._group_tiles(size)
        return tiles

    def start(self) -> Cursor:
        zero = jnp.int32(0)
        if self.problem.mode in ("dense", "contraction"):
            return Cursor(zero, zero, zero, zero, zero)
        size = self._size(0, jnp.int32(self._ragged_rows()))
        return Cursor(zero, zero, zero, size, self._group_tiles(size))

    def locate(self, cursor: Cursor, index) -> tuple[Cursor, Tile]:
        """The tile of an index; indices must not decrease from call to call."""
        p, c = self.problem, self.config
        steps, zero = -(-p.k // p.tile_k), 0
        if p.mode == "dense":
            mi, ni = raster(index, self.m_tiles, self.n_tiles, c)
            m, n = mi * c.tile_m, ni * c.tile_n
            return cursor, Tile(m, zero, zero, n, m, n, p.m, p.n, steps)
        if p.mode == "contraction":
            per_group = self.m_tiles * self.n_tiles
            # A round walked backwards begins past the last tile: nothing to add up and nothing to store there.
            exists = index < self.count()
            index = jnp.minimum(index, self.count() - 1)
            rank = lax.div(index, per_group)
            group, start, size = (self.groups_ref[i, rank] for i in range(3))
            mi, ni = raster(index - rank * per_group, self.m_tiles, self.n_tiles, c)
            m, n = mi * c.tile_m, ni * c.tile_n
            first = group * p.m
            steps = jnp.where(exists, lax.div(size, p.tile_k), 0)
            m_end = jnp.where(exists, first + p.m, 0)
            return cursor, Tile(m, start, start, n, first + m, n, m_end, p.n, steps)
        cursor = lax.while_loop(lambda s: index >= s.first + s.tiles, self._next_group, cursor)
        group, first, start, size, _ = cursor
        steps = jnp.where(group < p.groups, steps, 0)  # rows of no group: no product, zeros
        if p.mode == "rows":
            mi, ni = raster(index - first, ceil_div(size, c.tile_m), self.n_tiles, c)
            m, n = start + mi * c.tile_m, ni * c.tile_n
            return cursor, Tile(m, zero, group * p.k, n, m, n, start + size, p.n, steps)
        mi, ni = raster(index - first, self.m_tiles, ceil_div(size, c.tile_n), c)
        m, n = mi * c.tile_m, start + ni * c.tile_n
        per_group = p.m // p.groups
        return cursor, Tile(group * per_group + m, zero, zero, n, m, n, per_group, start + size, steps)

    def _next_group(self, cursor: Cursor) -> Cursor:
        group, start = cursor.group + 1, cursor.start + cursor.size
        size = self._size(group, self._ragged_rows() - start)
        return Cursor(group, cursor.first + cursor.tiles, start, size, self._group_tiles(size))

    def _size(self, group, rows_left):
        """Rows of a group; whatever is left counts as one last group, and no group reaches past the end.

        A size is cut before it is rounded: near 2^31 it would overflow.
        """
        if isinstance(group, int):
            size = self.groups_ref[group] if group < self.problem.groups else rows_left
        else:
            last = self.problem.groups - 1
            size = jnp.where(group > last, rows_left, self.groups_ref[jnp.minimum(group, last)])
        return round_up(jnp.minimum(size, rows_left), self.problem.tile_k)

    def _group_tiles(self, size):
        if self.problem.mode == "rows":
            return ceil_div(size, self.config.tile_m) * self.n_tiles
        return ceil_div(size, self.config.tile_n) * self.m_tiles

    def _ragged_rows(self) -> int:
        return self.problem.m if self.problem.mode == "rows" else self.problem.n
