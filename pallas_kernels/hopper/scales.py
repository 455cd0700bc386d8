"""Row and column scales on their way to the epilogue: begun before a tile's products, there when they end.

Read from memory when the products have ended, scales would cost their latency in each tile, 6 to 15 % of the time of a
product of 8 bits. A warpgroup copies those of its part to shared memory with `cp.async`, which nobody waits for until
the tile's sums are there; then a thread reads the two rows and the columns that it owns.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper import ring
from pallas_kernels.hopper.mlir_words import Word, i32, to_value
from pallas_kernels.tiles import Problem, TileConfig


def scratch(problem: Problem, config: TileConfig) -> dict:
    """Shared memory for the scales of each warpgroup's part: of its rows, then of its columns."""
    if not problem.stages_scales:
        return {}
    return {"scales": plgpu.SMEM((config.warpgroups, config.warpgroup_m + config.warpgroup_n), jnp.float32)}


def begin(gmem: dict, scales_smem, problem: Problem, config: TileConfig, first_row, first_column, order) -> None:
    """Begin to copy the scales of a part of a tile whose rows and columns begin there.

    Past the end of a vector its last entry is copied, for a row or a column that is not stored.

    Args:
      scales_smem: f32 [rows + columns of the part], this warpgroup's.
      order: the `ring.TokenFours` in which columns were loaded, or None.
    """
    names = [name for name in ("row_scale", "column_scale") if name in gmem]
    counts = {"row_scale": config.warpgroup_m, "column_scale": config.warpgroup_n}
    copied = sum(counts[name] for name in names)
    skipped = 0 if "row_scale" in gmem else config.warpgroup_m

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * (len(names) + 1), *(ring.SCALAR,) * 2))
    def copy(_, scales_smem, *rest):
        vectors = dict(zip(names, rest, strict=False))
        first = {name: Word(s.registers.item()) for name, s in zip(counts, rest[len(names) :], strict=True)}
        target = Word(llvm.ptrtoint(i32(), utils.memref_ptr(scales_smem)))
        thread = Word(utils.thread_idx()) % utils.WARPGROUP_SIZE

        def source(name: str, entry: Word) -> ir.Value:
            vector, place = vectors[name], first[name] + entry
            size = ir.MemRefType(vector.type).shape[0]
            if name == "column_scale" and order is not None:
                place = order.token(place, size)
            place = arith.minui(place.value, to_value(size - 1))
            start = llvm.ptrtoint(_i64(), utils.memref_ptr(vector))
            return arith.addi(start, arith.muli(arith.extui(_i64(), place), arith.constant(_i64(), 4)))

        # The scales of the tile before may still be on their way to another thread's registers.
        utils.warpgroup_barrier()
        for turn in range(0, copied, utils.WARPGROUP_SIZE):
            # Past the last one, that one once more.
            entry = Word(arith.minui((thread + turn).value, to_value(copied - 1)))
            if len(names) == 1:
                address = source(names[0], entry)
            else:
                rows = counts["row_scale"]
                is_row = arith.cmpi(arith.CmpIPredicate.ult, entry.value, to_value(rows))
                address = arith.select(is_row, source("row_scale", entry), source("column_scale", entry - rows))
            code = "cp.async.ca.shared.global [$0], [$1], 4;"
            utils.inline_ptx(code, (target + (entry + skipped) * 4).value, address, has_side_effects=True)

    copy(scales_smem, *(gmem[name] for name in names), jnp.int32(first_row), jnp.int32(first_column))


def apply(acc, scales_smem, problem: Problem, config: TileConfig):
    """The sums [m, n] of a warpgroup, in WGMMA layout, times the scales that `begin` has copied."""
    e, rows = problem.epilogue, config.warpgroup_m

    @plgpu.inline_mgpu()
    def wait(_):
        utils.inline_ptx("cp.async.wait_all;", has_side_effects=True)
        utils.warpgroup_barrier()

    wait()
    for axis, (is_there, span) in enumerate(
        ((e.row_scale, pl.ds(0, rows)), (e.column_scale, pl.ds(rows, config.warpgroup_n)))
    ):
        if is_there:
            layout = plgpu.Layout.WGMMA.reduce(1 - axis)
            scale = plgpu.load(scales_smem.at[span], layout=layout, optimized=False)
            acc = acc * lax.broadcast_in_dim(scale, acc.shape, (axis,))
    return acc


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)
