"""What limits each case of the benchmark: python -m pallas_kernels.roofline --json FILE [--table FILE] [--cases WORD]

Runs itself under Nsight Compute (`ncu`), a few cases at a time, which reads the hardware counters of one launch of each
case with its tuned tile, caches cold and the clock as the card sets it; a case that breaks ncu costs itself alone. From
counters and peaks follow the times that each unit alone would need (`bounds`). A few cases run a second time with twice
the contraction (`2k`): what does not grow with it is launch, first loads and epilogue. Then the same cases, with random
operands and with zeros, and the dense product run in a loop outside ncu, where power, energy and clock are read
(power.py).
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import device
from pallas_kernels.measure import bench, command_line, counters, power, timing
from pallas_kernels.measure import grouped24_shapes as grouped_shapes
from pallas_kernels.measure.rows import heading, stamp, write
from pallas_kernels.tiles import GRANULE, TILE_K, Problem, TileConfig
from pallas_kernels.tuned import choose

FLOP_PER_CYCLE = 8192
"""Dense-equivalent operations of a multiprocessor's sparse tensor cores in bf16: 989.4 TFLOP/s dense of 132 at 1.83 GHz
are 4096, and 2:4 counts twice."""
SMEM_BYTES_PER_CYCLE = 128
DRAM_BYTES_PER_SECOND = 3.35e12
"""H100 SXM's datasheet."""

TWICE = (
    "16384x4096x4096 b=nmajor",
    "16384x4096x4096 b=kmajor",
    "16384x16384x4096 b=kmajor",
    "8192x16384x2048 b=nmajor",
    "4096x16384x4096 b=nmajor",
    *(
        f"E={e} D={d} F={4 * d} mode={mode} sizes=equal"
        for e, d in ((16, 2048), (4, 4096))
        for mode in grouped_shapes.MODES
    ),
)
"""Cases that also run with twice the contraction."""
POWER = (TWICE[0], TWICE[2], TWICE[3], *TWICE[5:7], TWICE[8])
"""Cases whose power is read."""


def cases(words: str = "") -> dict[str, tuple[Problem, bench.Sizes, TileConfig]]:
    """Problem, group sizes and tile of what is launched: `TWICE` and their doubles, other cases, ragged ones last."""
    known = bench.problems()
    found = {name: (*known[name], choose(known[name][0])) for name in (*TWICE, *known)}
    for name in TWICE:
        problem, sizes, config = found[name]
        if problem.mode == "contraction" and sizes is not None:
            sizes = tuple(2 * size for size in sizes)
        found[f"{name} 2k"] = (dataclasses.replace(problem, k=2 * problem.k), sizes, config)
    first = {name: found[name] for base in TWICE for name in (base, f"{base} 2k")}
    rest = {name: found[name] for name in sorted(found, key=lambda name: "ragged" in name)}
    return {name: case for name, case in (first | rest).items() if words in name}


