"""out[m, n] = epilogue(A[m, k] B[k, n]) with A 2:4 sparse along k, whole or over ragged groups: the Hopper kernel.

One persistent block per multiprocessor. A loading warpgroup streams stages of A, its metadata and B into a ring of
shared memory, across tile borders and without ever waiting for a store; one or two computing warpgroups multiply
and write their part of the tile. Names end in the memory they live in: _gmem, _smem.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tile_order
from pallas_kernels.hopper import gather, main_loop, packing, ring, scales
from pallas_kernels.hopper.schedule import Schedule, Tile, ceil_div, next_in_place, sort_groups
from pallas_kernels.tiles import (
    GRANULE,
    MAX_TILE,
    PACK_REGISTERS,
    SCALE_SLOTS,
    STAGE_BYTES,
    TILE_K,
    Problem,
    TileConfig,
    chunk_columns,
)

SWIZZLE = STAGE_BYTES
"""Bytes of a row of B, or of an output chunk, in shared memory."""
_SWIZZLED = (plgpu.TilingTransform((8, SWIZZLE // 2)), plgpu.SwizzleTransform(SWIZZLE))


def _swizzled(dtype: str, row_bytes: int = SWIZZLE) -> tuple:
    """How shared memory holds rows of so many bytes: a row of stored values of A, of B, or of an output chunk.

    A given in rows lies there byte for byte as when it is given in tiles.
    """
    row = row_bytes // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(row_bytes)


def matmul(
    values,
    metadata,
    b,
    *,
    problem: Problem,
    config: TileConfig,
    num_sms: int,
    groups=None,
    columns=None,
    operand=None,
    row_scale=None,
    column_scale=None,
) -> jax.Array:
    """Launch the kernel; shapes and configuration have been checked by the callers (the ops' api.py).

    Args:
      values: stored entries of A tile by tile (tile_order.py), or row by row, [m, k / 2]; or a dense A [m, k].
      metadata: uint32 [m / 64, k / 64, 128]; None with a dense A.
      b: [k, n], or [n, k] when `problem.b_k_major`; for rows' groups k runs over groups x k.
      groups: None, or int32 [G], the rows of each group.
      columns: where `problem.v` is set, int32 [m / v, k]: the row of b [any, n] for each of the k columns of A, for
        each block of v rows; zeros stand for a row that b does not have. n may then be any multiple of 8 in b.
      operand: an array of the output's shape for the epilogue.
      row_scale: f32, one for each row of A over all groups; for the contraction for each group and row.
      column_scale: f32 [n].
    """
    if row_scale is not None and not problem.stages_scales:
        row_scale = jnp.pad(row_scale, (0, MAX_TILE))  # a tile at the edge reads scales it does not use
    extra = {"metadata": metadata, "b": b, "groups": groups, "columns": columns, "operand": operand}
    extra |= {"row_scale": row_scale, "column_scale": column_scale}
    operands = {"values": values} | {name: array for name, array in extra.items() if array is not None}
    out = {"out": jax.ShapeDtypeStruct(problem.out_shape, problem.out_dtype)}
    return _launch(operands, out, problem, config, num_sms)["out"]


def matmul_packed(
    a: tuple[jax.Array, ...],
    b,
    *,
    problem: Problem,
    config: TileConfig,
    num_sms: int,
    groups=None,
    kept=None,
    row_scale=None,
    column_scale=None,
) -> dict[str, jax.Array]:
    """As `matmul`, for a problem whose result is packed: what `packing.outputs` names.

    Args:
      a: values and metadata, or a dense A alone.
      kept: what the packing reads, the arrays that `packing.inputs` names.
    """
    operands = dict(zip(("values", "metadata"), a, strict=False)) | {"b": b, **(kept or {})}
    extra = {"groups": groups, "row_scale": row_scale, "column_scale": column_scale}
    operands |= {name: array for name, array in extra.items() if array is not None}
    return _launch(operands, packing.outputs(problem), problem, config, num_sms)


def _launch(
    operands: dict[str, jax.Array], out: dict[str, Any], problem: Problem, config: TileConfig, num_sms: int
) -> dict[str, jax.Array]:
    config.check(problem)
    names = (*operands, *out)

    def body(*refs):
        *arrays, scratch = refs
        gmem = dict(zip(names, arrays, strict=True))
        _block(gmem, gmem.get("out"), scratch, problem, config)

    launch = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(t.shape, _signed(t.dtype)) for t in out.values()),
        scratch_types=[_scratch(problem, config, in_rows=operands["values"].ndim == 2)],
        grid=(num_sms,),
        grid_names=("sm",),
        num_threads=config.warpgroups + (1 if problem.packing is None else 2),
        thread_name="wg",
        # Safe here: a chunk of shared memory is written by one warpgroup, committed, and rewritten only after
        # wait_smem_to_gmem, which synchronizes the warpgroup; everything else is ordered by barriers below.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    # Under `jax.vmap` one launch after the other, each of which fills the GPU. One more grid axis, which `plgpu.kernel`
    # would add, does not lower: tiles of five dimensions are more than the copy engine's descriptors are made for.
    found = jax.custom_batching.sequential_vmap(launch)(
        *(jax.lax.bitcast_convert_type(array, _signed(array.dtype)) for array in operands.values())
    )
    return {
        name: jax.lax.bitcast_convert_type(array, type_.dtype)
        for (name, type_), array in zip(out.items(), found, strict=True)
    }


def _signed(dtype):
    """Mosaic has no unsigned words."""
    return jnp.int32 if dtype == jnp.uint32 else dtype


def _span(start, size: int, of: int = GRANULE):
    """A slice whose start is a multiple of `of`, which the lowering must know where memory is tiled."""
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, of), size)


def _scratch(problem: Problem, config: TileConfig, *, in_rows: bool) -> dict:
    """Shared memory of a block: what `TileConfig.smem_bytes` adds up."""
    c, stages = config, config.stages
    dtype, out_dtype, tile_k = jnp.dtype(problem.dtype), jnp.dtype(problem.out_dtype), problem.tile_k
    b_shape = (c.tile_n, tile_k) if problem.b_k_major else (tile_k, c.tile_n)
    columns = chunk_columns(problem.out_dtype)
    chunk = (columns, GRANULE) if problem.transpose_out else (GRANULE, columns)
    extra: dict[str, Any] = scales.scratch(problem, config)
    if problem.mode == "contraction":
        extra["groups"] = plgpu.SMEM((3, problem.groups), jnp.int32)
    if problem.v:
        extra["indices"] = plgpu.SMEM((stages, gather.ROWS), jnp.int32)
    if problem.packing is not None:
        extra |= {name: plgpu.Barrier(num_barriers=c.warpgroups) for name in ("part_ready", "part_packed")}
    if problem.epilogue.operand is not None or not problem.is_fp8:
        extra["operand_filled"] = plgpu.Barrier(num_barriers=c.warpgroups * c.store_slots)
    if problem.a != "sparse":
        a_shape = (c.tile_m, tile_k) if problem.a == "k_major" else (tile_k, c.tile_m)
        extra["values"] = plgpu.SMEM((stages, *a_shape), dtype, transforms=_swizzled(problem.dtype))
    else:
        shape = (c.tile_m, tile_k // 2) if in_rows else (c.tile_m // GRANULE, *tile_order.shape(dtype))
        in_smem = _swizzled(problem.dtype, SWIZZLE // 2) if in_rows else ()
        extra["values"] = plgpu.SMEM((stages, *shape), dtype, transforms=in_smem)
        words = (tile_k // GRANULE, 128) if problem.is_fp8 else (128,)
        extra["metadata"] = plgpu.SMEM((stages, c.tile_m // GRANULE, *words), jnp.int32)
    return extra | {
        "b": plgpu.SMEM((stages, *b_shape), jnp.dtype(problem.b_dtype), transforms=_swizzled(problem.b_dtype)),
        "chunks": plgpu.SMEM(
            (c.warpgroups, c.chunks(problem), *chunk), out_dtype, transforms=_swizzled(problem.out_dtype)
        ),
        "ring": ring.barriers(stages),
    }


def _block(gmem: dict, out_gmem, scratch: dict, problem: Problem, config: TileConfig):
    groups = gmem.get("groups")
    if problem.mode == "contraction":
        groups = scratch["groups"]
        sort_groups(gmem["groups"], groups, problem.k, problem.tile_k)
    schedule = Schedule(problem, config, groups)
    ring.initialize(scratch["ring"], config.stages, config.warpgroups, gathers=bool(problem.v))
    wg = lax.axis_index("wg")

    @pl.when(wg == config.warpgroups)
    def _load():
        plgpu.set_max_registers(config.load_registers(problem), action="decrease")
        if problem.v:
            _load_gathered(gmem, scratch, schedule)
        else:
            load = functools.partial(_load_tile, gmem, scratch, problem, config)
            _for_each_tile(schedule, load, jnp.int32(0))

    if problem.packing is not None:

        @pl.when(wg > config.warpgroups)
        def _pack():
            plgpu.set_max_registers(PACK_REGISTERS, action="decrease")
            for part in range(config.warpgroups):
                plgpu.barrier_arrive(scratch["part_packed"].at[part])  # nothing is to be packed yet
            _for_each_tile(schedule, functools.partial(_pack_tile, gmem, scratch, problem, config), jnp.int32(0))

    @pl.when(wg < config.warpgroups)
    def _compute():
        plgpu.set_max_registers(config.compute_registers(problem), action="increase")
        if _deferred(problem, config):
            compute = functools.partial(_compute_tile_deferred, out_gmem, scratch, problem, config)
            turn = (jnp.int32(0),) if _scales_late(problem, config) else ()
            state = (jnp.int32(0), _nothing_kept(problem, config), *turn)
            _, kept, *turn = _for_each_tile(schedule, compute, state)
            for chunk in range(len(_chunks(problem, config))):
                _store_chunk(out_gmem, scratch, problem, config, kept, chunk, *turn)
        else:
            compute = functools.partial(_compute_tile, gmem, out_gmem, scratch, problem, config)
            _for_each_tile(schedule, compute, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _for_each_tile(schedule: Schedule, visit, state):
    """visit(tile, state) -> state for each of this block's tiles; returns the last state."""
    sm, num_sms = lax.axis_index("sm"), lax.axis_size("sm")
    in_turns = schedule.problem.mode == "contraction"
    rounds = ceil_div(schedule.count() - (0 if in_turns else sm), num_sms)

    def round_(i, carry):
        cursor, state = carry
        # Where sizes fall from round to round, walk every other round backwards, or the first blocks get the most.
        block = jnp.where(lax.rem(i, 2) == 1, num_sms - 1 - sm, sm) if in_turns else sm
        cursor, tile = schedule.locate(cursor, i * num_sms + block)
        return cursor, visit(tile._replace(turn=i), state)

    _, state = lax.fori_loop(0, rounds, round_, (schedule.start(), state))
    return state


def _load_tile(gmem, scratch, problem: Problem, config: TileConfig, tile: Tile, step):
    c, order, tile_k = config, _token_order(problem, config), problem.tile_k

    def b_of(i, k, n):
        if order is not None:
            rows = ring.add(k, ring.multiply(i, tile_k))
            return (n, rows) if problem.b_k_major else (rows, n)
        rows, columns = ring.span(ring.add(k, ring.multiply(i, tile_k)), tile_k), ring.span(n, c.tile_n)
        return (columns, rows) if problem.b_k_major else (rows, columns)

    from_b = ring.Copy(gmem["b"], scratch["b"], _swizzled(problem.b_dtype), b_of, (tile.b_k, tile.b_n), order)
    from_a = _copies_of_a(gmem, scratch, problem, c, tile)
    if problem.stages_scales:
        scales.fill(gmem, scratch, c, tile.turn, _scale_row(problem, tile), tile.out_n, order)
    ring.load_stages([*from_a, from_b], scratch["ring"], c.stages, tile.steps, step)
    return step + tile.steps


def _copies_of_a(gmem, scratch, problem: Problem, config: TileConfig, tile: Tile, stage=0) -> list[ring.Copy]:
    """A's part of a tile's stages from `stage` on: stored values and metadata, or a dense A."""
    in_rows, tile_k, words_per_row = len(gmem["values"].shape) == 2, problem.tile_k, problem.tile_k // GRANULE
    scalars = (lax.div(tile.a_row, GRANULE), lax.div(tile.a_k, tile_k) + stage)

    def packed(i, row_tile, a_tile):
        return ring.span(row_tile, config.tile_m // GRANULE), ring.at(ring.add(a_tile, i))

    def words(i, row_tile, a_tile):
        if words_per_row == 1:
            return packed(i, row_tile, a_tile)
        first = ring.multiply(ring.add(a_tile, i), words_per_row)
        return ring.span(row_tile, config.tile_m // GRANULE), ring.span(first, words_per_row)

    def rows_of_a(i, row_tile, a_tile):
        stored = ring.multiply(ring.add(a_tile, i), tile_k // 2)
        return ring.span(ring.multiply(row_tile, GRANULE), config.tile_m), ring.span(stored, tile_k // 2)

    def dense_a(i, row_tile, a_tile):
        rows = ring.span(ring.multiply(row_tile, GRANULE), config.tile_m)
        columns = ring.span(ring.multiply(ring.add(a_tile, i), tile_k), tile_k)
        return (rows, columns) if problem.a == "k_major" else (columns, rows)

    if problem.a != "sparse":
        return [ring.Copy(gmem["values"], scratch["values"], _swizzled(problem.dtype), dense_a, scalars)]
    transforms, slice_of = (_swizzled(problem.dtype, SWIZZLE // 2), rows_of_a) if in_rows else ((), packed)
    return [
        ring.Copy(gmem["values"], scratch["values"], transforms, slice_of, scalars),
        ring.Copy(gmem["metadata"], scratch["metadata"], (), words, scalars),
    ]


def _load_gathered(gmem, scratch, schedule: Schedule) -> None:
    """Fill the stages of all of this block's tiles with A and with gathered rows of B."""
    p, c = schedule.problem, schedule.config
    steps, tiles, num_sms = p.k // TILE_K, schedule.count(), lax.axis_size("sm")

    def tile_of(round_) -> Tile:
        """After this block's last tile some other one, whose indices are copied for nothing."""
        return schedule.locate(schedule.start(), jnp.minimum(round_ * num_sms + lax.axis_index("sm"), tiles - 1))[1]

    def load_tile(round_, step):
        near, *_ = next_in_place(0, c.stages, steps)
        tile, (near_row, far_row) = tile_of(round_), (tile_of(round_ + near + i).a_row for i in range(2))

        def load_stage(i, step):
            _, is_far, next_stage = next_in_place(i, c.stages, steps)
            now = gather.Place(lax.div(tile.a_row, p.v), i * TILE_K)
            later = gather.Place(lax.div(jnp.where(is_far, far_row, near_row), p.v), next_stage * TILE_K)
            ring.await_emptied(scratch["ring"], c.stages, step)
            b_smem, indices = (scratch[name].at[lax.rem(step, c.stages)] for name in ("b", "indices"))
            is_first = jnp.int32(step < c.stages)
            gather.begin_copies(
                gmem["columns"], gmem["b"], b_smem, indices, now, later, is_first, tile.b_n, transforms=_SWIZZLED
            )
            if c.gather_lag:
                gather.end_stage()
            else:
                ring.arrive_filled(scratch["ring"], c.stages, step, as_copied=True)
            ring.load_stages(_copies_of_a(gmem, scratch, p, c, tile, i), scratch["ring"], c.stages, 1, step)
            if c.gather_lag:
                _announce(scratch, c, step + 1, c.gather_lag + 1, pending=c.gather_lag)
            return step + 1

        return lax.fori_loop(0, steps, load_stage, step)

    rounds = ceil_div(tiles - lax.axis_index("sm"), num_sms)
    step = lax.fori_loop(0, rounds, load_tile, jnp.int32(0))
    for lag in range(c.gather_lag, 0, -1):
        _announce(scratch, c, step, lag)


def _token_order(problem: Problem, config: TileConfig) -> ring.TokenOrder | None:
    if problem.packing is not None:
        return ring.TokenFours(problem.packing.interleaved, problem.tile_k)
    return ring.Interleaved(config.tile_n) if problem.b_interleaved else None


def _announce(scratch, config: TileConfig, step, lag: int, pending: int = 0):
    """Tell the computing warpgroups of the gathered rows of stage `step - lag`, if there is one."""

    @pl.when(step >= lag)
    def _():
        gather.wait_for_copies(pending)
        ring.arrive_filled(scratch["ring"], config.stages, step - lag)


def _compute_tile(gmem, out_gmem, scratch, problem: Problem, config: TileConfig, tile: Tile, step):
    acc = _scaled_product(scratch, problem, config, tile, step)
    wg, m, n = _part_of_tile(config)
    if problem.packing is not None:
        plgpu.barrier_wait(scratch["part_packed"].at[wg])
        packing.hand_over(acc.astype(problem.packed_dtype), scratch["chunks"].at[wg], problem)
        plgpu.barrier_arrive(scratch["part_ready"].at[wg])
        return step + tile.steps
    _store(acc, gmem, out_gmem, scratch, problem, config, tile, wg, m, n)
    return step + tile.steps


def _scaled_product(scratch, problem: Problem, config: TileConfig, tile: Tile, *multiplied):
    """This warpgroup's sums of a tile times their scales, unless these are left to the stores of the next tile."""
    acc = _multiply(scratch, problem, config, tile, *multiplied)
    if not problem.stages_scales:
        return acc
    scales.wait(scratch, tile.turn)
    if not _scales_late(problem, config):
        _, m, n = _part_of_tile(config)
        acc = scales.apply(acc, scales.of_part(scratch, config, tile.turn, m, n), problem)
        scales.give_back(scratch, tile.turn)
    return acc


def _scales_late(problem: Problem, config: TileConfig) -> bool:
    """Whether results are rounded first and scaled when they are stored, behind the products of the next tile."""
    e = problem.epilogue
    commutes = e.powers_of_two and e.activation != "relu2" and problem.out_dtype == "bfloat16"
    return problem.stages_scales and commutes and _deferred(problem, config)


def _scale_row(problem: Problem, tile: Tile):
    """The row scale of a tile's first row."""
    return tile.a_row if problem.mode == "columns" else tile.out_m


def _pack_tile(gmem, scratch, problem: Problem, config: TileConfig, tile: Tile, state):
    """Pack a tile, part by part, while the warpgroups that computed it compute the next one."""
    for part in range(config.warpgroups):
        m, n = divmod(part, config.warpgroups_n)
        plgpu.barrier_wait(scratch["part_ready"].at[part])
        packing.pack(gmem, scratch["chunks"].at[part], problem, config, tile, m, n)
        plgpu.barrier_arrive(scratch["part_packed"].at[part])
    return state


class _Kept(NamedTuple):
    """A warpgroup's finished result, rounded, and where it belongs."""

    values: Any
    m: Any
    n: Any
    m_end: Any
    n_end: Any


def _deferred(problem: Problem, config: TileConfig) -> bool:
    e = problem.epilogue
    two_bytes = jnp.dtype(problem.out_dtype).itemsize == 2
    reads = e.operand is not None or (e.row_scale and not problem.stages_scales)
    return config.deferred and two_bytes and not reads and problem.packing is None


def _nothing_kept(problem: Problem, config: TileConfig) -> _Kept:
    nowhere = jnp.int32(0)
    return _Kept(_zeros(config).astype(problem.out_dtype), nowhere, nowhere, nowhere, nowhere)


def _compute_tile_deferred(out_gmem, scratch, problem: Problem, config: TileConfig, tile: Tile, state):
    """Multiply a tile; behind its first products, store what is kept of the tile before."""
    step, kept, *_ = state
    acc = _scaled_product(scratch, problem, config, tile, step, kept, out_gmem)
    _, m, n = _part_of_tile(config)
    rounded = _activate(acc, problem).astype(problem.out_dtype)
    where = (jnp.int32(i) for i in (tile.out_m + m, tile.out_n + n, tile.m_end, tile.n_end))
    state = step + tile.steps, _Kept(rounded, *where)
    if not _scales_late(problem, config):
        return state

    @pl.when(tile.turn > 0)
    def _():
        scales.give_back(scratch, tile.turn - 1)

    return *state, tile.turn


def _store_chunk(out_gmem, scratch, problem: Problem, config: TileConfig, kept: _Kept, chunk: int, turn=None):
    """Store a chunk of what is kept of the block's last tile; `turn`: which it was, where it is still to be scaled."""
    columns = chunk_columns(problem.out_dtype)
    layout = plgpu.Layout.WGMMA_TRANSPOSED if problem.transpose_out else plgpu.Layout.WGMMA
    i, j = _chunks(problem, config)[chunk]
    chunk_m, chunk_n = kept.m + i, kept.n + j
    rows, cols = _span(chunk_m, GRANULE), _span(chunk_n, columns, columns)
    slot = scratch["chunks"].at[lax.axis_index("wg"), chunk % config.store_slots]
    view = slot.T if problem.transpose_out else slot
    # All earlier stores have left shared memory long ago: there were products in between.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    part = kept.values[i : i + GRANULE, j : j + columns]
    if turn is not None:
        _, m, n = _part_of_tile(config)
        factors = scales.of_part(scratch, config, turn, m, n)
        part = scales.apply(part.astype(jnp.float32), factors, problem, i, j).astype(part.dtype)
    view[...] = plgpu.layout_cast(part, layout)
    plgpu.commit_smem()
    where = (cols, rows) if problem.transpose_out else (rows, cols)
    owned = (chunk_m < kept.m_end) & (chunk_n < kept.n_end)
    plgpu.copy_smem_to_gmem(slot, out_gmem.at[where], predicate=owned)


def _chunks(problem: Problem, config: TileConfig) -> list[tuple[int, int]]:
    """First row and column of each chunk of a warpgroup's part."""
    columns = chunk_columns(problem.out_dtype)
    return [(i, j) for i in range(0, config.warpgroup_m, GRANULE) for j in range(0, config.warpgroup_n, columns)]


def _part_of_tile(config: TileConfig):
    """This warpgroup's index, and the first row and column of its part of the tile."""
    wg = lax.axis_index("wg")
    wg_m, wg_n = (wg, 0)
    if config.warpgroups_n > 1:
        wg_m, wg_n = lax.div(wg, config.warpgroups_n), lax.rem(wg, config.warpgroups_n)
    return wg, wg_m * config.warpgroup_m, wg_n * config.warpgroup_n


def _zeros(config: TileConfig):
    return plgpu.layout_cast(jnp.zeros((config.warpgroup_m, config.warpgroup_n), jnp.float32), plgpu.Layout.WGMMA)


def _multiply(
    scratch, problem: Problem, config: TileConfig, tile: Tile, step, kept: _Kept | None = None, out_gmem=None
):
    """This warpgroup's part of a tile, whose stages begin with the ring's `step`; stores what is `kept` meanwhile."""
    c, sparse, values = config, problem.a == "sparse", scratch["values"]
    wg, m, n = _part_of_tile(config)
    row_tiles, layout = pl.ds(lax.div(m, GRANULE), c.warpgroup_m // GRANULE), _swizzled(problem.dtype)
    if problem.a == "m_major":
        values = values.at[:, :, _span(m, c.warpgroup_m)]
    elif not sparse or len(values.shape) == 3:
        values = values.at[:, _span(m, c.warpgroup_m)]
        layout = _swizzled(problem.dtype, SWIZZLE // 2) if sparse else layout
    else:
        values, layout = values.at[:, row_tiles], ()
    b = scratch["b"]
    if c.tile_n > c.warpgroup_n:
        columns = _span(n, c.warpgroup_n)
        b = b.at[:, columns] if problem.b_k_major else b.at[:, :, columns]
    shape = (c.warpgroup_m, c.warpgroup_n)
    types = [plgpu.RefType(layout), plgpu.RefType(_swizzled(problem.b_dtype)), plgpu.RefType()]
    operands = [values, b, scratch["ring"]]
    if sparse:
        types.append(plgpu.RefType())
        operands.append(scratch["metadata"].at[:, row_tiles])
    count = len(operands)
    scalars = [step, jnp.int32(tile.steps)]
    late = kept is not None and _scales_late(problem, config)
    if kept is not None:
        types += [plgpu.Layout.WGMMA, plgpu.RefType(_SWIZZLED), plgpu.RefType()]
        operands += [kept.values, scratch["chunks"].at[wg], out_gmem]
        scalars += kept[1:]
    if late:
        types += [plgpu.RefType()] * 2
        operands += scales.of_part(scratch, config, tile.turn + SCALE_SLOTS - 1, m, n)

    @plgpu.inline_mgpu(
        arg_types=(*types, *(ring.SCALAR,) * len(scalars)),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def multiply(launch, *arguments):
        stages, stored = main_loop.Stages(*arguments[:count]), arguments[count : len(operands)]
        step, steps, *place = (scalar.registers.item() for scalar in arguments[len(operands) :])
        deferred = None
        if stored:
            rounded, chunks, out, *factors = stored
            # Private, but the only way to a description of the output for PTX of our own.
            descriptor = launch._get_tma_desc(out, (), None, (GRANULE, chunk_columns(problem.out_dtype)), SWIZZLE, None)
            deferred = main_loop.Deferred(rounded, tuple(place), chunks, descriptor, problem.transpose_out)
            if late:
                there = (problem.epilogue.row_scale, problem.epilogue.column_scale)
                rows, columns = (smem if is_there else None for smem, is_there in zip(factors, there, strict=True))
                deferred = deferred._replace(row_scales=rows, column_scales=columns)
        fences = bool(problem.v) and not config.gather_lag
        options: dict[str, Any] = {
            "b_k_major": problem.b_k_major,
            "dtype": problem.dtype,
            "a": problem.a,
            "fences": fences,
        }
        options |= {"b_dtype": problem.b_dtype, "promote": config.promote // problem.tile_k}
        return main_loop.multiply(shape, stages, step, steps, deferred, **options)

    return multiply(*operands, *scalars)


def _activate(part, problem: Problem):
    """The epilogue's arithmetic without arrays."""
    e = problem.epilogue
    if e.alpha != 1.0:
        part = part * e.alpha
    if e.activation is not None:
        part = jnp.maximum(part, 0.0)
    return part * part if e.activation == "relu2" else part


def _store(acc, gmem, out_gmem, scratch, problem: Problem, config: TileConfig, tile: Tile, wg, m, n):
    """Apply the epilogue to this warpgroup's accumulators and send them off chunk by chunk."""
    p, c, e = problem, config, problem.epilogue
    columns = chunk_columns(p.out_dtype)
    layout = plgpu.Layout.WGMMA_TRANSPOSED if p.transpose_out else plgpu.Layout.WGMMA
    chunks = _chunks(p, c)
    for first in range(0, len(chunks), c.store_slots):
        batch = chunks[first : first + c.store_slots]
        # The slots' last stores must have left shared memory before the slots are written again.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        copies = []
        for slot, (i, j) in enumerate(batch):
            chunk_m, chunk_n = tile.out_m + m + i, tile.out_n + n + j
            rows, cols = _span(chunk_m, GRANULE), _span(chunk_n, columns, columns)
            where = (cols, rows) if p.transpose_out else (rows, cols)
            owned = (chunk_m < tile.m_end) & (chunk_n < tile.n_end)
            chunk_smem = scratch["chunks"].at[wg, slot]
            copies.append((chunk_smem, where, owned))
            if e.operand is not None:
                barrier = scratch["operand_filled"].at[wg * c.store_slots + slot]
                plgpu.copy_gmem_to_smem(gmem["operand"].at[where], chunk_smem, barrier)
        for slot, (i, j) in enumerate(batch):
            chunk_smem, (_, _), _ = copies[slot]
            view = chunk_smem.T if p.transpose_out else chunk_smem
            part = acc[i : i + GRANULE, j : j + columns]
            if e.row_scale and not p.stages_scales:
                rows = _span(_scale_row(p, tile) + m + i, GRANULE)
                scale = plgpu.load(gmem["row_scale"].at[rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                part = part * lax.broadcast_in_dim(scale, part.shape, (0,))
            part = _activate(part, p)
            if e.operand is not None:
                plgpu.barrier_wait(scratch["operand_filled"].at[wg * c.store_slots + slot])
                part = plgpu.layout_cast(part, layout)
                saved = plgpu.load(view, layout=layout).astype(jnp.float32)
                part = part * saved if e.operand == "multiply" else part + saved
            view[...] = plgpu.layout_cast(part.astype(p.out_dtype), layout)
        plgpu.commit_smem()
        for chunk_smem, where, owned in copies:
            plgpu.copy_smem_to_gmem(chunk_smem, out_gmem.at[where], predicate=owned)
