"""Row and column scales on their way to the epilogue: read before a tile's products, there when they end.

Read from memory when the products have ended, scales would cost their latency in each tile. So each thread of a
warpgroup reads a few of those of its part before the products, puts them into shared memory behind them, and takes from
there those of the two rows and of the columns that it owns. (Copies with `cp.async` instead would be waited for by the
fence of the first chunk that is stored behind the products.)

Where scales are powers of two and the result is bfloat16, sums may be rounded before they are scaled: then the scaling
passes behind the next tile's products too, with the stores (`main_loop.Deferred`).
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
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


def load(gmem: dict, problem: Problem, config: TileConfig, first_row, first_column, order):
    """The scales of a part of a tile whose rows and columns begin there, some in each thread: f32 [128 x turns].

    Past the end of a vector its last entry is read, for a row or a column that is not stored.

    Args:
      order: the `ring.TokenFours` in which columns were loaded, or None.
    """
    counts = _counts(problem, config)
    names, turns = tuple(counts), _turns(problem, config)
    layout = plgpu.Layout.WG_STRIDED((turns * utils.WARPGROUP_SIZE,), vec_size=1)
    shape = plgpu.ShapeDtypeStruct((turns * utils.WARPGROUP_SIZE,), jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * len(names), *(ring.SCALAR,) * 2), return_type=shape)
    def read(_, *arguments):
        vectors = dict(zip(names, arguments, strict=False))
        firsts = (Word(scalar.registers.item()) for scalar in arguments[len(names) :])
        first = dict(zip(("row_scale", "column_scale"), firsts, strict=True))

        def source(name: str, entry: Word) -> ir.Value:
            place, size = first[name] + entry, ir.MemRefType(vectors[name].type).shape[0]
            if name == "column_scale" and order is not None:
                place = order.token(place, size)
            place = arith.minui(place.value, to_value(size - 1))
            start = llvm.ptrtoint(_i64(), utils.memref_ptr(vectors[name]))
            return arith.addi(start, arith.muli(arith.extui(_i64(), place), arith.constant(_i64(), 4)))

        registers = []
        for turn in range(turns):
            entry = _entry(turn, problem, config)
            address = source(names[-1], entry - (sum(counts.values()) - counts[names[-1]]))
            if len(names) == 2:
                is_row = arith.cmpi(arith.CmpIPredicate.ult, entry.value, to_value(counts["row_scale"]))
                address = arith.select(is_row, source("row_scale", entry), address)
            # With side effects, so that nobody moves it behind the products.
            code = "ld.global.nc.b32 $0, [$1];"
            (value,) = utils.inline_ptx(code, address, result_types=[i32()], has_side_effects=True)
            registers.append(utils.bitcast(value, ir.VectorType.get((1,), ir.F32Type.get())))
        layout = fa.WGStridedFragLayout((turns * utils.WARPGROUP_SIZE,), 1)
        return fa.FragmentedArray(_registers=np.array(registers, dtype=object), _layout=layout, _is_signed=None)

    return read(*(gmem[name] for name in names), jnp.int32(first_row), jnp.int32(first_column))


def put(scales, scales_smem, problem: Problem, config: TileConfig) -> None:
    """Write what the threads have read to this warpgroup's shared memory, f32 [rows + columns of the part].

    Nobody reads the scales of the tile before any more: there were products in between, or barriers.
    """
    skipped = 0 if problem.epilogue.row_scale else config.warpgroup_m
    layout = plgpu.Layout.WG_STRIDED(scales.shape, vec_size=1)

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    def write(_, scales, scales_smem):
        target = Word(llvm.ptrtoint(i32(), utils.memref_ptr(scales_smem)))
        for turn, register in enumerate(scales.registers.flat):
            address = target + (_entry(turn, problem, config) + skipped) * 4
            value = utils.bitcast(register, i32())
            utils.inline_ptx("st.shared.b32 [$0], $1;", address.value, value, has_side_effects=True)

    write(scales, scales_smem)


def wait() -> None:
    """Wait for what the warpgroup's threads have put."""

    @plgpu.inline_mgpu()
    def barrier(_):
        utils.warpgroup_barrier()

    barrier()


def apply(part, scales_smem, problem: Problem, config: TileConfig, row: int = 0, column: int = 0):
    """Sums [m, n], in WGMMA layout, times the scales that are in shared memory; the first row and column of a part."""
    e = problem.epilogue
    for axis, (is_there, first) in enumerate(((e.row_scale, row), (e.column_scale, config.warpgroup_m + column))):
        if is_there:
            layout = plgpu.Layout.WGMMA.reduce(1 - axis)
            scale = plgpu.load(scales_smem.at[pl.ds(first, part.shape[axis])], layout=layout, optimized=False)
            part = part * lax.broadcast_in_dim(scale, part.shape, (axis,))
    return part


def _counts(problem: Problem, config: TileConfig) -> dict[str, int]:
    """How many scales of each kind a part has."""
    e = problem.epilogue
    found = {"row_scale": config.warpgroup_m} if e.row_scale else {}
    return found | ({"column_scale": config.warpgroup_n} if e.column_scale else {})


def _turns(problem: Problem, config: TileConfig) -> int:
    """Scales that a thread reads."""
    return -(-sum(_counts(problem, config).values()) // utils.WARPGROUP_SIZE)


def _entry(turn: int, problem: Problem, config: TileConfig) -> Word:
    """Which of a part's scales a thread reads in a turn; past the last one, that one once more."""
    thread = Word(utils.thread_idx()) % utils.WARPGROUP_SIZE
    last = sum(_counts(problem, config).values()) - 1
    return Word(arith.minui((thread + turn * utils.WARPGROUP_SIZE).value, to_value(last)))


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)
