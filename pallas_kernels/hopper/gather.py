"""Rows of B gathered by index into a stage of shared memory, where the tensor core reads them.

The tensor core wants a stage of 64 rows x n columns in tiles of 8 rows x 64 columns, each 1 KiB: row r of a tile is 128
bytes, and its piece c of 16 bytes lies at place c xor r, so that eight rows lie in all banks. The copy engine
takes a box of consecutive rows only; for rows of any choice each thread of the loading warpgroup copies pieces itself
(`cp.async`), a warp 16 of the 64 rows, 512 bytes an instruction.

Such a copy writes as an ordinary store does, and the tensor core reads through another proxy: between the two lies a
fence. Either the copies of a stage arrive at its barrier themselves as they land, and whoever multiplies passes the
fence; or (`gather_lag` > 0) their thread waits for those of `gather_lag` stages ago, passes the fence and arrives. The
fence holds its thread until what the thread has under way is through, so the second way keeps less in flight.

Indices take the same way: with a stage's rows a warp copies its 16 indices of the stage that will use this place of the
ring next. An index is a trip to L2 ahead of its row, behind all that is on its way, and a load into a register would be
awaited with the newest one of all that are under way.
"""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.hopper.mlir_words import Word, i32, to_value

ROWS = 64
"""Rows of a stage."""
_WARP_ROWS = 16
_PIECE = 8  # elements of 16 bits
_TILE_BYTES = 1024
_VECTOR = 4  # indices in 16 bytes


class Piece(NamedTuple):
    """16 bytes that a lane copies in one of its turns."""

    row: Any
    """Row of the stage."""
    piece: Any
    """Piece of that row."""
    swap: int
    """The byte of the stage where they go is that of the lane's first turn xor `swap`, ..."""
    skip: int
    """... plus `skip`: what changes from turn to turn is known to the compiler."""


def pieces_per_lane(tile_n: int) -> int:
    """Copies of one lane that fill a stage, with those of the others; each is of a row of its own."""
    return _WARP_ROWS * tile_n // _PIECE // 32


def piece_of(warp, lane, turn: int, tile_n: int) -> Piece:
    """What a lane copies in its `turn`-th turn: neighbouring rows. Words, integers and arrays of them alike."""
    row, piece = _first_row(warp, lane, tile_n) + turn, lane % (tile_n // _PIECE)
    return Piece(row, piece, turn % 8 * (128 + 16), turn // 8 * (tile_n // 64) * _TILE_BYTES)


def first_byte(warp, lane, tile_n: int):
    """Where in the stage a lane's first piece goes."""
    row, piece = _first_row(warp, lane, tile_n), lane % (tile_n // _PIECE)
    tile = row // 8 * (tile_n // 64) + piece // 8
    return tile * _TILE_BYTES + row % 8 * 128 + (piece % 8 ^ row % 8) * 16


def _first_row(warp, lane, tile_n: int):
    return lane // (tile_n // _PIECE) * pieces_per_lane(tile_n) + warp * _WARP_ROWS


class Place(NamedTuple):
    """Where the indices of a stage begin in `columns`."""

    block: Any
    first: Any


def begin_copies(
    columns_gmem, b_gmem, b_smem, indices_smem, now: Place, later: Place, is_first, first_column, *, transforms
):
    """Begin to copy 64 rows, columns from `first_column` on; zeros for an index or a column that B does not have.

    Args:
      indices_smem: int32 [64], of this place of the ring: this stage's indices, unless nothing was there before
        (`is_first` is not 0), when they are read from `columns`. Those of the stage `later` are copied there.
    """
    k, n = b_gmem.shape

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(), plgpu.RefType(), plgpu.RefType(transforms), plgpu.RefType(), *(plgpu.Layout.WG_SPLAT,) * 6
        )
    )  # fmt: skip
    def copy(_, columns, b, stage, indices, *scalars):
        tile_n = ir.MemRefType(stage.type).shape[1] * 64
        block, first, later_block, later_first, is_first, first_column = (Word(s.registers.item()) for s in scalars)
        warp, lane = _thread()
        row_length = ir.MemRefType(columns.type).shape[1]
        columns, here = llvm.ptrtoint(_i64(), utils.memref_ptr(columns)), utils.memref_ptr(indices)
        anywhere = llvm.ptrtoint(_i64(), llvm.addrspacecast(llvm.PointerType.get(), here))
        own = arith.select(
            arith.cmpi(arith.CmpIPredicate.ne, is_first.value, to_value(0)),
            arith.addi(columns, _bytes(block * row_length + first, 4)),
            anywhere,
        )
        own = arith.addi(own, _bytes(_first_row(warp, lane, tile_n), 4))
        rows = [
            Word(row)
            for i in range(pieces_per_lane(tile_n) // _VECTOR)
            for row in utils.inline_ptx(
                f"ld.v4.b32 {{$0, $1, $2, $3}}, [$4 + {16 * i}];",
                own,
                result_types=[i32()] * _VECTOR,
                has_side_effects=True,
            )
        ]
        # A stage begins at a multiple of 1 KiB, so that bits may be exchanged in its address as in an offset.
        target = Word(llvm.ptrtoint(i32(), utils.memref_ptr(stage))) + first_byte(warp, lane, tile_n)
        column = first_column + lane % (tile_n // _PIECE) * _PIECE
        has_column = _below(column, n)
        source = arith.addi(llvm.ptrtoint(_i64(), utils.memref_ptr(b)), _bytes(column, 2))
        for turn, row in enumerate(rows):
            piece = piece_of(warp, lane, turn, tile_n)
            # Of no bytes nothing is read, whatever the address.
            size = arith.select(arith.andi(has_column, _below(row, k)), to_value(16), to_value(0))
            start = arith.addi(source, _bytes(row, 2 * n))
            _ptx(
                f"cp.async.cg.shared.global [$0 + {piece.skip}], [$1], 16, $2;",
                (target ^ piece.swap).value,
                start,
                size,
            )
        # Four lanes renew what all lanes of the warp have read.
        _ptx("bar.warp.sync 0xffffffff;")
        offset = warp * _WARP_ROWS + lane * _VECTOR
        utils.inline_ptx(
            "cp.async.cg.shared.global [$0], [$1], 16;",
            (Word(llvm.ptrtoint(i32(), here)) + offset * 4).value,
            arith.addi(columns, _bytes(later_block * row_length + later_first + offset, 4)),
            predicate=_below(lane, _WARP_ROWS // _VECTOR),
            has_side_effects=True,
        )

    copy(columns_gmem, b_gmem, b_smem, indices_smem, *now, *later, is_first, first_column)


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


def _thread() -> tuple[Word, Word]:
    """Warp of the warpgroup, and lane of the warp."""
    thread = Word(utils.thread_idx()) % utils.WARPGROUP_SIZE
    return thread // 32, thread % 32


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _bytes(word: Word, each: int) -> ir.Value:
    """word x each, in 64 bits."""
    return arith.muli(arith.extui(_i64(), word.value), arith.constant(_i64(), each))


def _below(word: Word, limit: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.ult, word.value, to_value(limit))


def _ptx(code: str, *arguments: ir.Value) -> None:
    utils.inline_ptx(code, *arguments, has_side_effects=True)
