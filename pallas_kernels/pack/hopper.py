"""The packing kernels on Hopper: each block of blocks.py becomes the MLIR of one thread in a Mosaic GPU kernel.

Pallas's arrays know no thread, and packing is all about which thread owns what; so a kernel is one `inline_mgpu`.
Blocks are many and small (8 KiB read, 8 KiB of shared memory): enough of them are in flight to hide memory's latency.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm

from pallas_kernels import tile_order
from pallas_kernels.cast8.reference import E4M3, gradient_factor, inverse
from pallas_kernels.hopper.mlir_words import Word, i32, to_value
from pallas_kernels.pack import blocks, blocks8
from pallas_kernels.pack.blocks import Directions, Matrix, Thread
from pallas_kernels.pack.words import Machine
from pallas_kernels.tiles import GRANULE

THREADS = utils.WARPGROUP_SIZE
_SHARED_BYTES = GRANULE * GRANULE * 2
PTX_TYPE = {"bfloat16": "bf16", "float16": "f16"}
INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00}


def pack_activations(y, along: Directions, *, interleaved: bool, relu: bool) -> dict[str, jax.Array]:
    """y [R, C] -> what `blocks.pack` writes, by name; positives int32 [..] is to be summed."""
    matrix = Matrix(y.shape[0], y.shape[1], interleaved)
    out = {}
    if relu:
        out["positives"] = jax.ShapeDtypeStruct((matrix.blocks * 4,), jnp.int32)
    if along.features:
        values, metadata = packed_types(y.shape, y.dtype)
        out |= {"features": values, "squared": values, "feature_metadata": metadata}
    if along.tokens:
        out["tokens"], out["token_metadata"] = packed_types(y.shape[::-1], y.dtype)

    def body(m: Machine) -> None:
        blocks.pack(Thread(m, matrix), along, relu=relu, infinity=INFINITY[y.dtype.name])

    return _launch(body, matrix, y.dtype, {"y": y}, out, shared=int(along.tokens))


def take_activations(dy2, features, tokens, *, interleaved: bool) -> dict[str, jax.Array]:
    """dy2 [R, C] and a packed along features, tokens or both -> what `blocks.take` writes, by name."""
    matrix = Matrix(dy2.shape[0], dy2.shape[1], interleaved)
    arrays, out = {"y": dy2}, {}
    if features is not None:
        arrays |= {"features": features.values, "feature_metadata": features.metadata}
        out["feature_dy1"] = packed_types(dy2.shape, dy2.dtype)[0]
    if tokens is not None:
        arrays |= {"tokens": tokens.values, "token_metadata": tokens.metadata}
        out["token_dy1"] = out["token_squared"] = packed_types(dy2.shape[::-1], dy2.dtype)[0]
    along = Directions(features is not None, tokens is not None)

    def body(m: Machine) -> None:
        thread = Thread(m, matrix)
        blocks.take(thread, along, blocks.load_taken(thread, along))

    return _launch(body, matrix, dy2.dtype, arrays, out, shared=int(along.tokens))


def pack_scaled(y, along: Directions, scale, first_neuron, *, interleaved: bool) -> dict[str, jax.Array]:
    """y [R, C] in bf16 -> what `blocks8.pack` writes, by name."""
    matrix = Matrix(y.shape[0], y.shape[1], interleaved)
    out = {"positives": jax.ShapeDtypeStruct((matrix.blocks * 4,), jnp.int32)}
    if along.features:
        out["squared"], out["feature_metadata"] = packed_types(y.shape, E4M3)
    if along.tokens:
        out["tokens"], out["token_metadata"] = packed_types(y.shape[::-1], E4M3)
    arrays = {"y": y, "factor": bf16(inverse(scale)), **_groups_of(first_neuron)}

    def body(m: Machine) -> None:
        place = _place(Thread(m, matrix), arrays)
        blocks8.pack(place, along, blocks8.load_factors(place, along), infinity=INFINITY["bfloat16"])

    return _launch(body, matrix, y.dtype, arrays, out, shared=int(along.tokens))


def take_scaled(
    dy2, features, tokens, squared_scale, scale, first_neuron, *, interleaved: bool
) -> dict[str, jax.Array]:
    """dy2 [R, C] in bf16 and squares packed along features, tokens or both -> what `blocks8.take` writes, by name."""
    matrix = Matrix(dy2.shape[0], dy2.shape[1], interleaved)
    arrays, out = {"y": dy2, "factor": bf16(gradient_factor(squared_scale, scale))}, {}
    if features is not None:
        arrays |= {"squared": features.values, "feature_metadata": features.metadata}
        out["feature_dy1"] = packed_types(dy2.shape, E4M3)[0]
    if tokens is not None:
        arrays |= {"tokens": tokens.values, "token_metadata": tokens.metadata}
        out["token_dy1"] = packed_types(dy2.shape[::-1], E4M3)[0]
    along = Directions(features is not None, tokens is not None)
    arrays |= _groups_of(first_neuron)

    def body(m: Machine) -> None:
        place = _place(Thread(m, matrix), arrays)
        blocks8.take(place, along, blocks8.load_taken(place, along))

    return _launch(body, matrix, dy2.dtype, arrays, out, shared=int(along.tokens))


def bf16(factor: jax.Array) -> jax.Array:
    """Powers of two, exactly, as the kernels read factors of neurons: two in a word."""
    return factor.astype(jnp.bfloat16)


def _groups_of(first_neuron) -> dict[str, jax.Array]:
    """int32 [R / 64], of the group of each 64 rows, where there are groups."""
    return {} if first_neuron is None else {"first_neuron": first_neuron}


def _place(thread: Thread, arrays: dict) -> blocks8.Place:
    if "first_neuron" not in arrays:
        return blocks8.Place(thread, thread.m.thread * 0)
    column_tiles = thread.matrix.columns // GRANULE
    return blocks8.Place(thread, thread.m.load_word("first_neuron", thread.block // column_tiles))


def pack_thresholded(w, beta, dtype, *, along_rows: bool, scale=None) -> dict[str, jax.Array]:
    """w [R, C] in f32 or bf16, beta f32 [] -> values, metadata of round(beta S(w)), transposed if `along_rows`.

    scale: where `dtype` has 8 bits, of each row of the result.
    """
    matrix = Matrix(w.shape[0], w.shape[1], itemsize=w.dtype.itemsize)
    values, metadata = packed_types(w.shape[::-1] if along_rows else w.shape, dtype)
    body = functools.partial(blocks.pack_thresholded, matrix=matrix, along_rows=along_rows)
    arrays = {"w": w, "beta": jnp.asarray(beta, jnp.float32).reshape(1)}
    if scale is not None:
        body, dtype = functools.partial(body, store=blocks8.store_packed), jnp.bfloat16
        arrays["factor"] = bf16(inverse(scale))
    shared = w.dtype.itemsize // 2 if along_rows else 0
    return _launch(body, matrix, dtype, arrays, {"values": values, "metadata": metadata}, shared=shared)


def packed_types(shape: tuple[int, ...], dtype) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Values and metadata of a packed matrix."""
    rows = shape[0] // GRANULE
    return (
        jax.ShapeDtypeStruct((rows, shape[1] // tile_order.columns(dtype), *tile_order.shape(dtype)), dtype),
        jax.ShapeDtypeStruct((rows, shape[1] // GRANULE, THREADS), jnp.uint32),
    )


def _launch(
    body: Callable[..., None], matrix: Matrix, dtype, arrays: dict, out: dict[str, Any], *, shared: int
) -> dict[str, jax.Array]:
    """Run `body` in one block for each 64 x 64 part; `shared` buffers of 8 KiB."""
    return launch(body, matrix.blocks, dtype, arrays, out, shared=shared)


def launch(
    body: Callable[..., None],
    blocks: int,
    dtype,
    arrays: dict,
    out: dict[str, Any],
    *,
    shared: int,
    machine: "type[MlirMachine] | None" = None,
) -> dict[str, jax.Array]:
    """Run `body` of a machine in `blocks` blocks of 128 threads, with `shared` times 8 KiB of shared memory.

    Under `jax.vmap` the grid has one more axis: `plgpu.kernel` hands every block its own part of the arrays.
    """
    names, machine = (*arrays, *out), machine or MlirMachine

    def kernel(*refs):
        *gmem, shared_smem = refs

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def thread(_, *memrefs):
            pointers = dict(zip((*names, "shared"), map(utils.memref_ptr, memrefs), strict=True))
            block, thread = arith.index_cast(i32(), gpu.block_id(gpu.Dimension.x)), utils.thread_idx()
            body(machine(pointers, PTX_TYPE[jnp.dtype(dtype).name], Word(block), Word(thread)))

        thread(*gmem, shared_smem)

    # Words are words: the copy engine is not used, and the kernel needs no other view of memory than bytes.
    signed = {name: jax.ShapeDtypeStruct(t.shape, _as_signed(t.dtype)) for name, t in out.items()}
    results = plgpu.kernel(
        kernel,
        out_type=tuple(signed.values()),
        scratch_types=[plgpu.SMEM((max(shared, 1) * _SHARED_BYTES // 4,), jnp.int32)],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*(jax.lax.bitcast_convert_type(a, _as_signed(a.dtype)) for a in arrays.values()))
    return {
        name: jax.lax.bitcast_convert_type(result, t.dtype)
        for (name, t), result in zip(out.items(), results, strict=True)
    }


def _as_signed(dtype):
    """Mosaic has no unsigned words."""
    return jnp.int32 if dtype == jnp.uint32 else dtype


class MlirMachine(Machine):
    """`words.Machine` that emits the code of one thread."""

    def __init__(self, pointers: dict[str, ir.Value], ptx_type: str, block: Word, thread: Word):
        self._pointers, self._type = pointers, ptx_type
        self.block, self.thread = block, thread

    def _ptx(self, code: str, *words: Word | int, **options) -> Word:
        return Word(utils.inline_ptx(code, *map(to_value, words), result_types=i32(), **options))

    def _at(self, name: str, index: Word, size: int) -> ir.Value:
        """A byte pointer; beyond 4 GiB too."""
        i64, i8 = ir.IntegerType.get_signless(64), ir.IntegerType.get_signless(8)
        bytes_ = arith.muli(arith.extui(i64, to_value(index)), arith.constant(i64, size))
        return utils.getelementptr(self._pointers[name], [bytes_], i8)

    def _load_vector(self, pointer: ir.Value) -> list[Word]:
        vector = llvm.load(ir.VectorType.get((4,), i32()), pointer, alignment=16)
        return [Word(llvm.extractelement(vector, to_value(i))) for i in range(4)]

    def _store_vector(self, pointer: ir.Value, words: list[Word]) -> None:
        vector = llvm.mlir_undef(ir.VectorType.get((4,), i32()))
        for i, word in enumerate(words):
            vector = llvm.insertelement(vector, word.value, to_value(i))
        llvm.store(vector, pointer, alignment=16)

    def load(self, name: str, piece: Word) -> list[Word]:
        return self._load_vector(self._at(name, piece, 16))

    def store(self, name: str, piece: Word, words: list[Word]) -> None:
        self._store_vector(self._at(name, piece, 16), words)

    def load_half(self, name: str, half: Word) -> list[Word]:
        vector = llvm.load(ir.VectorType.get((2,), i32()), self._at(name, half, 8), alignment=8)
        return [Word(llvm.extractelement(vector, to_value(i))) for i in range(2)]

    def store_half(self, name: str, half: Word, words: list[Word]) -> None:
        vector = llvm.mlir_undef(ir.VectorType.get((2,), i32()))
        for i, word in enumerate(words):
            vector = llvm.insertelement(vector, word.value, to_value(i))
        llvm.store(vector, self._at(name, half, 8), alignment=8)

    def load_word(self, name: str, index: Word) -> Word:
        return Word(llvm.load(i32(), self._at(name, index, 4), alignment=4))

    def store_word(self, name: str, index: Word, word: Word) -> None:
        llvm.store(word.value, self._at(name, index, 4), alignment=4)

    def store_shared(self, piece: Word, words: list[Word]) -> None:
        self._store_vector(self._at("shared", piece, 16), words)

    def load_shared(self, piece: Word) -> list[Word]:
        return self._load_vector(self._at("shared", piece, 16))

    def barrier(self) -> None:
        utils.warpgroup_barrier()

    def load_transposed(self, piece: Word) -> list[Word]:
        address = llvm.ptrtoint(i32(), self._at("shared", piece, 16))
        # A side effect, so that it stays behind the barrier.
        found = utils.inline_ptx(
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];",
            address,
            result_types=[i32()] * 4,
            has_side_effects=True,
            convergent=True,
        )
        return [Word(word) for word in found]

    def store_matrices(self, offset: Word, registers: list[Word]) -> None:
        """`stmatrix.x4.trans` at this many bytes of shared memory."""
        base = llvm.ptrtoint(i32(), self._pointers["shared"])
        utils.inline_ptx(
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};",
            arith.addi(base, offset.value),
            *(register.value for register in registers),
            result_types=None,
            has_side_effects=True,
            convergent=True,
        )

    def permute(self, first: Word, second: Word, selector: int) -> Word:
        return self._ptx("prmt.b32 $0, $1, $2, $3;", first, second, selector)

    def relu(self, pair: Word) -> Word:
        return self._ptx(f"max.NaN.{self._type}x2 $0, $1, $2;", pair, 0)

    def multiply(self, pair: Word, other: Word) -> Word:
        return self._ptx(f"mul.{self._type}x2 $0, $1, $2;", pair, other)

    def add(self, pair: Word, other: Word) -> Word:
        return self._ptx(f"add.{self._type}x2 $0, $1, $2;", pair, other)

    def warp_sum(self, word: Word) -> Word:
        return Word(utils.redux(word.value, to_value(0xFFFFFFFF), nvvm.ReductionKind.ADD))

    def minimum(self, a: Word, b: Word | int) -> Word:
        return Word(arith.minui(to_value(a), to_value(b)))

    def maximum(self, a: Word, b: Word | int) -> Word:
        return Word(arith.maxui(to_value(a), to_value(b)))

    def greater(self, a: Word | int, b: Word | int) -> Word:
        return Word(arith.extsi(i32(), arith.cmpi(arith.CmpIPredicate.ugt, to_value(a), to_value(b))))

    def _f32(self, operation: Callable, a: Word, b: Word) -> Word:
        f32 = ir.F32Type.get()
        return Word(arith.bitcast(i32(), operation(*(arith.bitcast(f32, word.value) for word in (a, b)))))

    def subtract_f32(self, a: Word, b: Word) -> Word:
        return self._f32(arith.subf, a, b)

    def multiply_f32(self, a: Word, b: Word) -> Word:
        return self._f32(arith.mulf, a, b)

    def round_pair(self, low: Word, high: Word) -> Word:
        f32 = ir.F32Type.get()
        return Word(
            utils.inline_ptx(
                f"cvt.rn.{self._type}x2.f32 $0, $1, $2;",
                arith.bitcast(f32, high.value),
                arith.bitcast(f32, low.value),
                result_types=i32(),
            )
        )

    def narrow(self, four: list[Word]) -> Word:
        code = "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; "
        values = [arith.bitcast(ir.F32Type.get(), word.value) for word in four]
        return Word(utils.inline_ptx(code + "mov.b32 $0, {l, h}; }", *values, result_types=i32()))

    def widen8(self, word: Word) -> list[Word]:
        code = (
            "{ .reg .b16 l, h, a, b, c, d; .reg .b32 p, q; mov.b32 {l, h}, $4; "
            "cvt.rn.f16x2.e4m3x2 p, l; cvt.rn.f16x2.e4m3x2 q, h; mov.b32 {a, b}, p; mov.b32 {c, d}, q; "
            "cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d; }"
        )
        found = utils.inline_ptx(code, word.value, result_types=[ir.F32Type.get()] * 4)
        return [Word(arith.bitcast(i32(), value)) for value in found]

    def root(self, word: Word) -> Word:
        f32 = ir.F32Type.get()
        found = utils.inline_ptx("sqrt.approx.f32 $0, $1;", arith.bitcast(f32, word.value), result_types=f32)
        return Word(arith.bitcast(i32(), found))

    def maximum_pair(self, pair: Word, other: Word) -> Word:
        return self._ptx("max.u16x2 $0, $1, $2;", pair, other)

    def warp_max(self, word: Word) -> Word:
        return Word(utils.redux(word.value, to_value(0xFFFFFFFF), nvvm.ReductionKind.UMAX))

    def exchange(self, word: Word) -> Word:
        return self._ptx("shfl.sync.bfly.b32 $0, $1, 1, 31, 0xffffffff;", word, convergent=True)

    def loop(self, count, initial, body):
        def step(i, carried):
            return [word.value for word in body(Word(i), [Word(value) for value in carried])]

        done = utils.fori(to_value(count), [word.value for word in initial])(step)
        return [Word(value) for value in done.results]
