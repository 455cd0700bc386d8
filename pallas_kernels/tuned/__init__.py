"""The best tile measured for each problem: one JSON file per GPU, written by `python -m pallas_kernels.tune`.

A problem that is not in the file takes the tile of the nearest one of its kind (the smallest distance between the
logarithms of the sizes) that fits.
"""

import functools
import json
import math
import pathlib

from pallas_kernels import device
from pallas_kernels.tiles import Problem, TileConfig

FOLDER = pathlib.Path(__file__).parent
_H100 = "nvidia_h100_80gb_hbm3"
_KIND = ("mode", "b_k_major", "transpose_out")
_SIZES = ("m", "n", "k", "groups")
_PACKING = (TileConfig(warpgroup_n=192, stages=5), TileConfig(warpgroup_n=192, stages=4))
_FALLBACK = (
    TileConfig(stages=5, store_slots=1, deferred=True),
    TileConfig(warpgroup_n=128, stages=4),
    TileConfig(warpgroup_n=64, stages=4, store_slots=1),
)


def choose(problem: Problem) -> TileConfig:
    """The tile for a problem: that of the nearest measured problem, or a default.

    Raises:
      ValueError: no tile fits.
    """
    return _choose(problem, _file_name())


def _file_name() -> str:
    gpu = device.current()
    return _H100 if gpu is None or not path_of(gpu.file_name).exists() else gpu.file_name


def path_of(name: str) -> pathlib.Path:
    return FOLDER / f"{name}.json"


@functools.cache
def _choose(problem: Problem, name: str) -> TileConfig:
    entries = [entry for entry in _table(name) if all(entry["problem"][f] == getattr(problem, f) for f in _KIND)]
    nearest = sorted(entries, key=lambda entry: _distance(entry["problem"], problem))
    tiles = (*(TileConfig(**entry["config"]) for entry in nearest), *_FALLBACK)
    for config in tiles if problem.packing is None else _PACKING:
        if config.violation(problem) is None:
            return config
    raise ValueError(f"no tile fits {problem}: {_FALLBACK[0].violation(problem)}")


@functools.cache
def _table(name: str) -> list[dict]:
    return json.loads(path_of(name).read_text())


def _distance(measured: dict, problem: Problem) -> float:
    return sum(abs(math.log2(measured[size]) - math.log2(getattr(problem, size))) for size in _SIZES)
