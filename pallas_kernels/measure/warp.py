"""Time the warp kernels: python -m pallas_kernels.measure.warp --json FILE [--tiles] [--cases WORD]

Rates are of the logical product, pruned entries included. The instruction's own rate is measured in the same run, from
registers (issue.py): what part of it a kernel reaches carries over to other GPUs, its TFLOP/s do not. Rivals: XLA's
dense product and, on a Hopper GPU, the Hopper kernels. With --tiles every tile instead of the default one.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.grouped24 import api as grouped
from pallas_kernels.measure import issue, timing
from pallas_kernels.metadata import pack_positions
from pallas_kernels.sparse24.api import sparse24
from pallas_kernels.tile_order import SHAPE, TILE
from pallas_kernels.tiles import Mode
from pallas_kernels.warp.tiles import WarpTile

PAIRS = jnp.array([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], jnp.int32)
SIZES = ((4096, 4096, 4096), (16384, 4096, 4096), (8192, 16384, 2048), (4096, 16384, 4096))
GROUPED: dict[Mode, tuple[int, int, int]] = {
    "rows": (16384, 4096, 4096),
    "columns": (16384, 16384, 4096),
    "contraction": (4096, 4096, 16384),
}
"""m, n, k of all groups together: y3, y1 and dW2 of a routed FFN of E = 4 experts, D = 4096 and F = 16384."""
GROUPS = 4
TILES = (
    WarpTile(4, 2, stages=4),
    WarpTile(4, 2, stages=4, ahead=1),
    WarpTile(4, 2, stages=4, ahead=3),
    WarpTile(4, 2, stages=4, ahead=6),
    WarpTile(4, 2, stages=6),
    WarpTile(4, 2, stages=4, raster_m=8),
    WarpTile(2, 4, stages=4, raster_m=8),
    WarpTile(2, 2, stages=3, raster_m=8, blocks_per_sm=2),
)
SETS = 4
"""Operands that take turns, so that a cache does not hold them."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def packed(m: int, k: int, seed: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Normal values in tiles at uniformly random positions, and those positions."""
    keys = jax.random.split(jax.random.key(seed))
    positions = PAIRS[jax.random.randint(keys[0], (m, k // 4), 0, len(PAIRS))]
    values = jax.random.normal(keys[1], (m // TILE, k // TILE, *SHAPE), jnp.float32)
    return values.astype(jnp.bfloat16), pack_positions(positions)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def label(tile: WarpTile | None) -> str:
    if tile is None:
        return "default"
    return (
        f"{tile.tile_m}x{tile.tile_n} stages={tile.stages} ahead={tile.ahead} raster={tile.raster_m} "
        f"blocks={tile.blocks_per_sm}"
    )


def dense(a: jax.Array, b: jax.Array, *, k_major: bool) -> jax.Array:
    return jnp.dot(a, b.T if k_major else b, preferred_element_type=jnp.bfloat16)


def race_whole(m: int, n: int, k: int, tiles: tuple[WarpTile | None, ...], *, k_major: bool) -> dict[str, float]:
    """Milliseconds by what ran."""
    sets = [(*packed(m, k, seed), normal(seed, *((n, k) if k_major else (k, n)))) for seed in range(SETS)]
    product = functools.partial(sparse24, b_k_major=k_major)
    runs = {
        f"warp {label(tile)}": timing.repeated(functools.partial(product, implementation="warp", config=tile), sets)
        for tile in tiles
    }
    if device.hopper_available():
        runs["hopper"] = timing.repeated(functools.partial(product, implementation="hopper"), sets)
    whole = [(normal(seed + SETS, m, k), sets[seed][2]) for seed in range(SETS)]
    runs["dense"] = timing.repeated(functools.partial(dense, k_major=k_major), whole)
    return timing.race(runs, dict.fromkeys(runs, SETS), rounds=5)


def race_grouped(mode: Mode, tiles: tuple[WarpTile | None, ...]) -> tuple[dict[str, float], float]:
    """Milliseconds by what ran, and the floating point operations of one product."""
    m, n, k = GROUPED[mode]
    tokens = {"rows": m, "columns": n, "contraction": k}[mode]
    sizes = jnp.full(GROUPS, tokens // GROUPS, jnp.int32)
    shape = {"rows": (GROUPS, k, n), "columns": (n, k), "contraction": (k, n)}[mode]
    sets = [(*packed(m, k, seed), normal(seed, *shape), sizes) for seed in range(2)]
    options = {"b_k_major": True, "transpose_out": True} if mode == "columns" else {}
    product = functools.partial(getattr(grouped, mode), **options)
    runs = {
        f"warp {label(tile)}": timing.repeated(functools.partial(product, implementation="warp", config=tile), sets)
        for tile in tiles
    }
    if device.hopper_available():
        runs["hopper"] = timing.repeated(functools.partial(product, implementation="hopper"), sets)
    return timing.race(runs, dict.fromkeys(runs, 2), rounds=5), 2.0 * m * n * k / (GROUPS if mode == "columns" else 1)


def rows_of(case: str, times: dict[str, float], flops: float, peak: float) -> list[dict]:
    found = []
    for name, ms in sorted(times.items(), key=lambda item: item[1]):
        rate = flops / ms * 1e-9
        row = {"case": case, "name": name, "ms": round(ms, 4), "tflops": round(rate, 1)}
        if name.startswith("warp"):
            row["of_instruction"] = round(rate / peak, 3)
        if "dense" in times:
            row["speedup"] = round(times["dense"] / ms, 3)
        found.append(row)
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="file for the rows")
    parser.add_argument("--tiles", action="store_true", help="every tile, not the default one alone")
    parser.add_argument("--cases", default="", help="only cases whose name has this word")
    arguments = parser.parse_args()
    gpu = device.current()
    if gpu is None or gpu.family is None:
        raise SystemExit(f"no GPU with sparse tensor cores: {gpu}")
    tiles = TILES if arguments.tiles else (None,)
    peak = issue.teraflops()
    print(f"{gpu.name}: mma.sp from registers alone {peak:.0f} TFLOP/s", flush=True)
    rows = [{"case": "instruction", "name": "mma.sp bf16", "tflops": round(peak, 1)}]

    def write() -> None:
        with open(arguments.json, "w") as file:
            json.dump({"device": gpu.name, "jax": jax.__version__, "rows": rows}, file, indent=1)

    for m, n, k in SIZES:
        for k_major in (False, True):
            case = f"{m}x{n}x{k} b={'kmajor' if k_major else 'nmajor'}"
            if arguments.cases in case:
                rows += rows_of(case, race_whole(m, n, k, tiles, k_major=k_major), 2.0 * m * n * k, peak)
                write()
    for mode in GROUPED:
        case = f"E={GROUPS} mode={mode}"
        if arguments.cases in case:
            rows += rows_of(case, *race_grouped(mode, tiles), peak)
            write()


if __name__ == "__main__":
    main()
