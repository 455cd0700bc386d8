"""Time the kernels against their rivals: python -m pallas_kernels.bench --json FILE [--cases WORD] [--table FILE]

A case is timed only after its result has passed the comparison with a product in f64, in the same run. Rivals: the best
dense product over operand layouts (XLA, and cuBLAS through torch where torch is installed), and for 2:4 problems the
best of cuSPARSELt's algorithm search over layouts and result orders (torch). Operands are random, buffers rotate, all
rivals of a case take turns. For grouped problems the dense rival is the full product of the layer, all experts.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math

import jax
import jax.numpy as jnp

from pallas_kernels import device, rivals, timing
from pallas_kernels.grouped24 import bench_shapes as grouped_shapes
from pallas_kernels.hopper import kernel
from pallas_kernels.metadata import pack_positions, unpack_positions
from pallas_kernels.pack.reference import decompress24
from pallas_kernels.sparse24 import bench_shapes as sparse_shapes
from pallas_kernels.tiles import Problem
from pallas_kernels.tuned import choose

MAX_ERROR = 2e-3
"""Norm-wise relative error of a bf16 result: its own rounding is 1.7e-3."""

_PAIRS = jnp.array([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], jnp.int32)


def problems() -> dict[str, tuple[Problem, tuple[int, ...] | None]]:
    """Every benchmark case: its problem and group sizes."""
    sparse = {name: (problem, None) for name, problem in sparse_shapes.cases().items()}
    return sparse | {name: (case.problem, case.group_sizes) for name, case in grouped_shapes.cases().items()}


def sizes_of(problem: Problem) -> dict:
    """The fields of a problem that a table of tiles is looked up by."""
    fields = dataclasses.asdict(problem)
    return {name: fields[name] for name in ("m", "n", "k", "mode", "groups", "b_k_major", "transpose_out")}


def argument_sets(problem: Problem, group_sizes: tuple[int, ...] | None) -> list[tuple]:
    """Several random operands of a problem: enough calls in a row that Python's launches do not show."""
    work = 2 * problem.m * problem.n * problem.k / (1 if group_sizes is None else problem.groups ** _split(problem))
    count = min(8, max(2, math.ceil(1e12 / work)))
    return [operands(problem, seed) for seed in range(count)]


def _split(problem: Problem) -> int:
    """Whether the listed sizes count each group's work `groups` times over."""
    return 1 if problem.mode == "columns" else 0


