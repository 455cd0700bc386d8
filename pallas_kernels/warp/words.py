"""`Machine` as MLIR with PTX of our own: nothing that sm_80 lacks, no copy engine, no mbarrier, no cluster."""

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.hopper.mlir_words import Word, i32, to_value
from pallas_kernels.warp import machine

PTX_TYPE = {"bfloat16": "bf16", "float16": "f16"}


class Real:
    """An f32 of MLIR."""

    def __init__(self, value: ir.Value):
        self.value = value

    def __mul__(self, other: "Real | float") -> "Real":
        return Real(arith.mulf(self.value, _real_value(other)))

    def __add__(self, other: "Real | float") -> "Real":
        return Real(arith.addf(self.value, _real_value(other)))


class Pointer:
    """A 64-bit address of MLIR."""

    def __init__(self, value: ir.Value):
        self.value = value


class Condition:
    """A truth value of MLIR."""

    def __init__(self, value: ir.Value):
        self.value = value


class MlirMachine(machine.Machine):
    """Emits the code of one thread."""

    def __init__(self, pointers: dict[str, ir.Value], shared: ir.Value, dtype: str, out_dtype: str):
        self._pointers = {name: llvm.ptrtoint(_i64(), pointer) for name, pointer in pointers.items()}
        self._type, self._out_type = PTX_TYPE[dtype], PTX_TYPE.get(out_dtype)
        self.shared = Word(llvm.ptrtoint(i32(), shared))
        self.thread = Word(utils.thread_idx())

    def _ptx(self, code: str, *operands: Any, results: Any = None, predicate: Condition | None = None) -> Any:
        """In program order with all others of these; a warp's instructions are never made conditional."""
        return utils.inline_ptx(
            code,
            *(operand.value for operand in operands),
            result_types=results,
            predicate=None if predicate is None else predicate.value,
            has_side_effects=True,
            convergent=True,
        )

    def constant(self, value):
        return Word(to_value(value))

    def less(self, a, b):
        return Condition(arith.cmpi(arith.CmpIPredicate.slt, a.value, to_value(b)))

    def equal(self, a, b):
        return Condition(arith.cmpi(arith.CmpIPredicate.eq, a.value, to_value(b)))

    def both(self, a, b):
        return Condition(arith.andi(a.value, b.value))

    def select(self, condition, a, b):
        return type(a)(arith.select(condition.value, a.value, b.value))

    def when(self, condition, body):
        with utils.when(condition.value):
            body()

    def loop(self, count, state, body):
        kinds = [type(value) for value in state]
        loop = scf.ForOp(to_value(0), count.value, to_value(1), [value.value for value in state])
        with ir.InsertionPoint(loop.body):
            inside = [kind(value) for kind, value in zip(kinds, loop.inner_iter_args, strict=True)]
            scf.yield_([value.value for value in body(Word(loop.induction_variable), inside)])
        return [kind(value) for kind, value in zip(kinds, loop.results, strict=True)]

    def barrier(self):
        self._ptx("bar.sync 0;")

    def warp_barrier(self):
        self._ptx("bar.warp.sync 0xffffffff;")

    def pointer(self, name, *terms):
        address = self._pointers[name]
        for word, factor in terms:
            wide = arith.muli(arith.extui(_i64(), to_value(word)), arith.constant(_i64(), factor))
            address = arith.addi(address, wide)
        return Pointer(address)

    def advance(self, pointer, by):
        return Pointer(arith.addi(pointer.value, arith.constant(_i64(), by)))

    def copy(self, to, to_offset, pointer, offset, index, left):
        code = f"cp.async.cg.shared.global.L2::128B [$0+{to_offset}], [$1+{offset}], 16;"
        if left is None:
            self._ptx(code, to, pointer)
        else:
            self._ptx(f"{{ .reg .pred p; setp.gt.s32 p, $2, {index}; @p {code} }}", to, pointer, left)

    def copy_row(self, to, to_offset, pointer, row, rows, row_bytes, left):
        exists = Condition(arith.cmpi(arith.CmpIPredicate.ult, row.value, to_value(rows)))
        size = self.select(exists, self.constant(16), self.constant(0))  # of no bytes nothing is read
        wide = arith.muli(arith.extui(_i64(), row.value), arith.constant(_i64(), row_bytes))
        source = Pointer(arith.addi(pointer.value, wide))
        code = f"cp.async.cg.shared.global [$0+{to_offset}], [$1], 16, $2;"
        if left is None:
            self._ptx(code, to, source, size)
        else:
            self._ptx(f"{{ .reg .pred p; setp.gt.s32 p, $3, 0; @p {code} }}", to, source, size, left)

    def commit(self):
        self._ptx("cp.async.commit_group;")

    def wait(self, pending):
        self._ptx(f"cp.async.wait_group {pending};")

    def load_matrices(self, address, offset, *, transposed):
        kind = ".trans" if transposed else ""
        code = f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16 {{$0,$1,$2,$3}}, [$4+{offset}];"
        return _words(self._ptx(code, address, results=[i32()] * 4))

    def load_shared_word(self, address, offset):
        return Word(self._ptx(f"ld.shared.b32 $0, [$1+{offset}];", address, results=i32()))

    def multiply_sparse(self, sums, a, b, word, selector):
        code = (
            f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{self._type}.{self._type}.f32 "
            f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, $16, {selector};"
        )
        return [Real(value) for value in self._ptx(code, *a, *b, *sums, word, results=[_f32()] * 4)]

    def zero(self):
        return Real(_real_value(0.0))

    def maximum(self, a, b):
        return Real(arith.maximumf(a.value, _real_value(b)))

    def widen(self, pair):
        if self._out_type == "bf16":
            low, high = (arith.bitcast(_f32(), half.value) for half in (pair << 16, pair & 0xFFFF0000))
            return Real(low), Real(high)
        code = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
        low, high = self._ptx(code, pair, results=[_f32()] * 2)
        return Real(low), Real(high)

    def round_pair(self, low, high):
        return Word(self._ptx(f"cvt.rn.{self._out_type}x2.f32 $0, $1, $2;", high, low, results=i32()))

    def transpose(self, word):
        return Word(self._ptx("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", word, results=i32()))

    def load_reals(self, pointer, offset, count, condition):
        names = [f"${i}" for i in range(count)]
        kind, to = ("f32", "$0") if count == 1 else (f"v{count}.f32", f"{{{', '.join(names)}}}")
        load = f"ld.global.{kind} {to}, [${count}+{offset}];"
        if condition is None:
            found = self._ptx(load, pointer, results=[_f32()] * count)
        else:
            zeros = " ".join(f"mov.f32 {name}, 0f00000000;" for name in names)
            found = self._ptx(f"{{ {zeros} @${count + 1} {load} }}", pointer, condition, results=[_f32()] * count)
        return [Real(value) for value in found]

    def load_word(self, pointer, offset, condition):
        if condition is None:
            return Word(self._ptx(f"ld.global.b32 $0, [$1+{offset}];", pointer, results=i32()))
        code = f"{{ mov.b32 $0, 0; @$2 ld.global.b32 $0, [$1+{offset}]; }}"
        return Word(self._ptx(code, pointer, condition, results=i32()))

    def store_reals(self, pointer, offset, reals, condition):
        values = ", ".join(f"${i + 1}" for i in range(len(reals)))
        kind, values = ("f32", values) if len(reals) == 1 else (f"v{len(reals)}.f32", f"{{{values}}}")
        self._ptx(f"st.global.{kind} [$0+{offset}], {values};", pointer, *reals, predicate=condition)

    def store_shared_word(self, address, offset, word):
        self._ptx(f"st.shared.b32 [$0+{offset}], $1;", address, word)

    def load_shared_piece(self, address, offset):
        return _words(self._ptx(f"ld.shared.v4.b32 {{$0,$1,$2,$3}}, [$4+{offset}];", address, results=[i32()] * 4))

    def store_piece(self, pointer, offset, words, condition):
        self._ptx(f"st.global.v4.b32 [$0+{offset}], {{$1,$2,$3,$4}};", pointer, *words, predicate=condition)


def _words(values: Sequence[ir.Value]) -> list[Word]:
    return [Word(value) for value in values]


def _real_value(real: "Real | float") -> ir.Value:
    return real.value if isinstance(real, Real) else arith.constant(_f32(), float(real))


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _f32() -> ir.Type:
    return ir.F32Type.get()
