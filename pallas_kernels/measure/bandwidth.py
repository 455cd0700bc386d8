"""Time what moves data against a copy of as many bytes: python -m pallas_kernels.bandwidth --json FILE [--cases WORD]

Packing (rows `bench` = "pack"), casts ("cast") and permutation ("permute"): the Mosaic kernels, the same operation in
jnp as XLA compiles it, through jax-triton where that is installed and has it, and XLA's copy of the bytes that the
operation must move, half read and half written. A case is timed only after the kernels' results have passed the
comparison with jnp: to the bit, but for the choice of experts, where a hundredth of the tokens may differ by the order
of a sum. All rivals of a case take turns. `copies` is ms / the copy's ms; --table also writes a Markdown table.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cast8 import api as cast8
from pallas_kernels.measure import command_line, timing
from pallas_kernels.measure.rows import heading, stamp, write
from pallas_kernels.pack import api as pack
from pallas_kernels.permute import api as permute
from pallas_kernels.permute import reference
from pallas_kernels.triton import api as triton

TOKENS = 16384
SIZES = ((2048, 8192), (4096, 16384))
"""(D, F)."""
ROUTES = ((4, 1), (4, 2), (16, 4))
"""(E, k)."""
_SETS = 4
"""Argument sets that take turns, so that the L2 cache holds no operand from call to call."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation: `forms` by name ("hopper", "jnp", "triton"), arguments for a seed, and the bytes it must move."""

    bench: str
    forms: dict[str, Callable[..., Any]]
    arguments: Callable[[int], tuple]
    exact: bool = True


def cases() -> dict[str, Case]:
    """Every case by name."""
    return _packing() | _eight_bits() | _permutation()


def _forms(function: Callable[..., Any], other: Callable[..., Any] | None = None) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {
        "hopper": functools.partial(function, implementation="hopper"),
        "jnp": functools.partial(function, implementation="reference"),
    }
    if other is not None:
        found["triton"] = other
    return found


