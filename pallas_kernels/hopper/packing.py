"""Packing in the epilogue: y1 or dy2 goes from registers through shared memory into packed operands, never to memory.

The computing warpgroups leave a tile in shared memory, in chunks of 64 tokens x 64 features, and go on to the next; a
warpgroup of its own packs it meanwhile, each thread what it owns as in the kernels of `pallas_kernels.pack`: the code
is theirs (pack/blocks.py). Tokens are columns of the product; they were loaded in such an order (`ring.TokenFours`)
that a chunk holds whole fours of tokens, and that reading them along either axis meets each bank of shared memory once.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.hopper import ring
from pallas_kernels.hopper.mlir_words import Word, i32, to_value
from pallas_kernels.pack import blocks, blocks8
from pallas_kernels.pack.hopper import INFINITY, PTX_TYPE, MlirMachine, packed_types
from pallas_kernels.tiles import GRANULE, Packing, Problem, TileConfig

_CHUNK = (plgpu.TilingTransform((8, GRANULE)), plgpu.SwizzleTransform(128))
_ROW_BYTES = 128


def outputs(problem: Problem) -> dict[str, jax.ShapeDtypeStruct]:
    """What is written, by name, as `pack.hopper` names it."""
    p, in_16_bits = _packing(problem), not problem.is_fp8
    (rows, columns), out = problem.out_shape, {}
    features, feature_words = packed_types((rows, columns), problem.dtype)
    tokens, token_words = packed_types((columns, rows), problem.dtype)
    if p.gradient:
        out |= {"feature_dy1": features} if p.features else {}
        out |= {"token_dy1": tokens} if p.tokens else {}
        return out | ({"token_squared": tokens} if p.tokens and in_16_bits else {})
    out["positives"] = jax.ShapeDtypeStruct((rows // GRANULE * (columns // GRANULE) * 4,), jnp.int32)
    if p.features:
        out |= {"features": features} if in_16_bits else {}
        out |= {"squared": features, "feature_metadata": feature_words}
    return out | ({"tokens": tokens, "token_metadata": token_words} if p.tokens else {})


def inputs(problem: Problem) -> tuple[str, ...]:
    """The arrays that packing reads, by name: what a gradient's positions are, and factors of neurons (blocks8.py)."""
    p = _packing(problem)
    names = ("factor",) if problem.is_fp8 else ()
    if p.gradient and p.features:
        names += ("squared" if problem.is_fp8 else "features", "feature_metadata")
    return names + (("tokens", "token_metadata") if p.gradient and p.tokens else ())


def _packing(problem: Problem) -> Packing:
    assert problem.packing is not None
    return problem.packing


