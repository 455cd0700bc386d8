"""A warpgroup's products over the stages of a tile, and meanwhile the stores of the tile before, as one block of PTX.

The products are `wgmma.mma_async.sp`, on Hopper's sparse tensor cores; Pallas has no sparse MMA for Hopper. The code
runs inside `plgpu.inline_mgpu`, below Pallas's arrays: results are FragmentedArrays in registers, operands tiled and
swizzled views of shared memory.

The accumulators belong to the tensor core while products are in flight. As values of the compiler they may move, and a
register that it copies keeps an old sum (docs/log.md); inside one block they are registers and stay what they are. So
a stage's products are issued while those of the stage before still run: the barrier and the metadata of the next stage,
the release of the last one and the stores of the tile before all pass behind products.
"""

from typing import Any, NamedTuple

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.tiles import CHUNK_BYTES, FP8, GRANULE, STAGE_BYTES, AForm

_MMA_M = 64
"""Rows of one instruction."""
_MMA_BYTES = 32
"""Bytes of a row of A in shared memory that one instruction reads: 16 values of 16 bits or 32 of 8, dense or stored."""

# A tile of A in shared memory: 64 rows of 64 bytes, swizzled over 64 bytes (tile_order.py).
_ROW_BYTES = 64
_TILE_BYTES = _MMA_M * _ROW_BYTES