def _normal(seed: Any, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def _packing() -> dict[str, Case]:
    found = {}
    for d_model, d_ffn in SIZES:
        y = functools.partial(lambda d_ffn, seed: (_normal(seed, TOKENS, d_ffn),), d_ffn)
        for interleaved in (True, False):
            options = {"interleaved": interleaved}
            forms = _forms(
                functools.partial(pack.pack_activations, features=True, tokens=True, **options),
                functools.partial(triton.pack_activations, **options),
            )
            forms = {form: functools.partial(_without_repeats, function) for form, function in forms.items()}
            order = "interleaved" if interleaved else "consecutive"
            found[f"activations both ways {order} F={d_ffn}"] = Case("pack", forms, y)
        for dtype in (jnp.bfloat16, jnp.float32):
            for name, axis in (("W1", 0), ("W2", 1)):
                shape = (d_model, d_ffn) if axis == 0 else (d_ffn, d_model)
                options = {"axis": axis, "dtype": jnp.bfloat16}
                function = functools.partial(pack.pack_thresholded, **options)
                other = functools.partial(triton.pack_thresholded, **options)
                weight = functools.partial(
                    lambda shape, dtype, seed: (_normal(seed, *shape, dtype=dtype), jnp.float32(1.5)), shape, dtype
                )
                label = f"{name} {jnp.dtype(dtype).name} D={d_model} F={d_ffn}"
                found[label] = Case("pack", _forms(function, other), weight)
    return found


def _eight_bits() -> dict[str, Case]:
    """Packing and casts in e4m3, under scales that are given where a layer takes them from a sample."""
    found = {}
    for d_model, d_ffn in SIZES:
        scale = jnp.full(d_ffn, 2.0**-6)
        y = functools.partial(lambda d_ffn, seed: (_normal(seed, TOKENS, d_ffn),), d_ffn)
        x = functools.partial(lambda d_model, seed: (_normal(seed, TOKENS, d_model),), d_model)
        dy2 = functools.partial(lambda d, seed: (_normal(seed, TOKENS, d), _eight(seed, d, TOKENS)), d_ffn)
        weights = functools.partial(lambda *shape: (_eight(shape[2], *shape[:2]),), d_ffn, d_model)
        both: dict[str, Any] = {"features": True, "tokens": True, "interleaved": True, "scale": scale}
        forms = _forms(functools.partial(pack.pack_activations, **both))
        found[f"activations both ways e4m3 F={d_ffn}"] = Case("pack", forms, y)
        label = f"D={d_model} F={d_ffn}"
        for name, axis in (("W1", 0), ("W2", 1)):
            shape = (d_model, d_ffn) if axis == 0 else (d_ffn, d_model)
            masters = functools.partial(lambda s, seed: (_normal(seed, *s, dtype=jnp.float32), jnp.float32(1.5)), shape)
            packing = functools.partial(pack.pack_thresholded8, axis=axis)
            found[f"{name} float32 e4m3 {label}"] = Case("pack", _forms(packing), masters)
            neurons = functools.partial(lambda s, seed: (_normal(seed, *s, dtype=jnp.float32),), shape)
            found[f"{name} float32 dense e4m3 {label}"] = Case(
                "cast", _forms(functools.partial(cast8.weights, axis=1 - axis)), neurons
            )
        for name, function, arguments in (
            ("tokens both ways", functools.partial(cast8.both_ways, interleaved=True), x),
            ("tokens by row", cast8.by_row, x),
            ("tokens by column", functools.partial(cast8.by_column, interleaved=True), x),
            ("fold", functools.partial(_fold, scale), weights),
            ("dense y2", functools.partial(cast8.activate, scale=scale), y),
            ("dense dy1", functools.partial(cast8.differentiate, squared_scale=scale, scale=scale), dy2),
        ):
            found[f"{name} e4m3 {label}"] = Case("cast", _forms(function), arguments)
    return found


def _eight(seed: Any, *shape: int) -> jax.Array:
    """Squares of normal numbers in e4m3."""
    return jnp.square(_normal(seed, *shape)).astype(jnp.float8_e4m3fn)


def _fold(scale: jax.Array, values: jax.Array, **options: Any) -> cast8.Cast:
    return cast8.fold(cast8.Cast(values, scale), scale, **options)


def _without_repeats(function: Callable[..., pack.PackedActivations], y: jax.Array) -> tuple:
    """The positions that a and its square share only once: a program that gives them twice copies them."""
    packed = function(y)
    assert packed.squared is not None
    return packed.features, packed.squared.values, packed.tokens, packed.positives


def _permutation() -> dict[str, Case]:
    found = {}
    for experts, top_k in ROUTES:
        route = f"E={experts} k={top_k}"
        sort = functools.partial(permute.sort_into_groups, groups=experts, align=64, interleaved=True)
        found[f"sort {route}"] = Case("permute", _forms(sort), lambda seed, e=experts, k=top_k: (_routes(seed, e, k),))
        for d_model, _ in SIZES:
            where = functools.partial(_grouped, experts, top_k, d_model)
            label = f"{route} D={d_model}"
            found[f"gather {label}"] = Case(
                "permute", _forms(permute.gather_rows, triton.gather_rows), lambda seed, w=where: w(seed)[:2]
            )
            found[f"sum {label}"] = Case(
                "permute", _forms(permute.sum_copies, triton.sum_copies), lambda seed, w=where: w(seed)[2:]
            )
            choose = functools.partial(permute.choose_experts, bias=None, top_k=top_k, cosine=True)
            scored = functools.partial(
                lambda d, e, seed: (_normal(seed, TOKENS, d), _normal(99, e, d, dtype=jnp.float32) / d**0.5),
                d_model,
                experts,
            )
            found[f"choose {label}"] = Case("permute", _forms(choose), scored, exact=False)
    return found


def _routes(seed: Any, experts: int, top_k: int) -> jax.Array:
    """Random experts, ascending: uneven loads, the first a third as full as the last."""
    bias = jnp.linspace(-1.0, 0.0, experts)
    noise = jax.random.gumbel(jax.random.key(seed), (TOKENS, experts)) + bias
    return jnp.sort(jax.lax.top_k(noise, top_k)[1], axis=1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _grouped(experts: int, top_k: int, d_model: int, seed: Any) -> tuple[jax.Array, ...]:
    """Tokens and token_of_row, rows and row_of_slot."""
    where = reference.sort_into_groups(_routes(seed, experts, top_k), experts, align=64, interleaved=True)
    rows = where.token_of_row.shape[0]
    return (
        _normal(seed, TOKENS, d_model),
        where.token_of_row,
        _normal(seed + 1, rows, d_model),
        where.row_of_slot,
    )


def check(name: str, case: Case, form: str, found: Any, expected: Any) -> None:
    """Raise RuntimeError unless the results of `form` are jnp's."""
    for out, ref in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        different = float(jnp.mean(out != ref))
        if out.shape != ref.shape or different > (0 if case.exact else 1e-2):
            raise RuntimeError(f"{name}: {form} differs from jnp in {different:.1%} of {out.shape}; not timed")


def moved(case: Case, arguments: tuple) -> int:
    """Bytes of the arguments and of the results, once each."""
    leaves = jax.tree.leaves((arguments, jax.eval_shape(case.forms["jnp"], *arguments)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _copy(words: jax.Array) -> jax.Array:
    return words ^ 1


def prepare(name: str, case: Case) -> tuple[dict[str, timing.Run], int]:
    """Check and compile the forms of a case and the copy; and the bytes.

    Raises:
      RuntimeError: the kernel's result is wrong.
    """
    sets = [case.arguments(seed) for seed in range(_SETS)]
    runs = {"jnp": timing.repeated(case.forms["jnp"], sets)}
    expected = runs["jnp"]()[0]
    for form in case.forms.keys() - {"jnp"}:
        try:
            run = timing.repeated(case.forms[form], sets)
            check(name, case, form, run()[0], expected)
        except Exception as error:  # Triton fails in many ways; the other rivals are timed all the same
            if form == "hopper":
                raise
            print(f"{name}: {form}: {error}", flush=True)
            continue
        runs[form] = run
    bytes_ = moved(case, sets[0])
    runs["copy"] = timing.repeated(_copy, [(jnp.full(bytes_ // 8, seed, jnp.uint32),) for seed in range(_SETS)])
    return runs, bytes_


def measure(name: str, case: Case, runs: dict[str, timing.Run], bytes_: int) -> list[dict]:
    """The rows of one case: one for each rival."""
    times = timing.race(runs, dict.fromkeys(runs, _SETS), rounds=5, seconds=0.01)
    measured = stamp()
    ours = times.pop("hopper")
    return [
        {
            "bench": case.bench,
            "case": name,
            "ms": round(ours, 4),
            "rival": rival,
            "rival_ms": round(ms, 4),
            "speedup": round(ms / ours, 3),
            "copies": round(ours / times["copy"], 3),
            "bytes": bytes_,
            "relerr": 0.0,
        }
        | measured
        for rival, ms in times.items()
    ]


def table(rows: list[dict]) -> str:
    """One line for each case."""
    lines = ["| bench | case | MB | ms | copies | jnp, ms | Triton, ms |", "|---|---|---|---|---|---|---|"]
    by_case: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["rival"]] = row
    for name, rivals in by_case.items():
        row = rivals["copy"]
        others = " | ".join(f"{rivals[r]['rival_ms']:.3f}" if r in rivals else "" for r in ("jnp", "triton"))
        lines.append(
            f"| {row['bench']} | {name} | {row['bytes'] / 1e6:.0f} | {row['ms']:.3f} | {row['copies']:.2f} | {others} |"
        )
    return heading("bandwidth", rows[0]) + "\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line.parser(__doc__, cases=command_line.SEVERAL_WORDS)
    command_line.add_table(parser)
    values = parser.parse_args()
    command_line.require_hopper()
    words = values.cases.split(",")
    wanted = {name: case for name, case in cases().items() if any(word in name for word in words)}
    rows, failures = [], []
    for batch in itertools.batched(wanted.items(), 10):  # the operands of all cases together would fill the memory
        prepared = timing.build({name: functools.partial(prepare, name, case) for name, case in batch}, at_once=10)
        for name, case in batch:
            ready = prepared[name]
            if isinstance(ready, Exception):
                failures.append(f"{name}: {ready!r}")
                continue
            found = measure(name, case, *ready)
            rows += found
            print(*(f"{name}: {r['ms']:.4f} ms, {r['speedup']:.2f}x {r['rival']}" for r in found), sep="\n", flush=True)
            write(values.json, rows)
    if values.table and rows:
        with open(values.table, "w") as file:
            file.write(table(rows))
    if failures:
        raise SystemExit("\n".join(f"not timed: {failure}" for failure in failures))
