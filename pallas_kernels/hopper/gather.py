"""Rows of B gathered by index into a stage of shared memory, where the tensor core reads them.

The tensor core wants a stage of 64 rows x n columns in tiles of 8 rows x 64 columns, each 1 KiB: row r of a tile is 128
bytes, and its piece c of 16 bytes lies at place c xor r, so that eight rows lie in all banks. The copy engine
takes a box of consecutive rows only; for rows of any choice each thread of the loading warpgroup copies pieces itself
(`cp.async`), a warp 16 of the 64 rows, 512 bytes an instruction.

Such a copy is complete where its thread has waited for it. Then the thread passes a fence, since the tensor core
reads through another proxy, and arrives at the stage's barrier. So a stage is announced `lag` stages after its copies
were begun, and as many are in flight.
"""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref

from pallas_kernels.hopper.mlir_words import Word, i32, to_value

ROWS = 64
"""Rows of a stage."""
_WARP_ROWS = 16
_PIECE = 8  # elements of 16 bits
_TILE_BYTES = 1024
_INDICES = plgpu.Layout.WG_STRIDED((utils.WARPGROUP_SIZE,), vec_size=1)


class Piece(NamedTuple):
    """16 bytes that a lane copies: row of the stage, piece of that row, and the byte of the stage where they go."""

    row: Any
    piece: Any
    offset: Any


def pieces_per_lane(tile_n: int) -> int:
    """Copies of one lane that fill a stage, with those of the others."""
    return _WARP_ROWS * tile_n // _PIECE // 32


def piece_of(warp, lane, copy: int, tile_n: int) -> Piece:
    """What a lane copies in its `copy`-th turn. Words, integers and arrays of them alike."""
    pieces = tile_n // _PIECE
    row = lane // pieces + copy * (32 // pieces) + warp * _WARP_ROWS
    piece = lane % pieces
    tile = row // 8 * (tile_n // 64) + piece // 8
    return Piece(row, piece, tile * _TILE_BYTES + row % 8 * 128 + (piece % 8 ^ row % 8) * 16)


def load_indices(columns_gmem, block, first):
    """columns[block, first : first + 64], the rows of B of a stage: lane l of warp w holds entry 16 w + l mod 16."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((utils.WARPGROUP_SIZE,), jnp.int32, layout=_INDICES),
    )
    def load(_, columns, block, first):
        warp, lane = _place()
        at = Word(first.registers.item()) + warp * _WARP_ROWS + lane % _WARP_ROWS
        index = ir.IndexType.get()
        word = memref.load(columns, [arith.index_cast(index, v) for v in (block.registers.item(), at.value)])
        vector = ir.VectorType.get((1,), i32())
        registers = np.array([llvm.bitcast(vector, word)], dtype=object)
        return fa.FragmentedArray(_registers=registers, _layout=_INDICES.to_mgpu(), _is_signed=True)

    return load(columns_gmem, block, first)


def begin_copies(indices, b_gmem, b_smem, first_column, *, transforms) -> None:
    """Begin to copy 64 rows, columns from `first_column` on; zeros for an index or a column that B does not have."""
    k, n = b_gmem.shape

    @plgpu.inline_mgpu(arg_types=(_INDICES, plgpu.RefType(), plgpu.RefType(transforms), plgpu.Layout.WG_SPLAT))
    def copy(_, indices, b, stage, first_column):
        tile_n = ir.MemRefType(stage.type).shape[1] * 64
        own_index = Word(llvm.bitcast(i32(), indices.registers.item()))
        warp, lane = _place()
        source, target = llvm.ptrtoint(_i64(), utils.memref_ptr(b)), Word(llvm.ptrtoint(i32(), utils.memref_ptr(stage)))
        column = Word(first_column.registers.item()) + lane % (tile_n // _PIECE) * _PIECE
        has_column = _below(column, n)
        for turn in range(pieces_per_lane(tile_n)):
            row, _, offset = piece_of(warp, lane, turn, tile_n)
            index = _shuffle(own_index, row % _WARP_ROWS)
            exists = arith.andi(has_column, _below(index, k))
            start = arith.muli(_wide(_or_zero(exists, index)), arith.constant(_i64(), 2 * n))
            within = arith.muli(_wide(_or_zero(exists, column)), arith.constant(_i64(), 2))
            _ptx(
                "cp.async.cg.shared.global [$0], [$1], 16, $2;",
                (target + offset).value,
                arith.addi(source, arith.addi(start, within)),
                _or_zero(exists, Word(to_value(16))).value,
            )
        _ptx("cp.async.commit_group;")

    copy(indices, b_gmem, b_smem, first_column)


def wait_for_copies(pending: int) -> None:
    """Wait until all but the last `pending` stages that this thread began are there, for the tensor core too."""

    @plgpu.inline_mgpu()
    def wait(_):
        _ptx(f"cp.async.wait_group {pending};")
        _ptx("fence.proxy.async.shared::cta;")

    wait()


def _place() -> tuple[Word, Word]:
    """Warp of the warpgroup, and lane of the warp."""
    thread = Word(utils.thread_idx()) % utils.WARPGROUP_SIZE
    return thread // 32, thread % 32


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _wide(word: Word) -> ir.Value:
    return arith.extui(_i64(), word.value)


def _below(word: Word, limit: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.ult, word.value, to_value(limit))


def _or_zero(condition: ir.Value, word: Word) -> Word:
    return Word(arith.select(condition, word.value, to_value(0)))


def _shuffle(word: Word, lane: Word) -> Word:
    """The word of another lane of the warp."""
    shuffle = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    found = utils.inline_ptx(
        shuffle, word.value, lane.value, result_types=i32(), has_side_effects=True, convergent=True
    )
    return Word(found)


def _ptx(code: str, *arguments: ir.Value) -> None:
    utils.inline_ptx(code, *arguments, has_side_effects=True)
