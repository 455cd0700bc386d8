"""The best tile measured for each problem: one JSON file per GPU, written by `python -m pallas_kernels.tune`.

A problem that is not in the file takes the tile of the nearest one of its kind (the smallest distance between the
logarithms of the sizes) that fits. Where a GPU has no file, or its file no problem of that kind, the tiles of the H200
serve, then those of the H100: all Hopper GPUs have the same multiprocessors.
"""

import dataclasses
import functools
import json
import math
import pathlib

from pallas_kernels import device
from pallas_kernels.tiles import FP8, PROMOTE, Problem, TileConfig

FOLDER = pathlib.Path(__file__).parent
_H200, _H100 = "nvidia_h200", "nvidia_h100_80gb_hbm3"
_KIND = ("mode", "b_k_major", "transpose_out", "a")
_SIZES = ("m", "n", "k", "groups")
_MORE = {"a": "sparse", "dtype": "bfloat16", "promote": 0}
_PACKING = (TileConfig(warpgroup_n=192, stages=5), TileConfig(warpgroup_n=192, stages=4))
_FALLBACK = (
    TileConfig(stages=5, store_slots=1, deferred=True),
    TileConfig(warpgroup_n=128, stages=4),
    TileConfig(warpgroup_n=64, stages=4, store_slots=1),
)
_FALLBACK_FP8 = (
    TileConfig(stages=4, store_slots=1, deferred=True),
    TileConfig(stages=4, store_slots=1),
    TileConfig(warpgroup_n=192, stages=5, store_slots=1, promote=PROMOTE),
    TileConfig(warpgroup_n=128, stages=4, store_slots=1, promote=PROMOTE),
    TileConfig(warpgroup_n=128, stages=4),
    TileConfig(warpgroup_n=64, stages=4, store_slots=1),
)


def choose(problem: Problem) -> TileConfig:
    """The tile for a problem: that of the nearest measured problem, or a default.

    Raises:
      ValueError: no tile fits.
    """
    gpu = device.current()
    own = _H100 if gpu is None else gpu.file_name
    return _choose(problem, tuple(dict.fromkeys((own, _H200, _H100))))


def sizes_of(problem: Problem) -> dict:
    """The fields of a problem that a table of tiles is looked up by; those of `_MORE` where they say something."""
    names = (*_SIZES[:3], "mode", "groups", "b_k_major", "transpose_out")
    more = {name: getattr(problem, name) for name, usual in _MORE.items() if getattr(problem, name) != usual}
    return {name: getattr(problem, name) for name in names} | more


def path_of(name: str) -> pathlib.Path:
    return FOLDER / f"{name}.json"


@functools.cache
def _choose(problem: Problem, names: tuple[str, ...]) -> TileConfig:
    tiles = [TileConfig(**entry["config"]) for name in names for entry in _of_kind(name, problem)]
    defaults = _FALLBACK_FP8 if problem.is_fp8 else _FALLBACK
    for config in (*tiles, *defaults) if problem.packing is None else _PACKING:
        if bool(config.promote) != bool(problem.promote):
            continue  # promotion costs time: no tile does it that need not
        config = dataclasses.replace(config, promote=min(config.promote, problem.promote))
        if config.violation(problem) is None:
            return config
    raise ValueError(f"no tile fits {problem}: {defaults[0].violation(problem)}")


def _of_kind(name: str, problem: Problem) -> list[dict]:
    """A GPU's problems of a problem's kind, the nearest first."""
    kind = [getattr(problem, field) for field in _KIND]
    entries = [
        entry
        for entry in _table(name)
        if [entry["problem"][field] for field in _KIND] == kind
        and (entry["problem"]["dtype"] in FP8) == problem.is_fp8
        and bool(entry["problem"]["promote"]) == bool(problem.promote)
    ]
    return sorted(entries, key=lambda entry: _distance(entry["problem"], problem))


@functools.cache
def _table(name: str) -> list[dict]:
    path = path_of(name)
    entries = json.loads(path.read_text()) if path.exists() else []
    return [entry | {"problem": _MORE | entry["problem"]} for entry in entries]


def _distance(measured: dict, problem: Problem) -> float:
    return sum(abs(math.log2(measured[size]) - math.log2(getattr(problem, size))) for size in _SIZES)
