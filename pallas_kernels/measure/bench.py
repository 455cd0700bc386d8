"""Time the kernels against their rivals: python -m pallas_kernels.bench --json FILE [--cases WORD] [--table FILE]

With --small the sizes around the break-even with the dense product, and that as the only rival. With --fp8 operands of
8 bits, scales of rows and columns in the epilogue, and as rivals the best dense FP8 product ("dense8": XLA's, torch's
with scales of tensors and of rows), cuSPARSELt's, which has no such scales ("cusparselt8"), and the dense product in
bfloat16 ("dense16").

A case is timed only after its result has passed the comparison with a product in f64, in the same run. Rivals: the best
dense product over operand layouts (XLA, and cuBLAS through torch where torch is installed), and for 2:4 problems the
best of cuSPARSELt's algorithm search over layouts and result orders (torch). Operands are random, buffers rotate, all
rivals of a case take turns. For grouped problems the dense rival is the full product of the layer, all experts.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device, tile_order
from pallas_kernels.hopper import kernel
from pallas_kernels.measure import command_line, rivals, timing
from pallas_kernels.measure import grouped24_shapes as grouped_shapes
from pallas_kernels.measure import sparse24_shapes as sparse_shapes
from pallas_kernels.measure.rows import heading, stamp, write
from pallas_kernels.metadata import pack_positions, unpack_positions
from pallas_kernels.pack.reference import decompress24
from pallas_kernels.tiles import Problem, TileConfig
from pallas_kernels.tuned import choose

MAX_ERROR = 2e-3
"""Norm-wise relative error of a bf16 result: its own rounding is 1.7e-3."""

PAIRS = jnp.array([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], jnp.int32)


type Sizes = tuple[int, ...] | None


def problems(*, small: bool = False, fp8: bool = False) -> dict[str, tuple[Problem, Sizes]]:
    """Every benchmark case, every small one, or every one of 8 bits: its problem and group sizes."""
    if fp8:
        found = {name: (p, None) for name, p in sparse_shapes.fp8_cases().items()}
        return found | {name: (case.problem, case.group_sizes) for name, case in grouped_shapes.cases(fp8=True).items()}
    if small:
        return {name: (p, None) for name, p in sparse_shapes.small_cases().items()}
    found: dict[str, tuple[Problem, Sizes]] = {name: (p, None) for name, p in sparse_shapes.cases().items()}
    return found | {name: (case.problem, case.group_sizes) for name, case in grouped_shapes.cases().items()}


def argument_sets(problem: Problem) -> list[tuple]:
    """Several random operands of a problem: enough calls in a row that Python's launches do not show."""
    split = problem.groups if problem.mode == "columns" else 1
    work = 2 * problem.m * problem.n * problem.k / split
    most = 8 if work > 1e10 else 32
    return [operands(problem, seed) for seed in range(min(most, max(2, math.ceil(1e12 / work))))]


