"""Time V:N:M products: python -m pallas_kernels.measure.vnm --json FILE [--cases WORD] [--search]

Rows as in `pallas_kernels.bench`, under the same rules: a case is timed only after its result has passed the comparison
with a product in f64, all rivals take turns. Rivals: the best dense product, the best of cuSPARSELt's search, and
this project's plain 2:4 kernel (`sparse24`), a floor since every V:2:M matrix is a 2:4 matrix. What is timed is what
the dispatcher takes where the matrix is kept in both forms: `form` says which, and if it is "sparse24", the V:N:M
kernel is a rival too (`vnm`). More fields: `ideal` is M / 2, the dense product's work over the stored entries'; `share`
is speedup / ideal, against dense only; `l2_ms` and `dram_ms` are the least times of the bytes that the V:N:M kernel's
tiles load from L2, and of all operands and the result once through memory.

--search times the tiles of `TILES` first, prints their milliseconds, and takes the fastest for each case.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.hopper import kernel
from pallas_kernels.measure import bench, command_line, rivals, timing, tune
from pallas_kernels.measure import sparse24_shapes as sparse_shapes
from pallas_kernels.measure.rows import write
from pallas_kernels.measure.vnm_shapes import Case, cases
from pallas_kernels.metadata import pack_positions
from pallas_kernels.tile_order import SHAPE, TILE, to_tiles
from pallas_kernels.tiles import TILE_K, Problem, TileConfig
from pallas_kernels.vnm import hopper, reference
from pallas_kernels.vnm.api import Form, best_form, vnm
from pallas_kernels.vnm.shapes import KEPT

L2_BYTES_PER_MS = 5.5e9
"""What an H100's multiprocessors read from L2 together, about."""
DRAM_BYTES_PER_MS = 3.0e9
TILES = {
    64: (
        hopper.TILES[64],
        TileConfig(64, 128, 1, 2, stages=5, store_slots=1, raster_m=32, raster_n=4, deferred=True),
        TileConfig(64, 128, 1, 2, stages=5, store_slots=1, raster_m=1, raster_n=2, deferred=True),
        TileConfig(64, 256, 1, 1, stages=5, store_slots=1, raster_m=1024, raster_n=1, deferred=True),
        TileConfig(64, 64, 1, 2, stages=9, store_slots=1, raster_m=1024, raster_n=1, deferred=True),
    ),
    128: (
        hopper.TILES[128],
        TileConfig(64, 256, 2, 1, stages=5, store_slots=1, raster_m=32, raster_n=4, deferred=True),
        TileConfig(64, 256, 2, 1, stages=5, store_slots=1, raster_m=1, raster_n=2, deferred=True),
        TileConfig(128, 128, 1, 2, stages=5, store_slots=1, raster_m=1024, raster_n=1, deferred=True),
        TileConfig(64, 128, 2, 1, stages=8, store_slots=1, raster_m=1024, raster_n=1, deferred=True),
    ),
}
"""What --search times, by v."""


def problem_of(case: Case) -> Problem:
    sizes = case.stored
    return hopper.problem_of(sizes.rows, case.n, sizes.columns, case.pattern_v)


