"""The ring of stages in shared memory: one thread fills it, the computing warpgroups empty it.

A stage is one step of 64 columns of A (128 of 8 bits) with their metadata and as many rows of B. Each stage has two
barriers in shared memory, `filled` and `emptied`. Pallas's own barriers count every thread of a warpgroup, 128 arrivals
for each copy and each release; these count one, the thread that acts for all, as the tensor core's own completion
orders the rest.

Steps are counted over all tiles of a block: step s uses stage s mod S for the (s div S)-th time.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import launch_context, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, scf

from pallas_kernels.hopper.mlir_words import Word, i32

_BARRIER_WORDS = 2  # a barrier is 64 bits, the shared memory of 32
_WAIT_TICKS = 10_000_000
SCALAR = plgpu.Layout.WG_SPLAT


def barriers(stages: int):
    """Scratch memory for the barriers of a ring."""
    return plgpu.SMEM((2 * stages * _BARRIER_WORDS,), jnp.int32)


def initialize(barriers_smem, stages: int, consumers: int, *, gathers: bool) -> None:
    """Set the barriers up; every thread of the block must come here.

    Where the loading warpgroup gathers, each of its threads copies and arrives, beside the one that starts boxes.
    """
    loaders = 1 + utils.WARPGROUP_SIZE * gathers

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def init(_, words):
        first = utils.single_thread_predicate(utils.ThreadSubset.BLOCK)
        for i in range(2 * stages):
            count = _i32(loaders if i < stages else consumers)
            nvvm.mbarrier_init(barrier(words, stages, _i32(i)).get_ptr(), count, predicate=first)
        nvvm.fence_mbarrier_init()
        gpu.barrier()

    init(barriers_smem)


def barrier(words, stages: int, index) -> utils.BarrierRef:
    """Barrier `index` of the ring: filled 0 .. S - 1, then emptied."""
    no_phases: Any = None  # parities come from the step
    return utils.BarrierRef(utils.memref_ptr(words), index, no_phases, 1)


def await_emptied(barriers_smem, stages: int, step) -> None:
    """Wait, in every thread, until the stage of a step may be filled.

    Its last filling is awaited too: over long ago, but only who waited for it may read what was copied there.
    """

    def wait(words, step):
        _await_emptied(words, stages, step)
        _await_last(words, stages, step, first_barrier=0)

    _at_step(barriers_smem, step, wait)


def arrive_filled(barriers_smem, stages: int, step, *, as_copied: bool = False) -> None:
    """Say, from each thread of the loading warpgroup, that its part of a step's stage is there.

    as_copied: it will be when the thread's `cp.async` begun so far are through; the hardware arrives for it then. The
    barrier counts that arrival already (`initialize`), hence "noinc".
    """

    def arrive(words, step):
        filled = barrier(words, stages, arith.remui(step, _i32(stages)))
        if as_copied:
            code = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];"
            utils.inline_ptx(code, filled.get_ptr(), has_side_effects=True)
        else:
            filled.arrive()

    _at_step(barriers_smem, step, arrive)


def _at_step(barriers_smem, step, act) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))
    def run(_, words, step):
        act(words, step.registers.item())

    run(barriers_smem, jnp.int32(step))


def _await_emptied(words, stages: int, step) -> None:
    _await_last(words, stages, step, first_barrier=stages)


def _await_last(words, stages: int, step, first_barrier: int) -> None:
    """Wait for a barrier's phase of the step that used the stage before."""
    slot, turn = arith.remui(step, _i32(stages)), arith.divui(step, _i32(stages))
    # The first time round this waits for the phase before the first, which counts as over.
    parity = arith.xori(arith.andi(turn, _i32(1)), _i32(1))
    awaited = barrier(words, stages, arith.addi(slot, _i32(first_barrier)))
    nvvm.mbarrier_try_wait_parity(awaited.get_ptr(), parity, _i32(_WAIT_TICKS))


class Copy(NamedTuple):
    """One operand's part of every stage."""

    gmem: Any
    smem: Any
    """[S, ...], one slice for each stage."""
    transforms: tuple
    """How smem is tiled and swizzled."""
    slice_of: Callable[..., tuple]
    """(i, *scalars) -> the slice of gmem that stage i of the tile takes: of words, by `at` and `span`."""
    scalars: tuple
    order: "TokenOrder | None" = None
    """Load boxes of `order`; `slice_of` then gives the first row and the first column as words."""


