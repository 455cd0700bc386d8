"""Row and column scales in shared memory, there when a tile's sums are.

Nothing that a computing warpgroup begins to read from memory may be on its way while it multiplies: ptxas waits for it
before the loop, a fence in the loop, and either costs a microsecond in each tile. So three warps of the loading
warpgroup, which else have nothing to do, fill slots of shared memory tiles ahead.

Where scales are powers of two and the result is bfloat16, sums may be rounded before they are scaled: then the scaling
passes behind the next tile's products, with the stores (`main_loop.Deferred`).
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.hopper import ring
from pallas_kernels.hopper.mlir_words import Word, i32, to_value
from pallas_kernels.tiles import SCALE_SLOTS, Problem, TileConfig

_WARP = 32


def scratch(problem: Problem, config: TileConfig) -> dict:
    """Slots for the scales of a tile's rows, then of its columns, and their barriers."""
    if not problem.stages_scales:
        return {}
    return {
        "scales": plgpu.SMEM((SCALE_SLOTS, config.tile_m + config.tile_n), jnp.float32),
        "scales_filled": plgpu.Barrier(num_barriers=SCALE_SLOTS),
        "scales_emptied": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=SCALE_SLOTS),
    }


def fill(gmem: dict, scratch: dict, config: TileConfig, turn, first_row, first_column, order) -> None:
    """Write the scales of the block's `turn`-th tile, from the loading warpgroup; waits for a free slot.

    Past the end of a vector its last entry is read, for a row or a column that is not stored.

    Args:
      order: the `ring.TokenFours` in which columns were loaded, or None.
    """
    slot = lax.rem(turn, SCALE_SLOTS)

    @pl.when(turn >= SCALE_SLOTS)
    def _():
        plgpu.barrier_wait(scratch["scales_emptied"].at[slot])

    for name, first, at, count in (
        ("row_scale", first_row, 0, config.tile_m),
        ("column_scale", first_column, config.tile_m, config.tile_n),
    ):
        if name in gmem:
            part = scratch["scales"].at[slot, pl.ds(at, count)]
            _copy(gmem[name], part, jnp.int32(first), count, order if name == "column_scale" else None)
    plgpu.barrier_arrive(scratch["scales_filled"].at[slot])


def _copy(vector_gmem, part_smem, first, count: int, order) -> None:
    threads = utils.WARPGROUP_SIZE - _WARP  # the first warp begins the copies of stages

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), ring.SCALAR))
    def copy(_, vector, part, first):
        size, first = ir.MemRefType(vector.type).shape[0], Word(first.registers.item())
        start, target = llvm.ptrtoint(_i64(), utils.memref_ptr(vector)), llvm.ptrtoint(i32(), utils.memref_ptr(part))
        thread = Word(utils.thread_idx()) % utils.WARPGROUP_SIZE
        own = scf.IfOp(arith.cmpi(arith.CmpIPredicate.uge, thread.value, to_value(_WARP)))
        with ir.InsertionPoint(own.then_block):
            for turn in range(0, count, threads):
                # Past the last entry, that one once more.
                entry = Word(arith.minui((thread - _WARP + turn).value, to_value(count - 1)))
                place = first + entry if order is None else order.token(first + entry, size)
                place = arith.minui(place.value, to_value(size - 1))
                address = arith.addi(start, arith.muli(arith.extui(_i64(), place), arith.constant(_i64(), 4)))
                code = "ld.global.nc.b32 $0, [$1];"
                (value,) = utils.inline_ptx(code, address, result_types=[i32()], has_side_effects=True)
                to = Word(target) + entry * 4
                utils.inline_ptx("st.shared.b32 [$0], $1;", to.value, value, has_side_effects=True)
            scf.yield_([])

    copy(vector_gmem, part_smem, first)


def wait(scratch: dict, turn) -> None:
    """Wait, in a computing warpgroup, for the scales of the block's `turn`-th tile."""
    plgpu.barrier_wait(scratch["scales_filled"].at[lax.rem(turn, SCALE_SLOTS)])


def give_back(scratch: dict, turn) -> None:
    """Say, from a computing warpgroup, that nobody in it needs them any more."""
    plgpu.barrier_arrive(scratch["scales_emptied"].at[lax.rem(turn, SCALE_SLOTS)])


def of_part(scratch: dict, config: TileConfig, turn, m, n) -> tuple:
    """The scales of the rows and of the columns of a warpgroup's part that begins there, in shared memory."""
    slot, starts = lax.rem(turn, SCALE_SLOTS), (m, config.tile_m + n)
    sizes = (config.warpgroup_m, config.warpgroup_n)
    return tuple(scratch["scales"].at[slot, pl.ds(start, size)] for start, size in zip(starts, sizes, strict=True))


def apply(part, of_part: tuple, problem: Problem, row: int = 0, column: int = 0):
    """Sums [m, n], in WGMMA layout, times their scales; `row`, `column`: where they begin in the warpgroup's part."""
    e = problem.epilogue
    for axis, (is_there, first) in enumerate(((e.row_scale, row), (e.column_scale, column))):
        if is_there:
            layout = plgpu.Layout.WGMMA.reduce(1 - axis)
            span = pl.ds(first, part.shape[axis])
            scale = plgpu.load(of_part[axis].at[span], layout=layout, optimized=False)
            part = part * lax.broadcast_in_dim(scale, part.shape, (axis,))
    return part


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)