def hand_over(rounded, chunks_smem, problem: Problem) -> None:
    """Write a warpgroup's part [m, n] of a tile, in the operands' type and WGMMA layout, to its chunks [.., 64, 64].

    Chunks go along n first. In a chunk lie 64 tokens of 64 features, piece p of row r at p ^ (r mod 8).
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(_CHUNK)))
    def run(_, rounded, chunks_smem):
        machine = _machine({"shared": utils.memref_ptr(chunks_smem)}, problem)
        # For each 8 columns there are two words, of rows g and g + 8 of the warp's 16; `stmatrix.trans` takes those of
        # 16 columns and writes 16 bytes for each column and 8 rows.
        words = [Word(utils.bitcast(register, i32())) for register in rounded.registers.flat]
        warp, lane = machine.thread >> 5, machine.thread & 31
        in_matrix, low, high = lane & 7, (lane >> 3) & 1, lane >> 4
        to = (high * 8 + in_matrix) * _ROW_BYTES + ((warp * 2 + low) ^ in_matrix) * 16
        for i in range(len(words) // 4):
            machine.store_matrices(to + i * 16 * _ROW_BYTES, words[4 * i : 4 * i + 4])

    run(rounded, chunks_smem)


def pack(gmem: dict, chunks_smem, problem: Problem, config: TileConfig, tile, part_m: int, part_n: int) -> None:
    """Pack the chunks of a part of a tile, the `part_m`-th along m and `part_n`-th along n."""
    p = _packing(problem)
    names = (*inputs(problem), *outputs(problem))
    matrix = blocks.Matrix(*problem.out_shape, interleaved=p.interleaved)
    along = blocks.Directions(p.features, p.tokens)
    per_row = config.warpgroup_n // GRANULE

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(_CHUNK), *(plgpu.RefType() for _ in names), *(ring.SCALAR,) * 5),
    )
    def run(_, chunks_smem, *rest):
        pointers = dict(zip(names, map(utils.memref_ptr, rest[: len(names)]), strict=True))
        first_m, first_n, m_end, n_end, neuron = (Word(scalar.registers.item()) for scalar in rest[len(names) :])
        last, last_rows, last_columns = (config.chunks(problem) - 1, matrix.rows - GRANULE, matrix.columns - GRANULE)

        def position(chunk: Word) -> tuple[Word, Word]:
            return first_m + chunk // per_row * GRANULE, first_n + chunk % per_row * GRANULE

        def thread_of(chunk: Word) -> blocks.ChunkThread:
            """A chunk beyond the end reads the last block's entries, and writes nothing."""
            m, n = position(chunk)
            slot = utils.memref_slice(chunks_smem, ring.at(chunk.value))
            block = (_minimum(n, last_rows) >> 6) * (matrix.columns // GRANULE) + (_minimum(m, last_columns) >> 6)
            return blocks.ChunkThread(_machine(pointers | {"shared": utils.memref_ptr(slot)}, problem, block), matrix)

        def load(chunk: Word) -> list[ir.Value]:
            thread = thread_of(chunk)
            if problem.is_fp8:
                place = blocks8.Place(thread, neuron)
                found = (blocks8.load_taken if p.gradient else blocks8.load_factors)(place, along)
            else:
                found = blocks.load_taken(thread, along) if p.gradient else []
            return [word.value for word in found]

        def pack_chunk(thread: blocks.ChunkThread, loaded: list[Word]) -> None:
            infinity = INFINITY[problem.packed_dtype]
            if problem.is_fp8 and p.gradient:
                blocks8.take(blocks8.Place(thread, neuron), along, loaded)
            elif problem.is_fp8:
                blocks8.pack(blocks8.Place(thread, neuron), along, loaded, infinity=infinity)
            elif p.gradient:
                blocks.take(thread, along, loaded)
            else:
                blocks.pack(thread, along, relu=True, infinity=infinity)

        # What a chunk reads from memory is on its way while the chunk before is packed.
        loop = scf.ForOp(to_value(0), to_value(last + 1), to_value(1), load(Word(to_value(0))))
        with ir.InsertionPoint(loop.body):
            chunk = Word(loop.induction_variable)
            following = load(_minimum(chunk + 1, last))
            m, n = position(chunk)
            with utils.when(arith.andi(_less(m, m_end), _less(n, n_end))):
                pack_chunk(thread_of(chunk), [Word(value) for value in loop.inner_iter_args])
            scf.yield_(following)

    first_m, first_n = tile.out_m + part_m * config.warpgroup_m, tile.out_n + part_n * config.warpgroup_n
    # Column c of the result is neuron c of the tile's group: row a_row of A is column out_m. Rows of no group are last.
    neuron = jnp.minimum(tile.a_row - tile.out_m, problem.m - matrix.columns)
    scalars = (jnp.int32(scalar) for scalar in (first_m, first_n, tile.m_end, tile.n_end, neuron))
    run(chunks_smem, *(gmem[name] for name in names), *scalars)


def _machine(pointers: dict, problem: Problem, block: Word | None = None) -> MlirMachine:
    thread = Word(utils.thread_idx()) % utils.WARPGROUP_SIZE
    return MlirMachine(pointers, PTX_TYPE[problem.packed_dtype], block or Word(to_value(0)), thread)


def _less(a: Word, b: Word) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, a.value, b.value)


def _minimum(word: Word, limit: int) -> Word:
    return Word(arith.minui(word.value, to_value(limit)))