class TokenOrder(launch_context.MemRefTransform):
    """A view of the tokens [R, C] in five dimensions, boxes of which lie in shared memory in another order of rows."""

    @property
    def box(self) -> tuple[int, ...]:
        raise NotImplementedError

    def boxes(self, smem) -> list[tuple[int, int]]:
        """The offset in bytes of each box of a stage, and how many tokens after the first it begins."""
        raise NotImplementedError

    def coordinates(self, row, column) -> tuple:
        """Five words, the fastest first."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TokenFours(TokenOrder):
    """[R, K] -> [4, 2, R / 16, 2, K]: boxes of 64 rows and 128 bytes, rows as `pack.blocks.ChunkThread` wants them.

    Along these axes run f mod 4, m div 2, f div 4 and m mod 2, of member m of four f. Interleaved, that is row
    m R / 4 + f, else row 4 f + m.

    columns: of a box: the entries of 128 bytes.
    """

    interleaved: bool
    columns: int

    def token(self, place: Word, rows: int) -> Word:
        """The row of [R, K] that lies at a place of the array as it is loaded."""
        chunk, bits = place // 64, place % 64
        four, member = bits // 16 + bits // 2 % 4 * 4, bits // 8 % 2 * 2 + bits % 2
        return member * (rows // 4) + chunk * 16 + four if self.interleaved else chunk * 64 + four * 4 + member

    @property
    def box(self) -> tuple[int, ...]:
        return (4, 2, 4, 2, self.columns)

    def apply(self, ref: ir.Value) -> ir.Value:
        sixteenths = ir.MemRefType(ref.type).shape[0] // 16
        if self.interleaved:
            return utils.memref_transpose(utils.memref_unfold(ref, 0, (2, 2, sixteenths, 4)), (3, 0, 2, 1, 4))
        return utils.memref_transpose(utils.memref_unfold(ref, 0, (sixteenths, 4, 2, 2)), (1, 2, 0, 3, 4))

    def boxes(self, smem) -> list[tuple[int, int]]:
        rows = math.prod(ir.MemRefType(smem.type).shape) // self.box[-1]
        return [(row * _SWIZZLE, row) for row in range(0, rows, math.prod(self.box[:-1]))]

    def coordinates(self, row, column) -> tuple:
        return column, _i32(0), arith.divui(row, _i32(16)), _i32(0), _i32(0)


@dataclasses.dataclass(frozen=True)
class Interleaved(TokenOrder):
    """[R, N] -> [R / 8, N / 64, 2, 4, 64]: the rows of a contraction over interleaved tokens, tiled (8, 64).

    Row k of the contraction is member k mod 4 of four k div 4, row k mod 4 * R / 4 + k div 4 of the array.
    """

    columns: int

    @property
    def box(self) -> tuple[int, ...]:
        return (8, self.columns // 64, 2, 4, 64)

    def apply(self, ref: ir.Value) -> ir.Value:
        ref = utils.memref_unfold(utils.memref_unfold(ref, 1, (None, 64)), 0, (4, None, 2))
        return utils.memref_transpose(ref, (1, 3, 2, 0, 4))

    def boxes(self, smem) -> list[tuple[int, int]]:
        del smem  # one box
        return [(0, 0)]

    def coordinates(self, row, column) -> tuple:
        return _i32(0), _i32(0), _i32(0), arith.divui(column, _i32(64)), arith.divui(row, _i32(8))


_SWIZZLE = 128


def _load_in_order(launch, source, smem, order: TokenOrder, filled: utils.BarrierRef, row, column) -> None:
    # Private, but the only way to a description of an array in another order.
    descriptor = launch._get_tma_desc(source, (order,), None, order.box, _SWIZZLE, None)
    to = llvm.ptrtoint(i32(), utils.memref_ptr(smem))
    barrier_ = llvm.ptrtoint(i32(), filled.get_ptr())
    for offset, rows in order.boxes(smem):
        utils.inline_ptx(
            "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
            "[$0], [$1, {$2, $3, $4, $5, $6}], [$7];",
            add(to, _i32(offset)),
            descriptor,
            *order.coordinates(add(row, _i32(rows)), column),
            barrier_,
            result_types=None,
            has_side_effects=True,
        )


def load_stages(copies: list[Copy], barriers_smem, stages: int, steps, step) -> None:
    """Fill the stages of one tile, `steps` of them from step `step` on; returns when all copies are under way."""
    scalars = [value for copy in copies for value in copy.scalars]

    @plgpu.inline_mgpu(
        arg_types=(
            *(plgpu.RefType() for _ in copies),
            *(plgpu.RefType(copy.transforms) for copy in copies),
            plgpu.RefType(),
            *(SCALAR,) * (2 + len(scalars)),
        )
    )
    def load(launch, *args):
        sources, smems = args[: len(copies)], args[len(copies) : 2 * len(copies)]
        words, *values = args[2 * len(copies) :]
        steps_, step_, *flat = (value.registers.item() for value in values)
        size = sum(math.prod(smem.type.shape[1:]) * utils.bitwidth(smem.type.element_type) // 8 for smem in smems)
        with utils.when(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)):
            loop = scf.ForOp(_i32(0), steps_, _i32(1))
            with ir.InsertionPoint(loop.body):
                now, rest = arith.addi(step_, loop.induction_variable), iter(flat)
                _await_emptied(words, stages, now)
                slot = arith.remui(now, _i32(stages))
                filled = barrier(words, stages, slot)
                nvvm.mbarrier_arrive_expect_tx(filled.get_ptr(), _i32(size))
                for copy, source, smem in zip(copies, sources, smems, strict=True):
                    place = copy.slice_of(loop.induction_variable, *itertools.islice(rest, len(copy.scalars)))
                    stage = utils.memref_slice(smem, at(slot))
                    if copy.order is not None:
                        _load_in_order(launch, source, stage, copy.order, filled, *place)
                        continue
                    launch.async_copy(
                        src_ref=source,
                        dst_ref=stage,
                        gmem_slice=place,
                        gmem_transform=_tiling(copy.transforms),
                        swizzle=_swizzle(copy.transforms),
                        barrier=filled,
                        arrive=False,
                        predicate=None,
                    )
                scf.yield_([])

    scalars = [jnp.int32(value) for value in (steps, step, *scalars)]
    load(*(copy.gmem for copy in copies), *(copy.smem for copy in copies), barriers_smem, *scalars)


def at(word):
    """A word as an index."""
    return arith.index_cast(ir.IndexType.get(), word)


def span(start, size: int) -> utils.DynamicSlice:
    """A slice from a word on."""
    return utils.DynamicSlice(at(start), size)


def add(a, b):
    return arith.addi(a, b)


def multiply(word, by: int):
    return arith.muli(word, _i32(by))


def _i32(value: int):
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _tiling(transforms: tuple) -> tuple:
    return tuple(launch_context.TileTransform(t.tiling) for t in transforms if isinstance(t, plgpu.TilingTransform))


def _swizzle(transforms: tuple) -> int | None:
    return next((t.swizzle for t in transforms if isinstance(t, plgpu.SwizzleTransform)), None)
