"""Every kernel and tile lowers to a Hopper kernel on a machine without a GPU: layouts, shared memory, types."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuned
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.grouped24 import hopper as grouped24
from pallas_kernels.hopper import kernel, main_loop
from pallas_kernels.measure import tune
from pallas_kernels.sparse24 import hopper as sparse24
from pallas_kernels.tiles import Mode, Problem, TileConfig

TILES = dict.fromkeys(dataclasses.replace(tile, raster_m=8, raster_n=8) for tile in (*tune.LARGE, *tune.SMALL))
MODES: tuple[Mode, ...] = ("dense", "rows", "columns", "contraction")


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")


def lower(problem: Problem, config: TileConfig, *, in_rows: bool = False) -> str:
    p, array = problem, jax.ShapeDtypeStruct
    b_rows = p.k * (p.groups if p.mode == "rows" else 1)
    arguments = {
        "values": array((p.m, p.k // 2) if in_rows else (-(-p.m // 64), p.k // 64, 8, 256), p.dtype),
        "metadata": array((-(-p.m // 64), p.k // 64, 128), jnp.uint32),
        "b": array((p.n, b_rows) if p.b_k_major else (b_rows, p.n), p.dtype),
    }
    if p.mode != "dense":
        arguments["groups"] = array((p.groups,), jnp.int32)
    if p.epilogue.operand is not None:
        arguments["operand"] = array(p.out_shape, p.out_dtype)
    if p.epilogue.row_scale:
        arguments["row_scale"] = array((p.out_shape[1 if p.transpose_out else 0],), jnp.float32)
    launch = jax.jit(lambda arguments: kernel.matmul(**arguments, problem=p, config=config, num_sms=132))
    return launch.trace(arguments).lower(lowering_platforms=("cuda",)).as_text()


def problem_of(mode: Mode, **fields) -> Problem:
    groups = 1 if mode == "dense" else 4
    return Problem(m=512, n=512, k=512, mode=mode, groups=groups, **fields)


@pytest.mark.parametrize("config", TILES, ids=lambda c: f"{c.tile_m}x{c.tile_n}")
@pytest.mark.parametrize("mode", MODES)
def test_every_tile_lowers_in_every_mode(mode, config):
    problem = problem_of(mode, b_k_major=mode == "columns")
    if config.violation(problem) is None:
        assert "mosaic_gpu" in lower(problem, config)


def test_every_tuned_tile_is_one_that_lowers_here():
    for path in tuned.FOLDER.glob("*.json"):
        for entry in json.loads(path.read_text()):
            config = dataclasses.replace(TileConfig(**entry["config"]), raster_m=8, raster_n=8)
            assert config in TILES, (path, entry)


@pytest.mark.parametrize("config", [TileConfig(), TileConfig(128, 128)], ids=tune.label)
def test_values_in_rows_lower(config):
    assert "mosaic_gpu" in lower(problem_of("rows"), config, in_rows=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transpose_out", [False, True])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_every_order_and_type_lowers(mode, transpose_out, out_dtype):
    problem = problem_of(mode, b_k_major=transpose_out, transpose_out=transpose_out, out_dtype=out_dtype)
    assert "mosaic_gpu" in lower(problem, TileConfig(deferred=transpose_out))


@pytest.mark.parametrize("transpose_out", [False, True])
@pytest.mark.parametrize(
    "epilogue",
    [Epilogue("relu"), Epilogue("relu2", "multiply", row_scale=True, alpha=2.0), Epilogue(None, "add")],
    ids=["relu", "everything", "add"],
)
def test_every_epilogue_lowers(epilogue, transpose_out):
    problem = problem_of("dense", transpose_out=transpose_out, epilogue=epilogue, dtype="float16", out_dtype="float16")
    assert "mosaic_gpu" in lower(problem, TileConfig(warpgroup_m=128, warpgroup_n=128))


@pytest.mark.parametrize(("m", "n", "k"), [(8, 8, 8), (1000, 72, 104), (64, 65536, 64)])
@pytest.mark.parametrize("b_k_major", [False, True])
def test_sizes_that_fit_no_tile_lower(m, n, k, b_k_major):
    array = jax.ShapeDtypeStruct
    words = array((-(-m // 64), -(-k // 64), 128), jnp.uint32)
    b = array((n, k) if b_k_major else (k, n), jnp.bfloat16)
    launch = jax.jit(lambda v, e, b: sparse24.sparse24(v, e, b, b_k_major, b_k_major, "bfloat16", Epilogue()))
    traced = launch.trace(array((m, k // 2), jnp.bfloat16), words, b)
    assert traced.out_info.shape == ((n, m) if b_k_major else (m, n))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_stores_behind_products_split_no_warp(monkeypatch):
    """On the GPU a warp that ptxas splits here hangs, and only with one step: `main_loop._Program._store`."""
    texts, text = [], main_loop._Program.text
    monkeypatch.setattr(main_loop._Program, "text", lambda program: texts.append(text(program)) or texts[-1])
    lower(problem_of("contraction"), TileConfig(128, 128, store_slots=1, deferred=True))
    (lines,) = (text.splitlines() for text in texts)
    groups = [line for line in lines if "bulk.wait_group" in line or "bulk.commit_group" in line]
    stores = 4 + 3 + 4  # behind products, the rest of them where there are fewer products, all where there are none
    assert len(groups) == 2 * stores
    assert not any(line.startswith("@") for line in groups)


def test_a_grouped_product_is_one_kernel_launch():
    array = jax.ShapeDtypeStruct
    problem = problem_of("rows")
    launch = jax.jit(lambda v, e, b, sizes: grouped24.grouped24(problem, v, e, b, sizes))
    text = launch.trace(
        array((8, 8, 8, 256), jnp.bfloat16),
        array((8, 8, 128), jnp.uint32),
        array((2048, 512), jnp.bfloat16),
        array((4,), jnp.int32),
    ).lower(lowering_platforms=("cuda",))
    assert text.as_text().count("stablehlo.custom_call") == 1
