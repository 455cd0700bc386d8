"""Rows of B gathered by index into a stage of shared memory, where the tensor core reads them.

The tensor core wants a stage of 64 rows x n columns in tiles of 8 rows x 64 columns, each 1 KiB: row r of a tile is 128
bytes, and its piece c of 16 bytes lies at place c xor r, so that eight rows lie in all banks. The copy engine
takes a box of consecutive rows only; for rows of any choice each thread of the loading warpgroup copies pieces itself
(`cp.async`), a warp 16 of the 64 rows, 512 bytes an instruction. A lane reads the indices of its own rows, which are
neighbours: copies need nothing of other lanes and are begun without waiting for one another.

Such a copy writes as an ordinary store does, and the tensor core reads through another proxy: between the two lies a
fence. Either the copies of a stage arrive at its barrier themselves as they land, and whoever multiplies passes the
fence; or (`gather_lag` > 0) their thread waits for those of `gather_lag` stages ago, passes the fence and arrives.
"""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper.mlir_words import Word, i32, to_value

ROWS = 64
"""Rows of a stage."""
_WARP_ROWS = 16
_PIECE = 8  # elements of 16 bits
_TILE_BYTES = 1024
_VECTOR = 4  # indices in one load


class Piece(NamedTuple):
    """16 bytes that a lane copies: row of the stage, piece of that row, and the byte of the stage where they go."""

    row: Any
    piece: Any
    offset: Any


def pieces_per_lane(tile_n: int) -> int:
    """Copies of one lane that fill a stage, with those of the others; each is of a row of its own."""
    return _WARP_ROWS * tile_n // _PIECE // 32


def piece_of(warp, lane, turn: int, tile_n: int) -> Piece:
    """What a lane copies in a turn. Words, integers and arrays of them alike."""
    row, piece = _first_row(warp, lane, tile_n) + turn, lane % (tile_n // _PIECE)
    tile = row // 8 * (tile_n // 64) + piece // 8
    return Piece(row, piece, tile * _TILE_BYTES + row % 8 * 128 + (piece % 8 ^ row % 8) * 16)


def _first_row(warp, lane, tile_n: int):
    """The first of a lane's rows; the others follow it."""
    return lane // (tile_n // _PIECE) * pieces_per_lane(tile_n) + warp * _WARP_ROWS


def load_indices(columns_gmem, block, first, tile_n: int):
    """columns[block, first : first + 64], the rows of B of a stage: each thread loads those of its own rows."""
    each, layout = pieces_per_lane(tile_n), _layout(tile_n)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((utils.WARPGROUP_SIZE * each,), jnp.int32, layout=layout),
    )
    def load(_, columns, block, first):
        row_length = ir.MemRefType(columns.type).shape[1]
        at = Word(block.registers.item()) * row_length + Word(first.registers.item()) + _first_row(*_place(), tile_n)
        pointer = utils.getelementptr(utils.memref_ptr(columns), [_wide(at)], i32())
        vector = ir.VectorType.get((_VECTOR,), i32())
        parts = [utils.getelementptr(pointer, [_VECTOR * i], i32()) for i in range(each // _VECTOR)]
        loaded = np.array([llvm.load(vector, part, alignment=4 * _VECTOR) for part in parts], dtype=object)
        return fa.FragmentedArray(_registers=loaded, _layout=layout.to_mgpu(), _is_signed=True)

    return load(columns_gmem, block, first)


def begin_copies(indices, b_gmem, b_smem, first_column, *, transforms) -> None:
    """Begin to copy 64 rows, columns from `first_column` on; zeros for an index or a column that B does not have."""
    (k, n), tile_n = b_gmem.shape, b_smem.shape[1]

    @plgpu.inline_mgpu(arg_types=(_layout(tile_n), plgpu.RefType(), plgpu.RefType(transforms), plgpu.Layout.WG_SPLAT))
    def copy(_, indices, b, stage, first_column):
        own = [Word(llvm.extractelement(v, to_value(i))) for v in indices.registers.flat for i in range(_VECTOR)]
        warp, lane = _place()
        target = Word(llvm.ptrtoint(i32(), utils.memref_ptr(stage)))
        column = Word(first_column.registers.item()) + lane % (tile_n // _PIECE) * _PIECE
        has_column = _below(column, n)
        within = arith.muli(_wide(_or_zero(has_column, column)), arith.constant(_i64(), 2))
        source = arith.addi(llvm.ptrtoint(_i64(), utils.memref_ptr(b)), within)
        for turn, index in enumerate(own):
            exists = arith.andi(has_column, _below(index, k))
            start = arith.muli(_wide(_or_zero(exists, index)), arith.constant(_i64(), 2 * n))
            _ptx(
                "cp.async.cg.shared.global [$0], [$1], 16, $2;",
                (target + piece_of(warp, lane, turn, tile_n).offset).value,
                arith.addi(source, start),
                _or_zero(exists, Word(to_value(16))).value,
            )

    copy(indices, b_gmem, b_smem, first_column)


def end_stage() -> None:
    """The copies begun since the last call are one stage's, for `wait_for_copies`."""

    @plgpu.inline_mgpu()
    def end(_):
        _ptx("cp.async.commit_group;")

    end()


def wait_for_copies(pending: int) -> None:
    """Wait until all but the last `pending` stages that this thread began are there, for the tensor core too."""

    @plgpu.inline_mgpu()
    def wait(_):
        _ptx(f"cp.async.wait_group {pending};")
        _ptx("fence.proxy.async.shared::cta;")

    wait()


def _layout(tile_n: int):
    """Of the indices: so many words a thread, in vectors."""
    return plgpu.Layout.WG_STRIDED((utils.WARPGROUP_SIZE * pieces_per_lane(tile_n),), vec_size=_VECTOR)


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


def _ptx(code: str, *arguments: ir.Value) -> None:
    utils.inline_ptx(code, *arguments, has_side_effects=True)
