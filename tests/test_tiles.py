"""Tiles: each constraint says what it limits, and every tuned tile satisfies all of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device, tuned
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.hopper.schedule import raster
from pallas_kernels.measure import tune
from pallas_kernels.tile_order import from_tiles, to_tiles
from pallas_kernels.tiles import Problem, TileConfig

PROBLEM = Problem(1024, 1024, 1024)
PROBLEM8 = Problem(1024, 1024, 1024, b_k_major=True, dtype="float8_e4m3fn")
SCALES = Epilogue(row_scale=True, column_scale=True)


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


@pytest.mark.parametrize(
    ("config", "problem", "named"),
    [
        ({"promote": 128}, {}, "promote=128"),
        ({"promote": 1024, "warpgroup_n": 128}, {"dtype": "bfloat16"}, "promote=1024, bfloat16"),
        ({"promote": 1024}, {}, "64 x 256.*two sums"),
        ({"promote": 2048, "warpgroup_n": 192}, {"promote": 1024}, "promote=2048.*every 1024 columns"),
        ({}, {"promote": 1024}, "promote=0.*every 1024 columns"),
        ({}, {"b_k_major": False}, "along k only"),
        ({}, {"a": "m_major"}, "along k only"),
        ({}, {"b_interleaved": True, "b_k_major": False}, "along k only"),
        ({}, {"k": 192}, "problem.k=192.*128"),
        ({}, {"mode": "rows", "groups": 4, "a": "k_major"}, "dense A of 8 bits"),
        ({"stages": 5, "store_slots": 1, "deferred": True}, {}, "232448 bytes of shared memory exceed 232432"),
    ],
)
def test_a_broken_rule_of_8_bits_is_named(config, problem, named):
    with pytest.raises(ValueError, match=named):
        TileConfig(**config).check(dataclasses.replace(PROBLEM8, **problem))


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
    scaled = dataclasses.replace(PROBLEM8, epilogue=SCALES)
    assert config.smem_bytes(scaled) == 3 * (a + 2 * words + b) + 2 * 2 * chunk + 1024 + 4 * 4 * 256 + 8 * 8


def test_every_tuned_tile_fits_its_problem():
    for path in tuned.FOLDER.glob("*.json"):
        for entry in json.loads(path.read_text()):
            assert TileConfig(**entry["config"]).violation(Problem(**entry["problem"])) is None, (path, entry)


@pytest.mark.parametrize("mode", ["dense", "rows", "columns", "contraction"])
@pytest.mark.parametrize("size", [64, 192, 65536])
def test_every_problem_gets_a_tile(mode, size):
    problem = Problem(size, size, size, mode=mode, transpose_out=mode == "columns")
    assert tuned.choose(problem).violation(problem) is None


@pytest.mark.parametrize("mode", ["dense", "rows", "columns", "contraction"])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("promote", [0, 256, 1024])
def test_every_problem_of_8_bits_gets_a_tile(mode, out_dtype, promote):
    problem = dataclasses.replace(PROBLEM8, mode=mode, out_dtype=out_dtype, promote=promote, groups=4, epilogue=SCALES)
    config = tuned.choose(problem)
    assert config.violation(problem) is None
    assert (0 < config.promote <= promote) if promote else not config.promote


def test_a_hopper_without_tiles_of_its_own_takes_those_of_the_h200_then_the_h100(monkeypatch, tmp_path):
    def choose_with(name, **config):
        entry = {"problem": tuned.sizes_of(PROBLEM8), "config": dataclasses.asdict(TileConfig(**config))}
        (tmp_path / f"{name}.json").write_text(json.dumps([entry]))
        forget()
        return tuned.choose(PROBLEM8)

    def forget():
        tuned._choose.cache_clear()
        tuned._table.cache_clear()

    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(device, "current", lambda: device.Gpu("NVIDIA GH200 480GB", "9.0", 132))
    try:
        assert choose_with("nvidia_h100_80gb_hbm3", raster_m=3).raster_m == 3
        assert choose_with("nvidia_h200", raster_m=5).raster_m == 5
        assert choose_with("nvidia_gh200_480gb", raster_m=7).raster_m == 7
    finally:
        forget()


@pytest.mark.parametrize("problem", [PROBLEM, PROBLEM8, dataclasses.replace(PROBLEM8, promote=1024)])
def test_candidates_fit_and_differ(problem):
    found = list(tune.candidates(problem))
    assert len(found) == len(set(found)) > 3
    assert all(config.violation(problem) is None for config in found)
    assert all(config.tile_m < 256 for config in tune.candidates(dataclasses.replace(problem, m=64)))


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (100, 72), (8, 8), (192, 320)])
def test_tile_order_comes_back_exactly(rows, columns, dtype):
    values = jnp.arange(rows * columns // 2).reshape(rows, columns // 2) % 16 + 1
    tiles = to_tiles(values.astype(dtype))
    shape = (8, 256) if dtype == "float32" else (16, 256)
    assert tiles.shape == (-(-rows // 64), -(-columns // (64 if dtype == "float32" else 128)), *shape)
    np.testing.assert_array_equal(from_tiles(tiles, rows, columns).astype(int), values)
    assert float(jnp.sum(tiles.astype(jnp.float32))) == float(jnp.sum(values))


def test_tiles_of_8_bits_hold_the_same_bytes_as_those_of_16():
    values = jax.random.bits(jax.random.key(0), (128, 64), jnp.uint16) & 0x3FFF  # no NaN, whose bits may change
    halves = jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn).reshape(128, 128)
    found = to_tiles(halves), to_tiles(jax.lax.bitcast_convert_type(values, jnp.bfloat16))
    as_bytes = [np.asarray(tiles).view(np.uint8).reshape(2, 2, -1) for tiles in found]
    np.testing.assert_array_equal(as_bytes[0], as_bytes[1])


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