@functools.partial(jax.jit, static_argnums=0)
def operands(problem: Problem, seed: int | jax.Array) -> tuple[jax.Array, ...]:
    """values in tiles, metadata and b: normal values at uniformly random positions; then the scales that it has."""
    p = problem
    keys = jax.random.split(jax.random.key(seed), 3)

    def normal(key, dtype, *shape):
        return jax.random.normal(key, shape, jnp.float32).astype(dtype)

    positions = PAIRS[jax.random.randint(keys[0], (p.m, p.k // 4), 0, len(PAIRS))]
    rows = p.k * (p.groups if p.mode == "rows" else 1)
    b = normal(keys[2], p.b_dtype, *((p.n, rows) if p.b_k_major else (rows, p.n)))
    tiles = (p.m // tile_order.TILE, p.k // p.tile_k, *tile_order.shape(p.dtype))
    there = zip(p.scale_entries, (p.epilogue.row_scale, p.epilogue.column_scale), strict=True)
    scales = [2.0 ** (jnp.arange(entries) % 7 - 3) for entries, is_there in there if is_there]
    return normal(keys[1], p.dtype, *tiles), pack_positions(positions, p.dtype), b, *scales


def group_array(problem: Problem, group_sizes: Sizes) -> jax.Array | None:
    return None if group_sizes is None else jnp.asarray(group_sizes, jnp.int32)


def relative_error(problem: Problem, groups: jax.Array | None, arguments: tuple, out: jax.Array) -> float:
    """||out - A B|| / ||A B|| with the product in f64."""
    with jax.enable_x64(True):
        return float(_relative_error(problem, groups, *arguments, out))


@functools.partial(jax.jit, static_argnums=0)
def _relative_error(problem: Problem, groups, values, metadata, b, *rest):
    p, (*scales, out) = problem, rest
    a = decompress24(tile_order.from_tiles(values), unpack_positions(metadata, p.dtype)).astype(jnp.float64)
    b = (b.T if p.b_k_major else b).astype(jnp.float64)
    group = None
    if groups is None:
        wanted = a @ b
    else:
        tokens = {"rows": p.m, "columns": p.n, "contraction": p.k}[p.mode]
        group = jnp.searchsorted(jnp.cumsum(groups), jnp.arange(tokens), side="right")
        products = {
            "rows": lambda g: jnp.where(group[:, None] == g, a, 0) @ b.reshape(p.groups, p.k, p.n)[g],
            "columns": lambda g: a.reshape(p.groups, -1, p.k)[g] @ jnp.where(group == g, b, 0),
            "contraction": lambda g: jnp.where(group == g, a, 0) @ b,
        }
        product = products[p.mode]
        if p.mode == "contraction":
            wanted = jax.lax.map(product, jnp.arange(p.groups)).reshape(-1, p.n)
        else:
            wanted = jax.lax.fori_loop(1, p.groups, lambda g, total: total + product(g), product(0))
    if p.epilogue.row_scale:
        by_row = scales.pop(0)
        wanted = wanted * (by_row.reshape(p.groups, -1)[group].T if p.mode == "columns" else by_row[:, None])
    wanted = wanted * scales.pop() if p.epilogue.column_scale else wanted
    wanted = wanted.T if p.transpose_out else wanted
    return jnp.linalg.norm(out.astype(jnp.float64) - wanted) / jnp.linalg.norm(wanted)


def launch(problem: Problem, config: TileConfig):
    """The kernel as a function of values, metadata, b, the scales that the problem has, and groups."""
    e = problem.epilogue
    names = [name for name in ("row_scale", "column_scale") if getattr(e, name)]

    def call(values, metadata, b, *rest):
        options: dict[str, Any] = dict(zip((*names, "groups"), rest, strict=True))
        return kernel.matmul(values, metadata, b, problem=problem, config=config, num_sms=device.sm_count(), **options)

    return call


def prepare(name: str, problem: Problem, group_sizes: Sizes) -> tuple[timing.Run, int, float]:
    """Compile a case and check it: its run, the calls in it, and its relative error.

    Raises:
      RuntimeError: the kernel's result is wrong; nothing is to be timed.
    """
    groups = group_array(problem, group_sizes)
    sets = argument_sets(problem)
    run = timing.repeated(launch(problem, choose(problem)), [(*arguments, groups) for arguments in sets])
    error = relative_error(problem, groups, sets[0], run()[0])
    if not error <= MAX_ERROR:
        raise RuntimeError(f"{name}: relative error {error:.2e} exceeds {MAX_ERROR:.0e}; not timed")
    return run, len(sets), error


def time_case(name: str, problem: Problem, group_sizes, prepared: tuple[timing.Run, int, float]) -> list[dict]:
    """The rows of one case: one for each kind of rival, the fastest of it."""
    run, count, error = prepared
    runs, calls = {"ours": run}, {"ours": count}
    for rival, (rival_run, rival_count) in _rivals(name, problem, group_sizes).items():
        runs[rival], calls[rival] = rival_run, rival_count
    times = timing.race(runs, calls)
    return rows_of("sparse24" if group_sizes is None else "grouped24", name, times, error)


def rows_of(bench: str, case: str, times: dict[str, float], error: float, **more: float) -> list[dict]:
    """A row of results for each kind of rival, the fastest of it. times: milliseconds of "ours" and of each rival."""
    best: dict[str, float] = {}
    for rival, ms in times.items():
        if rival != "ours":
            kind = rival.split()[0]
            best[kind] = min(ms, best.get(kind, math.inf))
    measured = stamp()
    return [
        {
            "bench": bench,
            "case": case,
            "ms": round(times["ours"], 4),
            "rival": rival,
            "rival_ms": round(ms, 4),
            "speedup": round(ms / times["ours"], 3),
            "relerr": float(f"{error:.3g}"),
        }
        | measured
        | more
        for rival, ms in best.items()
    ]


def _rivals(name: str, problem: Problem, group_sizes) -> dict[str, tuple[timing.Run, int]]:
    m, n, k = problem.m, problem.n, problem.k
    if problem.is_fp8:
        tokens, d_model, d_ffn = (m, k, n) if group_sizes is None else grouped_shapes.cases(fp8=True)[name].full
        found = {f"dense16 {run}": timed for run, timed in rivals.dense(tokens, d_ffn, d_model).items()}
        return found | ({} if group_sizes is not None else rivals.dense8(m, n, k) | rivals.cusparselt8(m, n, k))
    if group_sizes is None:
        return rivals.dense(m, n, k) | ({} if name in sparse_shapes.small_cases() else rivals.cusparselt(m, n, k))
    tokens, d_model, d_ffn = grouped_shapes.cases()[name].full
    return rivals.dense(tokens, d_ffn, d_model)


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = ["| bench | case | ms | rival | rival ms | speed-up | relative error |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['bench']} | {row['case']} | {row['ms']:.4f} | {row['rival']} | {row['rival_ms']:.4f} "
            f"| {row['speedup']:.2f}x | {row['relerr']:.1e} |"
        )
    first = rows[0] if rows else {"device": "none", "jax": "", "date": ""}
    return heading("bench", first) + "\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line.parser(__doc__)
    command_line.add_table(parser)
    parser.add_argument("--small", action="store_true", help="the sizes around the break-even with the dense product")
    parser.add_argument("--fp8", action="store_true", help="operands of 8 bits")
    values = parser.parse_args()
    command_line.require_hopper()
    wanted = {n: case for n, case in problems(small=values.small, fp8=values.fp8).items() if values.cases in n}
    rows, failures = [], []
    # A few at once: checks in f64 and the operands of all cases together would fill the memory.
    for batch in itertools.batched(wanted.items(), 8):
        prepared = timing.build({name: functools.partial(prepare, name, *case) for name, case in batch}, at_once=8)
        for name, case in batch:
            ready = prepared[name]
            if isinstance(ready, Exception):
                failures.append(ready)
                continue
            found = time_case(name, *case, ready)
            rows += found
            print(*(f"{name}: {r['ms']:.4f} ms, {r['speedup']:.2f}x {r['rival']}" for r in found), sep="\n", flush=True)
            write(values.json, rows)
    if values.table:
        with open(values.table, "w") as file:
            file.write(table(rows))
    if failures:
        raise SystemExit("\n".join(f"not timed: {failure!r}" for failure in failures))
