"""Search the tile of every benchmark problem and write the table: python -m pallas_kernels.tune [--problems WORD ...]

For each problem all candidates are compiled in parallel, compared with f64, and timed in turns. No GPU has to be tuned:
a Hopper GPU without a table of its own (H20, GH200, H100 PCIe) takes the tiles of the H200, then those of the H100.
Problems of 8-bit operands have "fp8" in their names.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator

from pallas_kernels import device, tuned
from pallas_kernels.measure import bench, timing
from pallas_kernels.measure.rows import write
from pallas_kernels.tiles import PROMOTE, Problem, TileConfig

LARGE = (
    TileConfig(64, 256, stages=5, store_slots=1, raster_m=8),
    TileConfig(64, 256, stages=5, store_slots=1, raster_m=16, raster_n=16),
    TileConfig(64, 256, stages=5, store_slots=1, raster_m=8, deferred=True),
    TileConfig(64, 256, stages=5, store_slots=1, raster_m=16, raster_n=16, deferred=True),
    TileConfig(128, 192, stages=4, store_slots=2, raster_m=8, raster_n=16),
    TileConfig(128, 128, stages=6, store_slots=1, raster_m=8, raster_n=16, deferred=True),
)
"""Tiles for outputs that give every multiprocessor several of them; docs/log.md lists what else was tried."""

SMALL = (
    TileConfig(64, 128, stages=8, store_slots=1),
    TileConfig(64, 128, stages=8, store_slots=1, deferred=True),
    TileConfig(64, 64, stages=10, store_slots=1),
)
"""Tiles for the rest."""


LARGE8 = (
    TileConfig(64, 256, stages=4, store_slots=1, raster_m=8, deferred=True),
    TileConfig(64, 256, stages=4, store_slots=1, raster_m=16, raster_n=16, deferred=True),
    TileConfig(64, 256, stages=4, store_slots=1, raster_m=32, raster_n=8, deferred=True),
    TileConfig(64, 256, stages=4, store_slots=2, raster_m=16, raster_n=16),
    TileConfig(64, 192, stages=6, store_slots=1, raster_m=8, deferred=True),
    TileConfig(64, 192, stages=6, store_slots=1, raster_m=16, raster_n=16, deferred=True),
    TileConfig(128, 128, stages=5, store_slots=1, raster_m=16, raster_n=16, deferred=True),
)
"""... of 8-bit operands, a stage of which holds twice the metadata."""

SMALL8 = (
    TileConfig(64, 128, stages=7, store_slots=1),
    TileConfig(64, 128, stages=7, store_slots=1, deferred=True),
    TileConfig(64, 64, stages=10, store_slots=1),
)

PROMOTING = (
    TileConfig(64, 192, stages=6, store_slots=1, raster_m=8, promote=PROMOTE),
    TileConfig(64, 192, stages=6, store_slots=1, raster_m=8, promote=PROMOTE // 2),
    TileConfig(64, 192, stages=5, store_slots=1, raster_m=8, promote=PROMOTE),
    TileConfig(64, 192, stages=5, store_slots=1, raster_m=16, raster_n=16, promote=PROMOTE),
    TileConfig(64, 128, stages=7, store_slots=1, raster_m=8, promote=PROMOTE),
)
"""... where sums are promoted: two sets of them in a thread's registers leave room for no larger tile."""


def candidates(problem: Problem) -> Iterator[TileConfig]:
    """The tiles worth timing for a problem: those that fit, less than twice the output in either direction."""
    rows, columns = problem.out_shape
    few = rows * columns < 4 * device.sm_count() * 128 * 256
    large, small = (LARGE8, SMALL8) if problem.is_fp8 else (LARGE, SMALL)
    if problem.promote:
        large, small = PROMOTING, ()
    for config in (*large, *small) if few else large:
        fits = config.tile_m < 2 * problem.m and config.tile_n < 2 * problem.n
        if fits and config.violation(problem) is None:
            yield config


def label(config: TileConfig) -> str:
    """A tile in few characters: size, stages and slots, raster."""
    c = config
    slots = "d" if c.deferred else c.store_slots
    return f"{c.tile_m}x{c.tile_n}/{c.stages}+{slots}/{c.raster_m}.{c.raster_n}" + f"/p{c.promote}" * bool(c.promote)


def search(problem: Problem, group_sizes: tuple[int, ...] | None) -> dict[TileConfig, float]:
    """Milliseconds of each tile that compiles and whose result is right."""
    groups = bench.group_array(problem, group_sizes)
    sets = bench.argument_sets(problem)
    arguments = [(*operands, groups) for operands in sets]

    def job(config):
        return timing.repeated(bench.launch(problem, config), arguments)

    built = timing.build({config: functools.partial(job, config) for config in candidates(problem)})
    runs = {config: run for config, run in built.items() if not isinstance(run, Exception)}
    right = {c: r for c, r in runs.items() if bench.relative_error(problem, groups, sets[0], r()[0]) <= bench.MAX_ERROR}
    return timing.race(right, dict.fromkeys(right, len(sets)), rounds=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="*", default=[""], help="only problems whose name contains one of these")
    parser.add_argument("--output", help="the file to write; default: tuned/<gpu>.json of the package")
    arguments = parser.parse_args()
    gpu = device.current()
    if gpu is None or not gpu.is_hopper:
        raise SystemExit("tuning needs a Hopper GPU")
    path = pathlib.Path(arguments.output or tuned.path_of(gpu.file_name))
    before = json.loads(path.read_text()) if path.exists() else []
    entries = {json.dumps(entry["problem"]): entry for entry in before}
    for name, (problem, group_sizes) in (bench.problems() | bench.problems(fp8=True)).items():
        if "ragged" in name or not any(word in name for word in arguments.problems):
            continue  # the tile of a ragged case is that of the equal one
        times = search(problem, group_sizes)
        best = min(times, key=times.__getitem__)
        listed = "  ".join(f"{label(c)} {1e3 * t:.1f}" for c, t in sorted(times.items(), key=lambda item: item[1]))
        print(f"{name}: {listed} us", flush=True)
        sizes = tuned.sizes_of(problem)
        found = {"problem": sizes, "config": dataclasses.asdict(best), "ms": round(times[best], 5)}
        entries[json.dumps(sizes)] = found
        # After each problem, so that a search cut short keeps what it found.
        write(str(path), entries.values())
