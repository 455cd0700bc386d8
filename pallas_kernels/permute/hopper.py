"""The permutation's kernels on Hopper: threads.py through the machine of the packing kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.hopper.mlir_words import Word, i32, to_value
from pallas_kernels.pack import hopper
from pallas_kernels.permute import threads
from pallas_kernels.permute.machine import Machine
from pallas_kernels.permute.reference import Sorted, max_rows
from pallas_kernels.permute.threads import Choice, Rows, Sort

_SHARED_WORDS = 2048
"""What `pack.hopper.launch` counts shared memory in."""


def gather_rows(tokens: jax.Array, token_of_row: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """As `reference.gather_rows`; a row is a multiple of 16 bytes."""
    (count, width), itemsize = tokens.shape, tokens.dtype.itemsize
    weighted = weights is not None
    rows = Rows(token_of_row.shape[0], width * itemsize // 16, count, itemsize=itemsize, weighted=weighted)
    out = {"rows": jax.ShapeDtypeStruct((rows.count, width), tokens.dtype)}
    arrays = {"tokens": tokens, "token_of_row": token_of_row} | ({"weights": weights} if weighted else {})
    return _launch(threads.gather, rows, arrays, out)["rows"]


def sum_copies(rows: jax.Array, row_of_slot: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """As `reference.sum_copies`; a row is a multiple of 16 bytes."""
    (count, width), (tokens, top_k), itemsize = rows.shape, row_of_slot.shape, rows.dtype.itemsize
    weighted = weights is not None
    problem = Rows(tokens, width * itemsize // 16, count, top_k, itemsize, weighted)
    out = {"tokens": jax.ShapeDtypeStruct((tokens, width), rows.dtype)}
    arrays = {"rows": rows, "row_of_slot": row_of_slot} | ({"weights": weights} if weighted else {})
    return _launch(threads.add_up, problem, arrays, out)["tokens"]


def sort_into_groups(group: jax.Array, groups: int, *, align: int, interleaved: bool) -> Sorted:
    """As `reference.sort_into_groups`, for at most `threads.MAX_GROUPS` groups."""
    tokens, top_k = group.shape
    sort = Sort(tokens, top_k, groups, align, interleaved, max_rows(tokens, top_k, groups, align))
    counts = {"counts": jax.ShapeDtypeStruct((sort.chunks, groups), jnp.int32)}
    found = _launch(threads.count, sort, {"group": group}, counts, words=sort.table_words)
    out = {
        "token_of_row": jax.ShapeDtypeStruct((sort.rows,), jnp.int32),
        "row_of_slot": jax.ShapeDtypeStruct(group.shape, jnp.int32),
        "group_sizes": jax.ShapeDtypeStruct((groups,), jnp.int32),
    }
    return Sorted(**_launch(threads.place, sort, {"group": group, **found}, out, words=sort.shared_words))


def choose_experts(x: jax.Array, means: jax.Array, bias: jax.Array | None, top_k: int, *, cosine: bool) -> jax.Array:
    """[T, k]: the best experts of each token, ascending, reading x once. x is bf16, its width a multiple of 128.

    A product of x with a mean in f32 is one with three bf16 parts of the mean, exact but for the order of the sum.
    """
    choice = Choice(x.shape[0], x.shape[1], means.shape[0], top_k, cosine)
    bias = jnp.zeros(choice.experts, jnp.float32) if bias is None else bias.astype(jnp.float32)
    arrays = {"x": x, "means": _in_parts(means, choice.padded_experts), "bias": bias}
    out = {"chosen": jax.ShapeDtypeStruct((choice.tokens, top_k), jnp.int32)}
    return _launch(threads.choose_experts, choice, arrays, out, words=choice.shared_words)["chosen"]


def _in_parts(means: jax.Array, padded: int) -> jax.Array:
    """f32 [E, D] -> bf16 [3, padded, D], the three of which add up to the mean; zeros for experts there are none of."""
    parts, rest = [], means.astype(jnp.float32)
    for _ in range(threads.PARTS):
        # A conversion to bf16 and back is something XLA may leave out.
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return jnp.pad(jnp.stack(parts), ((0, 0), (0, padded - means.shape[0]), (0, 0)))


def _launch[Problem: (Rows, Sort, Choice)](
    body: Callable[[Machine, Problem], None], problem: Problem, arrays: dict, out: dict, *, words: int = 0
) -> dict[str, jax.Array]:
    """Run `body` in the problem's blocks, with so many words of shared memory."""
    dtype = next((a.dtype for a in arrays.values() if a.dtype in (jnp.bfloat16, jnp.float16)), jnp.bfloat16)

    def run(machine: Machine) -> None:
        body(machine, problem)

    shared = -(-words // _SHARED_WORDS)
    return hopper.launch(run, problem.blocks, dtype, arrays, out, shared=shared, machine=_MlirMachine)


class _MlirMachine(hopper.MlirMachine, Machine):
    """`machine.Machine` that emits the code of one thread."""

    def store_word_if(self, name, index, word, mask):
        with utils.when(arith.cmpi(arith.CmpIPredicate.ne, mask.value, to_value(0))):
            self.store_word(name, index, word)

    def equal_lanes(self, word):
        return self._ptx("match.any.sync.b32 $0, $1, 0xffffffff;", word, convergent=True)

    def count_ones(self, word):
        return self._ptx("popc.b32 $0, $1;", word)

    def widen(self, pair):
        if self._type == "bf16":
            return pair << 16, pair & 0xFFFF0000
        code = "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, HALF; }"
        return self._ptx(code.replace("HALF", "l"), pair), self._ptx(code.replace("HALF", "h"), pair)

    def add_f32(self, a, b):
        return self._f32(arith.addf, a, b)

    def divide_f32(self, a, b):
        return self._f32(arith.divf, a, b)

    def root_f32(self, a):
        f32 = ir.F32Type.get()
        root = utils.inline_ptx("sqrt.rn.f32 $0, $1;", arith.bitcast(f32, a.value), result_types=f32)
        return Word(arith.bitcast(i32(), root))

    def mma(self, a, b, sums):
        f32 = ir.F32Type.get()
        found = utils.inline_ptx(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{self._type}.{self._type}.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
            *(word.value for word in (*a, *b)),
            *(arith.bitcast(f32, word.value) for word in sums),
            result_types=[f32] * 4,
            convergent=True,
        )
        return [Word(arith.bitcast(i32(), value)) for value in found]