def tile_stages(problem: Problem, config: TileConfig, sizes: bench.Sizes) -> np.ndarray:
    """Stages of each tile, in the order in which blocks take them."""
    p, c = problem, config
    steps, m_tiles, n_tiles = -(-p.k // TILE_K), -(-p.m // c.tile_m), -(-p.n // c.tile_n)
    if sizes is None:
        return np.full(m_tiles * n_tiles, steps)
    if p.mode == "contraction":
        return np.repeat(sorted((size // TILE_K for size in sizes), reverse=True), m_tiles * n_tiles)
    if p.mode == "rows":
        return np.full(sum(-(-size // c.tile_m) for size in sizes) * n_tiles, steps)
    return np.full(sum(-(-size // c.tile_n) for size in sizes) * -(-(p.m // p.groups) // c.tile_m), steps)


def busiest(problem: Problem, config: TileConfig, sizes: bench.Sizes, sms: int) -> tuple[int, int]:
    """Stages and tiles of the multiprocessor that has most of them."""
    stages = tile_stages(problem, config, sizes)
    rounds = np.pad(stages, (0, -len(stages) % sms)).reshape(-1, sms)
    if problem.mode == "contraction":  # every other round backwards (hopper/kernel.py)
        rounds[1::2] = rounds[1::2, ::-1]
    return int(rounds.sum(axis=0).max()), len(rounds)


def bounds(problem: Problem, config: TileConfig, sizes: bench.Sizes, sms: int, read: dict[str, float]) -> dict:
    """Microseconds that each unit alone would need, at the clock of the launch.

    tensor: 2 m n k operations (of a group's k) at `FLOP_PER_CYCLE` on all multiprocessors.
    rounds: as tensor, but for the whole tiles of the busiest multiprocessor.
    smem: operands that its `wgmma` read, per 64 rows of A 64 x 32 values and again all of B, at `SMEM_BYTES_PER_CYCLE`.
    load: what reached a multiprocessor from L2, at the counter's peak. l2: what L2 served, at the counter's peak.
    dram: bytes read and written at `DRAM_BYTES_PER_SECOND`.
    epilogue: its results written to shared memory and read again, at `SMEM_BYTES_PER_CYCLE`; beside products where
      the tile is deferred.
    """
    p, c = problem, config
    stages, tiles = busiest(p, c, sizes, sms)
    flop = 2 * p.m * p.n * p.k / (p.groups if p.mode == "columns" else 1)
    out_bytes = jnp.dtype(p.out_dtype).itemsize
    operands = c.warpgroups * (c.warpgroup_m // GRANULE) * TILE_K * (GRANULE + 2 * c.warpgroup_n)
    cycles = {
        "tensor": flop / FLOP_PER_CYCLE / sms,
        "rounds": stages * 2 * c.tile_m * c.tile_n * TILE_K / FLOP_PER_CYCLE,
        "smem": stages * operands / SMEM_BYTES_PER_CYCLE,
        "epilogue": tiles * 2 * c.tile_m * c.tile_n * out_bytes / SMEM_BYTES_PER_CYCLE,
    }
    found = {name: 1e6 * count / read["hertz"] for name, count in cycles.items()}
    us = read["ns"] / 1e3
    found |= {name: us * read[name] / 100 for name in ("load", "l2") if name in read}
    if "dram_read" in read and "dram_written" in read:
        found["dram"] = 1e6 * (read["dram_read"] + read["dram_written"]) / DRAM_BYTES_PER_SECOND
    return {name: round(time, 2) for name, time in found.items()}


def row_of(name: str, read: dict[str, float], sms: int) -> dict:
    """A case's row: its counters, bounds, the largest of them and the share of the time that is above it."""
    problem, sizes, config = cases()[name]
    units = bounds(problem, config, sizes, sms, read)
    us = read["ns"] / 1e3
    limit = max((unit for unit in units if unit != "epilogue"), key=units.__getitem__)
    stages, tiles = busiest(problem, config, sizes, sms)
    return {
        "bench": "sparse24" if sizes is None else "grouped24",
        "case": name,
        "tile": f"{config.tile_m}x{config.tile_n}{' deferred' if config.deferred else ''}",
        "us": round(us, 2),
        "ghz": round(read["hertz"] / 1e9, 3),
        "stages": stages,
        "tiles": tiles,
        "bounds": units,
        "limit": limit,
        "rest": round(1 - units[limit] / us, 3),
        "counters": read,
    }


def add_slopes(rows: list[dict]) -> None:
    """From a case and its double: `stage_cycles`, what one more stage costs, and `fixed_cycles`, the rest."""
    by_name = {row["case"]: row for row in rows}
    for name, row in by_name.items():
        if double := by_name.get(f"{name} 2k"):
            cycles, more = (r["counters"]["cycles"] for r in (row, double))
            row["stage_cycles"] = round((more - cycles) / (double["stages"] - row["stages"]), 1)
            row["fixed_cycles"] = round(cycles - row["stage_cycles"] * row["stages"])


def launch(names: Sequence[str]) -> None:
    """Launch each case once and print its name."""
    known = cases()

    def prepare(problem, sizes, config):
        arguments = (*bench.operands(problem, 0), bench.group_array(problem, sizes))
        return jax.jit(bench.launch(problem, config)).lower(*arguments).compile(), arguments

    # One after the other: the one run under ncu that compiled in threads ended in a segmentation fault.
    for name in names:
        try:
            compiled, arguments = prepare(*known[name])
        except Exception as error:
            print(f"skipped {name}: {error!r}", flush=True)
            continue
        jax.block_until_ready(compiled(*arguments))
        print(f"launched {name}", flush=True)


def read_counters(words: str, seconds: float, log: str, at_once: int = 6) -> Iterator[list[dict]]:
    """After every few cases the rows of all that ncu saw within `seconds`; what fails together is tried in halves.

    Raises:
      RuntimeError, ValueError: no case could be read; of the last one.
    """
    end, longest = time.monotonic() + seconds, 0.0
    waiting = [list(batch) for batch in itertools.batched(cases(words), at_once)]
    read: dict[str, dict[str, float]] = {}
    failure: Exception | None = None
    while waiting and time.monotonic() + longest < end:
        names, start = waiting.pop(0), time.monotonic()
        try:
            command = [sys.executable, "-m", "pallas_kernels.roofline", "--launch", *names]
            read |= counters.count(command, log)
        except (RuntimeError, ValueError) as error:
            failure = error
            print(f"{len(names)} cases from {names[0]} on: {error}", flush=True)
            half = len(names) // 2
            waiting[:0] = [names[:half], names[half:]] if half else []
        else:
            rows = [row_of(name, found, device.sm_count()) for name, found in read.items()]
            add_slopes(rows)
            yield rows
        longest = max(longest, time.monotonic() - start)
    if failure and not read:
        raise failure


def draw(words: str) -> Iterator[list[dict]]:
    """Power, energy and clock in a loop of each case of `POWER`: "sparse", the same with "zeros", and "dense".

    After each the rows so far.

    The dense product is XLA's of the same sizes, and of the whole layer for groups.
    """
    meter, rows = power.Meter(), []
    kinds = itertools.product((name for name in POWER if words in name), ("sparse", "zeros", "dense"))
    built = timing.build({key: functools.partial(_loop, *key) for key in kinds}, at_once=18)
    for (name, kind), ready in built.items():
        if isinstance(ready, Exception):
            print(f"skipped {name} {kind}: {ready!r}", flush=True)
            continue
        read = power.measure(meter, *ready)
        print(f"power {name} {kind}: {read}", flush=True)
        rows.append({"bench": "power", "case": name, "operands": kind, "limit_watts": meter.limit_watts(), **read})
        yield rows


def _loop(name: str, kind: str) -> tuple[timing.Run, int]:
    problem, sizes = bench.problems()[name]
    if kind == "dense":
        m, n, k = problem.m, problem.n, problem.k
        if sizes is not None:
            m, k, n = grouped_shapes.cases()[name].full
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = ((m, k), (k, n)) * 2
        a, b, a2, b2 = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
        return timing.repeated(jnp.matmul, [(a, b), (a2, b2)]), 2
    sets = bench.argument_sets(problem)
    if kind == "zeros":
        sets = [(jnp.zeros_like(values), metadata, jnp.zeros_like(b)) for values, metadata, b in sets]
    groups = bench.group_array(problem, sizes)
    run = timing.repeated(bench.launch(problem, choose(problem)), [(*arguments, groups) for arguments in sets])
    return run, len(sets)


def table(rows: list[dict]) -> str:
    """The rows as Markdown tables, one of counters and one of power, where there are any."""
    counted, drawn = ([row for row in rows if (row["bench"] == "power") is kind] for kind in (False, True))
    lines = [heading("roofline", rows[0]) + "\n"]
    if counted:
        lines += [
            "| case | tile | us | GHz | tensor us, busy | rounds us | SMEM us, pipe | load us | L2 us, hits "
            "| DRAM us, GB | epilogue us | limit | above it | cycles a stage | fixed cycles |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
    for row in counted:
        units, read = row["bounds"], row["counters"]

        def cell(unit, share="", units=units, read=read):
            time = f"{units[unit]:.1f}" if unit in units else ""
            return f"{time}, {read[share]:.0f} %" if share in read else time

        moved = (read.get("dram_read", 0) + read.get("dram_written", 0)) / 1e9
        lines.append(
            f"| {row['case']} | {row['tile']} | {row['us']:.1f} | {row['ghz']:.2f} | {cell('tensor', 'tensor')} "
            f"| {cell('rounds')} | {cell('smem', 'smem_pipe')} | {cell('load')} | {cell('l2', 'l2_hits')} "
            f"| {cell('dram')}, {moved:.2f} | {cell('epilogue')} | {row['limit']} | {row['rest']:.0%} "
            f"| {row.get('stage_cycles', '')} | {row.get('fixed_cycles', '')} |"
        )
    if counted and drawn:
        lines.append("")
    if drawn:
        lines += ["| case | operands | ms | W | J | GHz | held by the power limit |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {row['case']} | {row['operands']} | {row['ms']:.4f} | {row['watts']:.0f} of {row['limit_watts']:.0f} "
        f"| {row['joules']:.3f} | {row['ghz']:.2f} | {row['capped']:.0%} of the time |"
        for row in drawn
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line.parser(__doc__, json="roofline.json")
    command_line.add_table(parser)
    parser.add_argument("--seconds", type=float, default=600.0, help="begin nothing for counters after so many")
    parser.add_argument("--launch", nargs="+", metavar="CASE", help="only launch these once: what ncu runs")
    parser.add_argument("--parts", default="counters,power", help="which of the two")
    values = parser.parse_args()
    if values.launch:
        launch(values.launch)
        return
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # what ncu runs needs the GPU beside this process
    found: dict[str, list[dict]] = {}
    failures = []

    def save() -> None:
        measured = stamp()
        rows = [row | measured for part in found.values() for row in part]
        write(values.json, rows)
        if values.table:
            pathlib.Path(values.table).write_text(table(rows))

    parts = {
        "counters": lambda: read_counters(values.cases, values.seconds, f"{values.json}.ncu.csv"),
        "power": lambda: draw(values.cases),
    }
    for part in (part for part in parts if part in values.parts):
        try:
            for rows in parts[part]():
                found[part] = rows
                save()
        except (RuntimeError, ValueError, OSError) as error:
            failures.append(f"{part}: {error}")
    if failures:
        raise SystemExit("\n".join(failures))
