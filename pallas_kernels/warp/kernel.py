"""out[m, n] = epilogue(A[m, k] B[k, n]) with A 2:4 sparse along k, whole or over ragged groups, by `mma.sp`.

Persistent blocks of four or eight warps, one or two to a multiprocessor. All warps of a block load, multiply and store
(main_loop.py, result.py); which tile comes next is the Hopper kernel's schedule.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils

from pallas_kernels.hopper.mlir_words import Word
from pallas_kernels.schedule import Schedule, Tile, for_each_tile, sort_groups
from pallas_kernels.tiles import Problem
from pallas_kernels.warp.copies import Layout, Place
from pallas_kernels.warp.main_loop import Warp
from pallas_kernels.warp.result import Region, Result
from pallas_kernels.warp.tiles import WarpTile
from pallas_kernels.warp.words import MlirMachine

_SCALAR = plgpu.Layout.WG_SPLAT


def matmul(
    values,
    metadata,
    b,
    *,
    problem: Problem,
    tile: WarpTile,
    num_sms: int,
    groups=None,
    columns=None,
    operand=None,
    row_scale=None,
    column_scale=None,
) -> jax.Array:
    """Launch the kernel; shapes have been checked by the callers (the ops' api.py).

    Args:
      values: stored entries of A tile by tile (tile_order.py), [m / 64, k / 64, 8, 256], or row by row, [m, k / 2].
      metadata: uint32 [m / 64, k / 64, 128].
      b: [k, n], or [n, k] when `problem.b_k_major`; for rows' groups k runs over groups x k.
      groups: None, or int32 [G], the rows of each group.
      columns: where `problem.v` is set, int32 [m / v, k]: the row of b [any, n] for each column of A; any other index
        stands for a row of zeros.
      operand: an array of the output's shape for the epilogue.
      row_scale, column_scale: f32 [`problem.scale_entries`], for rows of A's side over all groups, and [n].
    """
    tile.check(problem)
    beyond = max(tile.tile_m, tile.tile_n)  # a tile at the edge reads scales that it does not use
    operands = {"values": values, "metadata": metadata, "b": b, "groups": groups}
    operands |= {"columns": columns, "operand": operand}
    operands |= {
        name: None if scale is None else jnp.pad(scale, (0, beyond))
        for name, scale in (("row_scale", row_scale), ("column_scale", column_scale))
    }
    operands = {name: _signed(array) for name, array in operands.items() if array is not None}
    names = (*operands, "out")
    layout = Layout(problem, tile, *_extents(values, b, problem))
    scratch = {"shared": plgpu.SMEM((tile.smem_bytes // 4,), jnp.int32)}
    if problem.mode == "contraction":
        scratch["groups"] = plgpu.SMEM((3, problem.groups), jnp.int32)

    def body(*refs):
        *arrays, scratch = refs
        _block(dict(zip(names, arrays, strict=True)), scratch, layout)

    launch = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(problem.out_shape, problem.out_dtype),
        scratch_types=[scratch],
        grid=(num_sms * tile.blocks_per_sm,),
        grid_names=("sm",),
        num_threads=tile.threads // utils.WARPGROUP_SIZE,
        thread_name="wg",
        # Safe here: the threads' own barriers order everything that they read and write in shared memory.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    # Under `jax.vmap` one launch after the other, each of which fills the GPU.
    return jax.custom_batching.sequential_vmap(launch)(*operands.values())


def _extents(values, b, problem: Problem) -> tuple[bool, int, int, int]:
    """Whether A comes in rows, how many rows it has, and how many columns and rows B has."""
    in_rows = values.ndim == 2
    b_rows, b_columns = b.shape[::-1] if problem.b_k_major else b.shape
    return in_rows, values.shape[0] * (1 if in_rows else 64), b_columns, b_rows


def _signed(array):
    """Mosaic has no unsigned words."""
    return lax.bitcast_convert_type(array, jnp.int32) if array.dtype == jnp.uint32 else array


def _block(gmem: dict, scratch: dict, layout: Layout) -> None:
    problem, tile, groups = layout.problem, layout.tile, gmem.get("groups")
    if problem.mode == "contraction":
        groups = scratch["groups"]
        sort_groups(gmem["groups"], groups, problem.k, problem.tile_k)
    schedule = Schedule(problem, tile, groups)

    def visit(now: Tile, following: Tile, has_next, state):
        step, filled = state
        prefetch = (has_next & (now.steps >= tile.stages)).astype(jnp.int32)
        slot = lax.rem(step, tile.stages) * tile.stage_bytes
        _compute(gmem, scratch["shared"], layout, now, following, slot, filled, prefetch)
        return step + now.steps, prefetch

    for_each_tile(schedule, visit, (jnp.int32(0), jnp.int32(0)))


def _compute(gmem: dict, shared_smem, layout: Layout, now: Tile, following: Tile, slot, filled, prefetch) -> None:
    """Multiply and store one tile."""
    names = [name for name in gmem if name != "groups"]
    scalars = [
        *(getattr(place, field) for place in (now, following) for field in Place._fields),
        *(now.out_m, now.out_n, now.m_end, now.n_end),
        now.a_row if layout.problem.mode == "columns" else now.out_m,
        *(slot, filled, prefetch),
    ]

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * (len(names) + 1), *(_SCALAR,) * len(scalars)))
    def thread(_, *arguments):
        pointers = [utils.memref_ptr(ref) for ref in arguments[: len(names) + 1]]
        words = [Word(scalar.registers.item()) for scalar in arguments[len(names) + 1 :]]
        size = len(Place._fields)
        here, there, region, (slot, filled, prefetch) = (
            Place(*words[:size]), Place(*words[size : 2 * size]), Region(*words[2 * size : -3]), words[-3:]
        )  # fmt: skip
        machine = MlirMachine(
            dict(zip(names, pointers, strict=False)), pointers[-1], layout.problem.dtype, layout.problem.out_dtype
        )
        warp = Warp(machine, layout)
        Result(warp, region).store(warp.multiply(here, there, slot, filled, prefetch))

    thread(*(gmem[name] for name in names), shared_smem, *(jnp.int32(scalar) for scalar in scalars))
