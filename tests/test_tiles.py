"""Tiles: each constraint says what it limits, and every tuned tile satisfies all of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tune, tuned
from pallas_kernels.hopper.schedule import raster
from pallas_kernels.tile_order import from_tiles, to_tiles
from pallas_kernels.tiles import Problem, TileConfig

PROBLEM = Problem(1024, 1024, 1024)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"warpgroup_m": 96}, "warpgroup_m=96"),
        ({"warpgroup_n": 72}, "warpgroup_n=72"),
        ({"warpgroup_n": 320}, "warpgroup_n=320"),
        ({"warpgroup_m": 128}, "128 x 256"),
        ({"warpgroups_m": 2, "warpgroups_n": 2, "warpgroup_n": 64}, "warpgroups=4"),
        ({"warpgroups_n": 2, "warpgroups_m": 1}, "tile_n=512"),
        ({"stages": 1}, "stages=1"),
        ({"store_slots": 0}, "store_slots=0"),
        ({"stages": 6}, "bytes of shared memory"),
    ],
)
def test_a_broken_rule_is_named_with_its_value(changes, named):
    config = dataclasses.replace(TileConfig(), **changes)
    with pytest.raises(ValueError, match=named):
        config.check(PROBLEM)


def test_groups_of_rows_need_whole_stages():
    problem = Problem(1024, 1024, 96, mode="rows", groups=4)
    with pytest.raises(ValueError, match=r"problem\.k=96"):
        TileConfig().check(problem)


def test_the_contraction_needs_room_for_its_groups():
    largest = TileConfig(128, 128, 1, 1, stages=8, store_slots=3)
    assert largest.violation(PROBLEM) is None
    grouped = dataclasses.replace(PROBLEM, mode="contraction", groups=128)
    assert "bytes of shared memory" in str(largest.violation(grouped))


def test_shared_memory_adds_up():
    config = TileConfig(64, 128, 2, 1, stages=3, store_slots=2)
    a, words, b, chunk = 128 * 32 * 2, 2 * 128 * 4, 64 * 128 * 2, 64 * 128
    assert config.smem_bytes(PROBLEM) == 3 * (a + words + b) + 2 * 2 * chunk + 1024 + 4 * 8


def test_every_tuned_tile_fits_its_problem():
    for path in tuned.FOLDER.glob("*.json"):
        for entry in json.loads(path.read_text()):
            assert TileConfig(**entry["config"]).violation(Problem(**entry["problem"])) is None, (path, entry)


@pytest.mark.parametrize("mode", ["dense", "rows", "columns", "contraction"])
@pytest.mark.parametrize("size", [64, 192, 65536])
def test_every_problem_gets_a_tile(mode, size):
    problem = Problem(size, size, size, mode=mode, transpose_out=mode == "columns")
    assert tuned.choose(problem).violation(problem) is None


def test_candidates_fit_and_differ():
    found = list(tune.candidates(PROBLEM))
    assert len(found) == len(set(found)) > 4
    assert all(config.violation(PROBLEM) is None for config in found)
    assert all(config.tile_m < 256 for config in tune.candidates(Problem(64, 1024, 1024)))


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (100, 72), (8, 8), (192, 320)])
def test_tile_order_comes_back_exactly(rows, columns):
    values = jnp.arange(rows * columns // 2, dtype=jnp.float32).reshape(rows, columns // 2)
    tiles = to_tiles(values)
    assert tiles.shape == (-(-rows // 64), -(-columns // 64), 8, 256)
    np.testing.assert_array_equal(from_tiles(tiles, rows, columns), values)
    assert float(jnp.sum(tiles)) == float(jnp.sum(values))


def test_tile_order_is_rows_of_four_swizzled_pieces():
    values = jnp.arange(128 * 64, dtype=jnp.float32).reshape(128, 64)
    tile = to_tiles(values)[1, 1].reshape(64, 4, 8)
    for row in range(64):
        for piece in range(4):
            wanted = values[64 + row, 32 + 8 * piece : 40 + 8 * piece]
            np.testing.assert_array_equal(tile[row, piece ^ (row // 2 % 4)], wanted)


@pytest.mark.parametrize(("m_tiles", "n_tiles"), [(1, 1), (5, 7), (16, 9)])
@pytest.mark.parametrize(("raster_m", "raster_n"), [(1, 1), (8, 1024), (3, 2), (16, 4)])
def test_every_tile_is_visited_once(m_tiles, n_tiles, raster_m, raster_n):
    config = TileConfig(raster_m=raster_m, raster_n=raster_n)
    visit = jax.vmap(lambda index: jnp.stack(raster(index, m_tiles, n_tiles, config)))
    found = np.asarray(visit(jnp.arange(m_tiles * n_tiles))).tolist()
    assert sorted(found) == [[i, j] for i in range(m_tiles) for j in range(n_tiles)]
    first = [[i, 0] for i in range(min(raster_m, m_tiles))]
    assert found[: len(first)] == first