@functools.partial(jax.jit, static_argnums=0)
def operands(case: Case, seed: int | jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """values, metadata, columns and b: normal values, positions and columns uniformly random."""
    sizes, keys = case.stored, jax.random.split(jax.random.key(seed), 4)

    def normal(key, *shape):
        return jax.random.normal(key, shape, jnp.float32).astype(jnp.bfloat16)

    groups = case.k // case.pattern_m
    draws = jax.random.uniform(keys[0], (sizes.blocks, groups, case.pattern_m))
    chosen = jnp.sort(jax.lax.top_k(draws, KEPT)[1], axis=-1) + jnp.arange(groups)[:, None] * case.pattern_m
    chosen = chosen.reshape(sizes.blocks, -1).astype(jnp.int32)
    padding = ((0, 0), (0, sizes.columns - chosen.shape[1]))
    columns = jnp.pad(chosen, padding, constant_values=case.k)
    positions = bench.PAIRS[jax.random.randint(keys[1], (sizes.rows, sizes.columns // 4), 0, len(bench.PAIRS))]
    values = normal(keys[2], sizes.rows // TILE, sizes.columns // TILE, *SHAPE)
    return values, pack_positions(positions), columns, normal(keys[3], case.k, case.n)


def argument_sets(case: Case) -> list[tuple]:
    """As many as make Python's launches invisible."""
    work = 2 * case.m * case.n * case.stored.columns
    return [operands(case, seed) for seed in range(min(8, max(2, math.ceil(1e12 / work))))]


def form_of(case: Case) -> Form:
    """What the dispatcher takes where it may choose."""
    return best_form(case.m, case.n, case.k, v=case.pattern_v, compressed=case.stored.columns, has_24=True)


@functools.partial(jax.jit, static_argnums=0)
def as_24(case: Case, values, metadata, columns) -> tuple[jax.Array, jax.Array]:
    """The same matrix as plain 2:4 in tiles, and its metadata."""
    values, positions = reference.as_24(values, metadata, columns, case.k)
    return to_tiles(values), pack_positions(positions)


def relative_error(arguments: tuple, out: jax.Array) -> float:
    """||out - A B|| / ||A B|| with the product in f64."""
    with jax.enable_x64(True):
        return float(_relative_error(*arguments, out))


@jax.jit
def _relative_error(values, metadata, columns, b, out):
    a = reference.to_dense(values, metadata, columns, b.shape[0]).astype(jnp.float64)
    wanted = a @ b.astype(jnp.float64)
    return jnp.linalg.norm(out.astype(jnp.float64) - wanted) / jnp.linalg.norm(wanted)


def dispatched(values, metadata, columns, b, *plain_24):
    """The product as a user calls it."""
    return vnm(values, metadata, columns, b, as_24=plain_24)


def launch(case: Case, config: TileConfig | None = None):
    """The kernel as a function of values, metadata, columns and b."""
    problem = problem_of(case)

    def call(values, metadata, columns, b):
        return kernel.matmul(
            values,
            metadata,
            b,
            problem=problem,
            config=config or hopper.choose(problem),
            num_sms=device.sm_count(),
            columns=columns,
        )

    return call


def prepare(
    case: Case, config: TileConfig | None = None, sets: list[tuple] | None = None, form: Form = "vnm"
) -> tuple[timing.Run, int, float]:
    """Compile a case and check it: its run, the calls in it, and its relative error.

    Args:
      form: another one than "vnm" is run through the dispatcher, which takes it by itself (`form_of`).

    Raises:
      RuntimeError: the result is wrong; nothing is to be timed.
    """
    sets = sets or argument_sets(case)
    if form == "vnm":
        run = timing.repeated(launch(case, config), sets)
    else:
        run = timing.repeated(dispatched, [(*given, *as_24(case, *given[:3])) for given in sets])
    error = relative_error(sets[0], run()[0])
    if not error <= bench.MAX_ERROR:
        raise RuntimeError(f"{case.name}: relative error {error:.2e} exceeds {bench.MAX_ERROR:.0e}; not timed")
    return run, len(sets), error


@functools.cache
def _plain_24(m: int, n: int, k: int) -> dict[str, tuple[timing.Run, int]]:
    """This project's 2:4 kernel on a matrix of the same size."""
    problem = sparse_shapes.cases().get(f"{m}x{n}x{k} b=nmajor", Problem(m, n, k))
    sets = [(*arguments, None) for arguments in bench.argument_sets(problem)]
    return {"sparse24 nmajor": (timing.repeated(bench.launch(problem, bench.choose(problem)), sets), len(sets))}


def least_times(case: Case) -> dict[str, float]:
    """l2_ms and dram_ms, see the module."""
    p = problem_of(case)
    c = hopper.choose(p)
    tiles = -(-p.m // c.tile_m) * -(-p.n // c.tile_n)
    stage = TILE_K * c.tile_n * 2 + c.tile_m * TILE_K + c.tile_m * TILE_K // 8
    once = 2 * p.k * p.m // 2 + p.k * p.m // 8 + 2 * case.k * case.n + 2 * p.m * p.n
    return {
        "l2_ms": round(tiles * (p.k // TILE_K) * stage / L2_BYTES_PER_MS, 4),
        "dram_ms": round(once / DRAM_BYTES_PER_MS, 4),
    }


def time_case(case: Case, config: TileConfig | None = None) -> list[dict]:
    """The rows of one case, with a tile for the V:N:M kernel to use instead of the chosen one."""
    form, sets = form_of(case), argument_sets(case)
    kernel_run, count, error = prepare(case, config, sets)
    runs, calls = {"ours": kernel_run}, {"ours": count}
    if form != "vnm":
        runs["vnm kernel"], calls["vnm kernel"] = kernel_run, count
        runs["ours"], calls["ours"], error = prepare(case, sets=sets, form=form)
    m, n, k = case.m, case.n, case.k
    for rival, (rival_run, rival_count) in (
        rivals.dense(m, n, k) | rivals.cusparselt(m, n, k) | _plain_24(m, n, k)
    ).items():
        runs[rival], calls[rival] = rival_run, rival_count
    ideal, times = case.pattern_m / 2, timing.race(runs, calls)
    rows = bench.rows_of("vnm", case.name, times, error, ideal=ideal, **least_times(case))
    for row in rows:
        row["form"] = form
        if row["rival"] == "dense":
            row["share"] = round(row["speedup"] / ideal, 3)
    return rows


def search(case: Case) -> TileConfig:
    """The fastest tile of those that compile and are right; prints each one's milliseconds as they come."""
    sets, times = argument_sets(case), {}
    for tile in TILES[case.pattern_v]:
        try:
            run, count, _ = prepare(case, tile, sets)
        except Exception as error:  # a tile that the compiler refuses, or that is wrong, is a result of the search
            print(f"  {label(tile)}: {str(error)[:200]}", flush=True)
            continue
        times[tile] = timing.race({tile: run}, {tile: count}, rounds=5)[tile]
        print(f"  {label(tile)}: {times[tile]:.4f} ms", flush=True)
    return min(times, key=times.__getitem__)


def label(tile: TileConfig) -> str:
    """A tile in few characters, with the part of one warpgroup."""
    lag = f"/lag{tile.gather_lag}" * bool(tile.gather_lag)
    return f"{tune.label(tile)}/{tile.warpgroup_m}x{tile.warpgroup_n}{lag}"


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--search", action="store_true", help="search each case's tile first")
    values = parser.parse_args()
    command_line.require_hopper()
    wanted = {name: case for name, case in cases().items() if values.cases in name}
    rows, failures = [], []
    for name, case in wanted.items():
        try:
            tile = search(case) if values.search else None
            found = time_case(case, tile)
        except Exception as error:  # the other cases are worth timing all the same
            failures.append(error)
            print(f"{name}: {error!r}"[:500], flush=True)
            continue
        rows += found
        words = (f"{name}: {r['ms']:.4f} ms as {r['form']}, {r['speedup']:.2f}x {r['rival']}" for r in found)
        print(*words, sep="\n", flush=True)
        write(values.json, rows)
    if failures:
        raise SystemExit("\n".join(f"not timed: {failure!r}" for failure in failures))


if __name__ == "__main__":
    main()
