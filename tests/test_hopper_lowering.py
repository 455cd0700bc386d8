"""Every kernel and tile lowers to a Hopper kernel on a machine without a GPU: layouts, shared memory, types."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import core

from pallas_kernels import tile_order, tuned
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.grouped24 import hopper as grouped24
from pallas_kernels.hopper import kernel, main_loop
from pallas_kernels.measure import tune
from pallas_kernels.sparse24 import hopper as sparse24
from pallas_kernels.tiles import PROMOTE, Mode, Problem, TileConfig
from tests.ahead import compile_ahead, needs_compiler


def in_one_order(tiles) -> list[TileConfig]:
    """Tiles that differ in code: the order in which they are walked is left out."""
    return list(dict.fromkeys(dataclasses.replace(tile, raster_m=8, raster_n=8) for tile in tiles))


TILES = in_one_order((*tune.LARGE, *tune.SMALL))
MODES: tuple[Mode, ...] = ("dense", "rows", "columns", "contraction")


TILES8, PROMOTING = in_one_order((*tune.LARGE8, *tune.SMALL8)), in_one_order(tune.PROMOTING)
SCALES = Epilogue(row_scale=True, column_scale=True)
E4M3 = "float8_e4m3fn"
__all__ = ["compile_ahead"]  # a fixture


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")


def launch(problem: Problem, config: TileConfig, *, in_rows: bool = False):
    """The kernel as a function, and what it takes."""
    p, array = problem, jax.ShapeDtypeStruct
    b_rows = p.k * (p.groups if p.mode == "rows" else 1)
    tiles = (-(-p.m // 64), p.k // p.tile_k, *tile_order.shape(p.dtype))
    arguments = {
        "values": array((p.m, p.k // 2) if in_rows else tiles, p.dtype),
        "metadata": array((-(-p.m // 64), p.k // 64, 128), jnp.uint32),
        "b": array((p.n, b_rows) if p.b_k_major else (b_rows, p.n), p.b_dtype),
    }
    if p.a != "sparse":
        arguments |= {"values": array((p.m, p.k), p.dtype), "metadata": None}
    if p.mode != "dense":
        arguments["groups"] = array((p.groups,), jnp.int32)
    if p.epilogue.operand is not None:
        arguments["operand"] = array(p.out_shape, p.out_dtype)
    for name, entries in zip(("row_scale", "column_scale"), p.scale_entries, strict=True):
        if getattr(p.epilogue, name):
            arguments[name] = array((entries,), jnp.float32)
    return lambda arguments: kernel.matmul(**arguments, problem=p, config=config, num_sms=132), arguments


def lower(problem: Problem, config: TileConfig, *, in_rows: bool = False) -> str:
    function, arguments = launch(problem, config, in_rows=in_rows)
    return jax.jit(function).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()


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
            assert config in (*TILES, *TILES8, *PROMOTING), (path, entry)


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


def problem8(mode: Mode = "dense", **fields) -> Problem:
    fields = {"b_k_major": True, "dtype": E4M3, "epilogue": SCALES} | fields
    return problem_of(mode, **fields)


KERNELS8 = {
    **{f"{mode} {tune.label(c)}": (problem8(mode), c) for mode in ("dense", "columns") for c in TILES8[:2]},
    **{f"{tune.label(c)}": (problem8(), c) for c in TILES8[2:]},
    **{f"late {tune.label(c)}": (problem8(epilogue=dataclasses.replace(SCALES, powers_of_two=True)), c)
       for c in TILES8 if c.deferred},
    **{f"promoted {mode} {tune.label(c)}": (problem8(mode, out_dtype="float32", promote=PROMOTE), c)
       for mode in ("dense", "contraction") for c in PROMOTING
       if c.violation(problem8(mode, out_dtype="float32", promote=PROMOTE)) is None},
    "promoted and stored behind products": (problem8("contraction", promote=PROMOTE), PROMOTING[-1]),
    "added up, transposed": (
        problem8("contraction", out_dtype="float32", promote=PROMOTE, transpose_out=True,
                 epilogue=dataclasses.replace(SCALES, operand="add")), PROMOTING[-2]),
    "rows, other types": (problem8("rows", dtype="float8_e5m2", b_type=E4M3), TILES8[0]),
    "everything": (
        problem8(epilogue=dataclasses.replace(SCALES, operand="multiply", activation="relu2", alpha=2.0)),
        TileConfig(128, 128)),
    "one scale, transposed": (problem8(transpose_out=True, epilogue=Epilogue("relu", column_scale=True)), TILES8[0]),
    "dense": (problem8(a="k_major"), TILES8[0]),
    "dense, promoted": (problem8(a="k_major", out_dtype="float32", promote=PROMOTE), PROMOTING[2]),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS8)
def test_kernels_of_8_bits_lower(name):
    problem, config = KERNELS8[name]
    assert config.violation(problem) is None
    assert "mosaic_gpu" in lower(problem, config)


@needs_compiler
@pytest.mark.parametrize("name", KERNELS8)
def test_kernels_of_8_bits_compile_without_spills(name, compile_ahead):
    function, arguments = launch(*KERNELS8[name])
    for found in compile_ahead(function, arguments):
        assert found.spilled == 0
        assert not found.warnings


@pytest.mark.parametrize(
    ("problem", "config"),
    [
        *((problem_of(mode), TileConfig(store_slots=slots)) for mode in MODES for slots in (1, 2)),
        (problem8(), TileConfig()),
        (problem8("contraction", epilogue=Epilogue(None, "add")), TileConfig(64, 192, stages=3)),
        (problem8(a="k_major"), TileConfig(128, 128, stages=3, store_slots=1)),
        (Problem(512, 512, 512, v=128), TileConfig(stages=4, store_slots=1)),
    ],
)
def test_shared_memory_is_what_the_tile_says(problem, config, monkeypatch):
    """No launch is refused that the tile allows: `TileConfig.smem_bytes` is to the byte what the launch asks for."""
    asked, serialize = [], core._run_serde_pass

    def look(module, **options):
        asked.extend(re.findall(r"dynamic_shared_memory_size %c(\d+)", module.operation.get_asm()))
        return serialize(module, **options)

    monkeypatch.setattr(core, "_run_serde_pass", look)
    if problem.v:
        array = jax.ShapeDtypeStruct
        tiles, words = array((8, 8, 8, 256), jnp.bfloat16), array((8, 8, 128), jnp.uint32)
        operands = {"values": tiles, "metadata": words, "b": array((512, 512), jnp.bfloat16)}
        operands["columns"] = array((4, 512), jnp.int32)
        run = jax.jit(lambda operands: kernel.matmul(**operands, problem=problem, config=config, num_sms=132))
        run.trace(operands).lower(lowering_platforms=("cuda",))
    else:
        lower(problem, config)
    assert {int(size) for size in asked} == {config.smem_bytes(problem)}


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