@functools.partial(jax.jit, static_argnums=0)
def operands(problem: Problem, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """values, metadata and b: normal values at uniformly random positions."""
    p = problem
    keys = jax.random.split(jax.random.key(seed), 3)

    def normal(key, *shape):
        return jax.random.normal(key, shape, jnp.float32).astype(p.dtype)

    positions = _PAIRS[jax.random.randint(keys[0], (p.m, p.k // 4), 0, len(_PAIRS))]
    rows = p.k * (p.groups if p.mode == "rows" else 1)
    b = normal(keys[2], *((p.n, rows) if p.b_k_major else (rows, p.n)))
    return normal(keys[1], p.m, p.k // 2), pack_positions(positions), b


def relative_error(problem: Problem, group_sizes, arguments: tuple, out: jax.Array) -> float:
    """||out - A B|| / ||A B|| with the product in f64."""
    values, metadata, b = arguments
    with jax.enable_x64(True):
        a = decompress24(values, unpack_positions(metadata)).astype(jnp.float64)
        b = (b.T if problem.b_k_major else b).astype(jnp.float64)
        wanted = _product(problem, group_sizes, a, b)
        wanted = wanted.T if problem.transpose_out else wanted
        return float(jnp.linalg.norm(out.astype(jnp.float64) - wanted) / jnp.linalg.norm(wanted))


def _product(problem: Problem, group_sizes, a: jax.Array, b: jax.Array) -> jax.Array:
    p = problem
    if group_sizes is None:
        return a @ b
    ends = [sum(group_sizes[: g + 1]) for g in range(p.groups)]
    spans = [slice(end - size, end) for end, size in zip(ends, group_sizes, strict=True)]
    if p.mode == "rows":
        return jnp.concatenate([a[span] @ b[g * p.k : (g + 1) * p.k] for g, span in enumerate(spans)])
    if p.mode == "columns":
        return jnp.concatenate([part @ b[:, span] for part, span in zip(jnp.split(a, p.groups), spans, strict=True)], 1)
    return jnp.concatenate([a[:, span] @ b[span] for span in spans])


def run_case(name: str, problem: Problem, group_sizes: tuple[int, ...] | None) -> list[dict]:
    """The rows of one case: one for each rival.

    Raises:
      RuntimeError: the kernel's result is wrong; nothing is timed.
    """
    sets = argument_sets(problem, group_sizes)
    groups = None if group_sizes is None else jnp.asarray(group_sizes, jnp.int32)
    launch = functools.partial(
        kernel.matmul, problem=problem, config=choose(problem), num_sms=device.sm_count(), groups=groups
    )
    ours = timing.repeated(launch, sets)
    error = relative_error(problem, group_sizes, sets[0], ours()[0])
    if not error <= MAX_ERROR:
        raise RuntimeError(f"{name}: relative error {error:.2e} exceeds {MAX_ERROR:.0e}; not timed")
    runs, calls = {"ours": ours}, {"ours": len(sets)}
    for rival, (run, count) in _rivals(name, problem, group_sizes, sets).items():
        runs[rival], calls[rival] = run, count
    times = timing.race(runs, calls)
    best: dict[str, float] = {}
    for rival, ms in times.items():
        if rival != "ours":
            kind = rival.split()[0]
            best[kind] = min(ms, best.get(kind, math.inf))
    gpu = device.current()
    return [
        {
            "bench": "sparse24" if group_sizes is None else "grouped24",
            "case": name,
            "ms": round(times["ours"], 4),
            "rival": rival,
            "rival_ms": round(ms, 4),
            "speedup": round(ms / times["ours"], 3),
            "relerr": float(f"{error:.3g}"),
            "device": gpu.name if gpu else "none",
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
        }
        for rival, ms in best.items()
    ]


def _rivals(name: str, problem: Problem, group_sizes, sets) -> dict[str, tuple[timing.Run, int]]:
    if group_sizes is None:
        return rivals.dense(problem.m, problem.n, problem.k) | rivals.cusparselt(problem, sets[0])
    return rivals.dense(*(grouped_shapes.cases()[name].full[i] for i in (0, 2, 1)))


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = ["| bench | case | ms | rival | rival ms | speed-up | relative error |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['bench']} | {row['case']} | {row['ms']:.4f} | {row['rival']} | {row['rival_ms']:.4f} "
            f"| {row['speedup']:.2f}x | {row['relerr']:.1e} |"
        )
    first = rows[0] if rows else {"device": "none", "jax": "", "date": ""}
    head = f"Generated by `python -m pallas_kernels.bench`: {first['device']}, jax {first['jax']}, {first['date']}.\n\n"
    return head + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True, help="the file of results")
    parser.add_argument("--table", help="also write them as a Markdown table")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    if not device.hopper_available():
        raise SystemExit("the benchmark needs a Hopper GPU")
    rows = []
    for name, (problem, group_sizes) in problems().items():
        if arguments.cases in name:
            found = run_case(name, problem, group_sizes)
            rows += found
            print(*(f"{name}: {r['ms']:.4f} ms, {r['speedup']:.2f}x {r['rival']}" for r in found), sep="\n", flush=True)
    with open(arguments.json, "w") as file:
        file.write("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    if arguments.table:
        with open(arguments.table, "w") as file:
            file.write(table(rows))


if __name__ == "__main__":
    main()