_PTX_TYPE = {"bfloat16": "bf16", "float16": "f16", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
_CHUNK_SIZE = GRANULE * CHUNK_BYTES
_CHUNK_COLUMNS = CHUNK_BYTES // 2


class Stages(NamedTuple):
    """The ring as this warpgroup sees it, all in shared memory."""

    a: Any
    """[S, m / 64, 8, 256] stored values tile by tile (tile_order.py), or the same bytes as [S, m, 32]; or a dense A,
    [S, m, 64] or [S, 64, m] as `Problem.a` says, tiled and swizzled as B. Of 8 bits rows have twice the entries."""
    b: Any
    """[S, 64, n], or [S, n, 64] where B is k-major, tiled (8, 64) and swizzled over 128 bytes."""
    barriers: Any
    """`ring.barriers`."""
    metadata: Any = None
    """int32 [S, m / 64, 128]: one word per thread, of 8 bits [S, m / 64, 2, 128]; None with a dense A."""


class Deferred(NamedTuple):
    """A finished tile's part of this warpgroup, to be stored chunk by chunk behind the products of the next."""

    values: fa.FragmentedArray
    """[m, n] of 16 bits in WGMMA layout."""
    place: tuple
    """i32: row and column of its first entry in the output, and the row and column it ends before."""
    chunks: Any
    """Shared memory of this warpgroup, [slots, 64, 64] or its transposed tiles."""
    descriptor: Any
    """The copy engine's description of the output in boxes of 64 x 64."""
    transposed: bool
    row_scales: Any = None
    """Shared memory, f32 [m], where rows are to be scaled by powers of two; the values are bfloat16."""
    column_scales: Any = None
    """... and f32 [n] for columns."""


def multiply(
    shape: tuple[int, int],
    stages: Stages,
    step,
    steps,
    deferred: Deferred | None = None,
    *,
    b_k_major: bool,
    dtype: str,
    a: AForm,
    fences: bool = False,
    b_dtype: str = "",
    promote: int = 0,
):
    """The sum over the products of `steps` stages of the ring from step `step` on, f32 [m, n] in WGMMA layout.

    Args:
      shape: [m, n], m a multiple of 64, n of 8 and at most 256.
      step, steps: i32.
      deferred: what to store meanwhile.
      dtype: "bfloat16" or "float16", of both operands; or a type of 8 bits, then `b_dtype` is B's.
      promote: stages after which sums of 8-bit products are added to others in f32; 0: never.
      fences: threads wrote part of a stage and passed no fence towards the tensor core.
    """
    ring_size, (row_tiles, n) = ir.MemRefType(stages.a.type).shape[0], (shape[0] // _MMA_M, shape[1])
    sparse, narrow = stages.metadata is not None, dtype in FP8
    mma_k = _MMA_BYTES * (2 if sparse else 1) // (1 if narrow else 2)
    b_base, b_offsets, b_transposed = _describe_b(stages.b, n, b_k_major, mma_k)
    a_base, a_offsets, a_rows, a_transposed = _describe_sparse(stages.a) if sparse else _describe_dense(stages.a, a)
    thread = arith.remui(utils.thread_idx(), _i32(utils.WARPGROUP_SIZE))
    inputs = {
        "a": a_base,
        "b": b_base,
        "barriers": _address(stages.barriers),
        "slot": arith.remui(step, _i32(ring_size)),
        "parity": arith.andi(arith.divui(step, _i32(ring_size)), _i32(1)),
        "steps": steps,
        "thread": thread,
    }
    strides = {name: mma_utils.encode_addr(_stage_bytes(smem)) for name, smem in (("a", stages.a), ("b", stages.b))}
    if sparse:
        inputs["words"] = arith.addi(_address(stages.metadata), arith.muli(thread, _i32(4)))
        strides["words"] = _stage_bytes(stages.metadata)
    chunks, slots, kept = 0, 1, []
    if deferred is not None:
        inputs |= dict(zip(("m", "n", "m_end", "n_end"), deferred.place, strict=True))
        inputs |= {
            "lane": _lane_address(deferred, thread),
            "chunk": _address(deferred.chunks),
            "descriptor": deferred.descriptor,
            "warpgroup": utils.warpgroup_barrier_idx(sync=False),
        }
        for name, vector in (("row_scales", deferred.row_scales), ("column_scales", deferred.column_scales)):
            inputs |= {} if vector is None else {name: _address(vector)}
        kept = [utils.bitcast(register, ir.IntegerType.get_signless(32)) for register in deferred.values.registers.flat]
        slots = ir.MemRefType(deferred.chunks.type).shape[0]
        chunks = row_tiles * n // _CHUNK_COLUMNS
    count = row_tiles * n // 2
    first_kept = count + len(inputs)
    program = _Program(
        names={name: f"${count + i}" for i, name in enumerate(inputs)},
        strides=strides,
        ring_size=ring_size,
        row_tiles=row_tiles,
        n=n,
        k=mma_k,
        a_offsets=[[row * a_rows + offset for row in range(row_tiles)] for offset in a_offsets],
        a_transposed=a_transposed,
        b_offsets=b_offsets,
        b_transposed=b_transposed,
        ptx_type=f"{_PTX_TYPE[dtype]}.{_PTX_TYPE[b_dtype or dtype]}",
        narrow=narrow,
        promote=promote,
        fences=fences,
        chunks=chunks,
        slots=slots,
        kept=[f"${first_kept + i}" for i in range(len(kept))],
        out_transposed=deferred is not None and deferred.transposed,
    )
    register = ir.VectorType.get((1,), ir.F32Type.get())
    operands: list[Any] = [*inputs.values(), *kept]
    result = llvm.inline_asm(
        llvm.StructType.get_literal([register] * count),
        operands,
        program.text(),
        ",".join(["=f"] * count + [_constraint(operand) for operand in operands]),
        asm_dialect=0,
        has_side_effects=True,
    )
    assert isinstance(result, ir.Value)
    registers = np.array([llvm.extractvalue(register, result, [i]) for i in range(count)], dtype=object)
    layout = fa.WGMMA_LAYOUT_ACC_32BIT
    registers = registers.reshape(layout.registers_shape(shape))
    return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None).to_layout(fa.WGMMA_LAYOUT)


class _Program(NamedTuple):
    """What the text of the block depends on."""

    names: dict[str, str]
    """The operand of each input."""
    strides: dict[str, int]
    """From stage to stage: of the descriptors, and of the metadata in bytes."""
    ring_size: int
    row_tiles: int
    n: int
    k: int
    """Logical columns of A, and rows of B, of one instruction."""
    a_offsets: list[list[int]]
    """Bytes from the stage's A to that of each instruction: for each step along k, of each 64 rows."""
    a_transposed: bool
    b_offsets: list[int]
    """Bytes from the stage's B to that of each step along k."""
    b_transposed: bool
    ptx_type: str
    fences: bool = False
    narrow: bool = False
    """Operands of 8 bits: of each 64 rows one metadata word a thread for each step along k, not one for all."""
    promote: int = 0
    chunks: int = 0
    slots: int = 1
    kept: list[str] = []  # noqa: RUF012
    """Operands that hold the deferred tile: for each 64 rows and 8 columns two words, rows g and g + 8."""
    out_transposed: bool = False

    @property
    def sparse(self) -> bool:
        return "words" in self.names

    def text(self) -> str:
        """The first stages store a chunk each; then two stages that differ in the registers of metadata, in a loop."""
        if self.promote:
            return self._text_promoting()
        words = self._words("even") + self._words("odd")
        lines = [
            "{",
            ".reg .pred last, done, leads, begun;",
            ".reg .b32 left, slot, parity, before, barrier, address;",
            ".reg .b64 a_desc, b_desc, slot64;",
            *([f".reg .b32 {', '.join(words)};"] if words else []),
            *(f"mov.f32 ${i}, 0f00000000;" for i in range(self.row_tiles * self.n // 2)),
            f"mov.b32 left, {self.names['steps']};",
            f"mov.b32 slot, {self.names['slot']};",
            f"mov.b32 parity, {self.names['parity']};",
            "mov.b32 before, slot;",
            f"setp.eq.u32 leads, {self.names['thread']}, 0;",
            "setp.ne.b32 begun, left, left;",
            "setp.le.s32 done, left, 0;",
            "@done bra EMPTY;",
            *self._await_stage("even", "FIRST"),
        ]
        ends = 0 if self.fences else 1
        for i in range(self.chunks):
            lines += self._stage(i % 2, f"CHUNK_{i}", f"END_{i + ends}", self._store(i))
        lines += [
            "LOOP:",
            *self._stage(self.chunks % 2, "LOOP_1", f"END_{self.chunks}", []),
            *self._stage((self.chunks + 1) % 2, "LOOP_2", f"END_{self.chunks}", []),
            "bra LOOP;",
        ]
        for i in range(ends, self.chunks):
            lines += [f"END_{i}:", *self._store(i)]
        lines += [
            f"END_{self.chunks}:",
            "wgmma.wait_group.sync.aligned 0;",
            *self._give_back("leads"),
            "bra DONE;",
            "EMPTY:",
            *(line for i in range(self.chunks) for line in self._store(i)),
            "DONE:",
            "}",
        ]
        return "\n".join(lines)

    def _text_promoting(self) -> str:
        """As `text`, but sums of `promote` stages are added to the outputs by ordinary instructions."""
        count, words = self.row_tiles * self.n // 2, self._words("even") + self._words("odd")
        add = ["wgmma.wait_group.sync.aligned 0;", *self._give_back("leads")]
        add += [f"add.f32 ${i}, ${i}, sum{i};" for i in range(count)]
        lines = [
            "{",
            ".reg .pred last, done, leads, never;",
            ".reg .b32 left, slot, parity, before, barrier, address;",
            ".reg .b64 a_desc, b_desc, slot64;",
            *([f".reg .b32 {', '.join(words)};"] if words else []),
            f".reg .f32 sum<{count}>;",
            *(f"mov.f32 ${i}, 0f00000000;" for i in range(count)),
            *(f"mov.f32 sum{i}, 0f00000000;" for i in range(count)),
            f"mov.b32 left, {self.names['steps']};",
            f"mov.b32 slot, {self.names['slot']};",
            f"mov.b32 parity, {self.names['parity']};",
            "mov.b32 before, slot;",
            f"setp.eq.u32 leads, {self.names['thread']}, 0;",
            "setp.ne.b32 never, left, left;",
            "setp.le.s32 done, left, 0;",
            "@done bra EMPTY;",
            *self._await_stage("even", "FIRST"),
        ]
        stored = 0
        for i in range(-(-self.chunks // self.promote)):  # the first groups store a chunk with each stage
            chunks = range(stored, min(stored + self.promote, self.chunks))
            lines += self._group(f"GROUP_{i}", f"CHUNKS_{i}", chunks, add)
            stored = chunks.stop
        lines += ["LOOP:", *self._group("LOOP", "LAST", range(self.chunks, self.chunks), add), "bra LOOP;"]
        # A tile of fewer stages than chunks: what is left to store, by which group it ended in.
        lines += ["LAST:", *add, "bra DONE;"]
        for i in range(-(-self.chunks // self.promote)):
            for j in range(min(self.promote, self.chunks - i * self.promote)):
                lines += [f"CHUNKS_{i}_{j}:", *add]
                lines += [line for k in range(i * self.promote + j + 1, self.chunks) for line in self._store(k)]
                lines += ["bra DONE;"]
        lines += ["EMPTY:", *(line for i in range(self.chunks) for line in self._store(i)), "DONE:", "}"]
        return "\n".join(lines)

    def _group(self, label: str, end: str, chunks: range, add: list[str]) -> list[str]:
        """`promote` stages, and their sums added up; a stage per chunk stores it."""
        lines = []
        for j in range(self.promote):
            word, other = ("odd", "even") if j % 2 else ("even", "odd")
            lines += self._products(word, sums="sum", fresh=j == 0)
            if j:
                lines += ["wgmma.wait_group.sync.aligned 1;", *self._give_back("leads")]
            if j < len(chunks):
                lines += self._store(chunks[j])
            lines += [
                "mov.b32 before, slot;",
                "add.u32 slot, slot, 1;",
                f"setp.eq.u32 last, slot, {self.ring_size};",
                "@last xor.b32 parity, parity, 1;",
                "@last mov.b32 slot, 0;",
                "sub.s32 left, left, 1;",
                "setp.eq.s32 done, left, 0;",
                f"@done bra {end}_{j};" if j < len(chunks) else "@done bra LAST;",
                *self._await_stage(other, f"{label}_{j}"),
            ]
        return [*lines, *add]

    def _await_stage(self, word: str, label: str) -> list[str]:
        found = [
            f"mad.lo.u32 barrier, slot, 8, {self.names['barriers']};",
            f"WAIT_{label}:",
            "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [barrier], parity;",
            f"@!done bra WAIT_{label};",
            *(["fence.proxy.async.shared::cta;"] if self.fences else []),
        ]
        if not self.sparse:
            return found
        return [
            *found,
            f"mad.lo.u32 address, slot, {self.strides['words']}, {self.names['words']};",
            *(f"ld.shared.b32 {name}, [address + {i * 512}];" for i, name in enumerate(self._words(word))),
        ]

    def _words(self, word: str) -> list[str]:
        """Registers of a stage's metadata: for each 64 rows one, or with 8 bits one for each step along k."""
        rows = range(self.row_tiles if self.sparse else 0)
        if not self.narrow:
            return [f"{word}{row}" for row in rows]
        return [f"{word}{row}_{step}" for row in rows for step in range(len(self.b_offsets))]

    def _products(self, word: str, *, sums: str = "$", fresh: bool = False) -> list[str]:
        """sums: what the registers of the sums are called; fresh: they begin anew."""
        count = self.n // 2
        found = [
            "cvt.u64.u32 slot64, slot;",
            f"mad.lo.u64 a_desc, slot64, {self.strides['a']}, {self.names['a']};",
            f"mad.lo.u64 b_desc, slot64, {self.strides['b']}, {self.names['b']};",
            "wgmma.fence.sync.aligned;",
        ]
        kind = "sp.sync" if self.sparse else "sync"
        # Of 8 bits the instruction transposes nothing.
        tail = "1, 1" if self.narrow else f"1, 1, {int(self.a_transposed)}, {int(self.b_transposed)}"
        for step, (a_offsets, b_offset) in enumerate(zip(self.a_offsets, self.b_offsets, strict=True)):
            for row, a_offset in enumerate(a_offsets):
                outputs = ",".join(f"{sums}{row * count + i}" for i in range(count))
                selected = (f" {word}{row}_{step}, 0," if self.narrow else f" {word}{row}, {step},") * self.sparse
                found += [
                    "{",
                    ".reg .b64 a, b;",
                    f"add.u64 a, a_desc, {mma_utils.encode_addr(a_offset)};",
                    f"add.u64 b, b_desc, {mma_utils.encode_addr(b_offset)};",
                    f"wgmma.mma_async.{kind}.aligned.m{_MMA_M}n{self.n}k{self.k}.f32.{self.ptx_type} "
                    f"{{{outputs}}}, a, b,{selected} {'never' if fresh and not step else 1}, {tail};",
                    "}",
                ]
        return [*found, "wgmma.commit_group.sync.aligned;"]

    def _give_back(self, predicate: str) -> list[str]:
        return [
            f"mad.lo.u32 barrier, before, 8, {self.names['barriers']};",
            f"@{predicate} mbarrier.arrive.release.cta.shared::cta.b64 _, [barrier + {8 * self.ring_size}];",
        ]

    def _stage(self, odd: int, label: str, end: str, meanwhile: list[str]) -> list[str]:
        word, other = ("odd", "even") if odd else ("even", "odd")
        return [
            *self._products(word),
            "wgmma.wait_group.sync.aligned 1;",
            "and.pred begun, begun, leads;",
            *self._give_back("begun"),
            "setp.eq.b32 begun, left, left;",
            *([] if self.fences else meanwhile),
            "mov.b32 before, slot;",
            "add.u32 slot, slot, 1;",
            f"setp.eq.u32 last, slot, {self.ring_size};",
            "@last xor.b32 parity, parity, 1;",
            "@last mov.b32 slot, 0;",
            "sub.s32 left, left, 1;",
            "setp.eq.s32 done, left, 0;",
            f"@done bra {end};",
            *self._await_stage(other, label),
            # A fence waits for what a store has begun: it goes first.
            *(meanwhile if self.fences else []),
        ]

    def _store(self, chunk: int) -> list[str]:
        """Chunk number `chunk` of the deferred tile into shared memory, and off to the output.

        Every thread waits for its copies and closes its group, though one alone has copies. Were these for that thread
        only, ptxas would lead the others past both, from the end of one store into the next, and never join the warp
        again: its barriers would count it twice and the kernel would hang (docs/log.md).
        """
        per_row = self.n // _CHUNK_COLUMNS
        i, j = chunk // per_row, chunk % per_row
        slot = chunk % self.slots * _CHUNK_SIZE
        step = "add.u32 to, to, 2048;" if self.out_transposed else None
        first = i * self.n // 4 + j * _CHUNK_COLUMNS // 4
        scaling, names = self._scale(i, j, self.kept[first : first + 16])
        matrices = []
        for q in range(4):
            words = ", ".join(names[4 * q : 4 * q + 4])
            kind = ".trans" if self.out_transposed else ""
            if q:
                # Not transposed, two blocks of columns on, another piece of the same swizzled row.
                matrices.append(step or f"xor.b32 to, to, {32 * (q ^ (q - 1))};")
            matrices.append(f"stmatrix.sync.aligned.m8n8.x4{kind}.shared.b16 [to], {{{words}}};")
        box = f"[{self.names['descriptor']}, {'{row, col}' if self.out_transposed else '{col, row}'}]"
        return [
            "{",
            ".reg .pred owned;",
            ".reg .b32 row, col, to;",
            f"add.s32 row, {self.names['m']}, {i * GRANULE};",
            f"add.s32 col, {self.names['n']}, {j * _CHUNK_COLUMNS};",
            f"setp.lt.s32 owned, row, {self.names['m_end']};",
            f"setp.lt.and.s32 owned, col, {self.names['n_end']}, owned;",
            "and.pred owned, owned, leads;",
            f"cp.async.bulk.wait_group.read {self.slots - 1};",
            f"bar.sync {self.names['warpgroup']}, {utils.WARPGROUP_SIZE};",
            f"add.u32 to, {self.names['lane']}, {slot};",
            *scaling,
            *matrices,
            "fence.proxy.async.shared::cta;",
            f"bar.sync {self.names['warpgroup']}, {utils.WARPGROUP_SIZE};",
            f"add.u32 to, {self.names['chunk']}, {slot};",
            f"@owned cp.async.bulk.tensor.2d.global.shared::cta.bulk_group {box}, [to];",
            "cp.async.bulk.commit_group;",
            "}",
        ]

    def _scale(self, i: int, j: int, words: list[str]) -> tuple[list[str], list[str]]:
        """The words of a chunk times the scales in shared memory: the code, and the registers with the results.

        Scales are powers of two, so that a product of two bfloat16 is exact, as if it had been rounded after it.
        """
        by_row, by_column = (self.names.get(name) for name in ("row_scales", "column_scales"))
        if not (by_row or by_column):
            return [], words
        thread = self.names["thread"]
        lines = [".reg .b32 scaled<16>, scale<2>, mine;", ".reg .f32 low, high;"]
        if by_column:
            lines += [f"and.b32 mine, {thread}, 3;", f"mad.lo.u32 mine, mine, 8, {by_column};"]
            for block in range(8):  # of 8 columns, two of them this thread's
                lines += [
                    f"ld.shared.v2.f32 {{low, high}}, [mine + {4 * (j * _CHUNK_COLUMNS + 8 * block)}];",
                    "cvt.rn.bf16x2.f32 scale0, high, low;",
                    *(f"mul.rn.bf16x2 scaled{q}, {words[q]}, scale0;" for q in (2 * block, 2 * block + 1)),
                ]
            words = [f"scaled{q}" for q in range(16)]
        if by_row:
            lines += [
                f"shr.u32 mine, {thread}, 5;",
                "shl.b32 mine, mine, 4;",
                f"bfe.u32 scale0, {thread}, 2, 3;",
                "add.u32 mine, mine, scale0;",
                f"mad.lo.u32 mine, mine, 4, {by_row};",
                f"ld.shared.f32 low, [mine + {4 * i * GRANULE}];",
                f"ld.shared.f32 high, [mine + {4 * (i * GRANULE + 8)}];",
                "cvt.rn.bf16x2.f32 scale0, low, low;",
                "cvt.rn.bf16x2.f32 scale1, high, high;",
                *(f"mul.rn.bf16x2 scaled{q}, {words[q]}, scale{q % 2};" for q in range(16)),
            ]
        return lines, [f"scaled{q}" for q in range(16)]


def _lane_address(deferred: Deferred, thread):
    """Where this thread's row of the first `stmatrix` of a chunk lies: row l % 8 of matrix l / 8.

    The matrices are 8 rows (g, then g + 8 of the warp's 16) of 8 columns, then the same rows of the next 8 columns. A
    chunk's rows have 128 bytes, piece p of row r at p xor (r mod 8).
    """
    lane, warp = arith.remui(thread, _i32(32)), arith.divui(thread, _i32(32))
    row_in_matrix, low = arith.andi(lane, _i32(7)), arith.andi(arith.shrui(lane, _i32(3)), _i32(1))
    high = arith.shrui(lane, _i32(4))
    if deferred.transposed:
        row = arith.addi(arith.muli(high, _i32(8)), row_in_matrix)
        piece = arith.addi(arith.muli(warp, _i32(2)), low)
    else:
        row = arith.addi(arith.muli(warp, _i32(16)), arith.addi(arith.muli(low, _i32(8)), row_in_matrix))
        piece = high
    swizzled = arith.muli(arith.xori(piece, row_in_matrix), _i32(16))
    offset = arith.addi(arith.muli(row, _i32(CHUNK_BYTES)), swizzled)
    return arith.addi(_address(deferred.chunks), offset)


def _describe_b(stages_b, n: int, k_major: bool, k_step: int):
    """Descriptor of the first stage's B, the bytes to B of each step along k, and whether B is transposed."""
    b = utils.memref_slice(stages_b, 0)
    if k_major:
        b = utils.memref_transpose(b, (1, 0, 3, 2))
    (k, _), _ = mma_utils.tiled_memref_shape(b)
    tile = CHUNK_BYTES // _bytes_of(b)
    if k != tile:
        raise ValueError(f"a stage holds {tile} columns of A; b has {k} rows")
    (base, strides), (_, tile_stride), fastest = mma_utils.create_descriptor(
        b, swizzle=CHUNK_BYTES, large_tile=(tile, tile), group_size=(tile, n), logical_k_major=True
    )
    if strides[0]:
        raise NotImplementedError("B must be tiled like its swizzle")
    (stride,) = strides[1]
    offsets = [
        row // tile * tile_stride + row % tile // (_MMA_BYTES // _bytes_of(b)) * stride for row in range(0, k, k_step)
    ]
    return base, offsets, fastest != mma_utils.Dim.K


def _describe_sparse(stages_a):
    """Descriptor of the first stage's stored values, the bytes to each step along k, those of 64 rows, and False."""
    # The first offset has no meaning where rows are as long as the swizzle; the second leads to the next eight rows.
    base = mma_utils.encode_descriptor(
        utils.memref_slice(stages_a, 0), leading_byte_offset=0, stride_byte_offset=8 * _ROW_BYTES, swizzle=_ROW_BYTES
    )
    return base, list(range(0, _ROW_BYTES, _MMA_BYTES)), _TILE_BYTES, False


def _describe_dense(stages_a, form: AForm):
    """As `_describe_sparse` for a dense A, and whether it is transposed."""
    a = utils.memref_slice(stages_a, 0)
    if form == "m_major":
        a = utils.memref_transpose(a, (1, 0, 3, 2))
    tile = CHUNK_BYTES // _bytes_of(a)
    (base, strides), (row_stride, _), fastest = mma_utils.create_descriptor(
        a, swizzle=CHUNK_BYTES, large_tile=(_MMA_M, tile), group_size=(_MMA_M, tile), logical_k_major=False
    )
    if strides[0]:
        raise NotImplementedError("A must be tiled like its swizzle")
    (stride,) = strides[1]
    steps = STAGE_BYTES // _MMA_BYTES
    return base, [step * stride for step in range(steps)], row_stride, fastest != mma_utils.Dim.K


def _i32(value: int):
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _constraint(value: ir.Value) -> str:
    return "r" if value.type == ir.IntegerType.get_signless(32) else "l"


def _address(smem):
    """The address of shared memory as 32 bits."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(smem))


def _stage_bytes(smem) -> int:
    strides, _ = ir.MemRefType(smem.type).get_strides_and_offset()
    return strides[0] * _bytes_of(smem)


def _bytes_of(smem) -> int:
    """Bytes of an entry."""
    return utils.bitwidth(ir.MemRefType(smem.type).element_type) // 8
