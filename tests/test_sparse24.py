"""sparse24: errors and dispatch everywhere; on a Hopper GPU the kernel against f64 and its behaviour at the edges."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device, dispatch
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.measure import tune
from pallas_kernels.pack.reference import contraction_order
from pallas_kernels.sparse24 import dense_wins, hopper, sparse24
from pallas_kernels.tile_order import to_tiles
from pallas_kernels.tiles import TileConfig
from tests.helpers import relative_error
from tests.kernels import LIMIT, dense, normal, pack

kernel = functools.partial(sparse24, implementation="hopper")


def problem(m: int, n: int, k: int, *, dtype="bfloat16", b_k_major=False):
    values, metadata = pack(normal(0, m, k, dtype=dtype))
    b = normal(1, k, n, dtype=dtype)
    wanted = dense(values, metadata) @ np.asarray(b, np.float64)
    return values, metadata, b.T if b_k_major else b, wanted


# ------------------------------------------------------------------------------------------------ everywhere


@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 64), (72, 40, 104), (8, 8, 8)])
@pytest.mark.parametrize("b_k_major", [False, True])
def test_reference_path_multiplies(m, n, k, b_k_major):
    values, metadata, b, wanted = problem(m, n, k, b_k_major=b_k_major)
    out = sparse24(values, metadata, b, b_k_major=b_k_major, out_dtype=jnp.float32, implementation="reference")
    assert relative_error(out, wanted) < LIMIT["float32"]
    transposed = sparse24(
        values, metadata, b, b_k_major=b_k_major, transpose_out=True, out_dtype=jnp.float32, implementation="reference"
    )
    np.testing.assert_array_equal(transposed, out.T)


def test_values_come_in_rows_or_in_tiles():
    values, metadata, b, _ = problem(128, 72, 192)
    out = sparse24(values, metadata, b, implementation="reference")
    np.testing.assert_array_equal(sparse24(to_tiles(values), metadata, b, implementation="reference"), out)
    with pytest.raises(ValueError, match=r"bfloat16\[2, 3, 2048\].*in tiles"):
        sparse24(to_tiles(values).reshape(2, 3, 2048), metadata, b)


def test_reference_epilogue_is_what_it_says():
    values, metadata, b, wanted = problem(64, 64, 64)
    operand, scale = normal(2, 64, 64, dtype="float32"), normal(3, 64, dtype="float32")
    epilogue = Epilogue("relu2", "multiply", row_scale=True, alpha=2.0)
    out = sparse24(
        values, metadata, b, epilogue=epilogue, operand=operand, row_scale=scale, out_dtype=jnp.float32,
        implementation="reference",
    )  # fmt: skip
    expected = np.maximum(2 * wanted * np.asarray(scale)[:, None], 0) ** 2 * np.asarray(operand)
    assert relative_error(out, expected) < LIMIT["float32"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": normal(1, 128, 64)}, r"k=64.*k=128"),
        ({"b": normal(1, 64, 60)}, r"n=60 must be a positive multiple of 8"),
        ({"b": normal(1, 64, 64, dtype="float16")}, "float16"),
        ({"metadata": jnp.zeros((1, 1, 64), jnp.uint32)}, r"uint32\[1, 1, 64\].*uint32\[1, 1, 128\]"),
        ({"metadata": jnp.zeros((1, 1, 128), jnp.int32)}, r"int32\[1, 1, 128\]"),
        ({"operand": normal(2, 64, 64)}, "contradict"),
        ({"epilogue": Epilogue(operand="add"), "operand": normal(2, 64, 32)}, r"\[64, 32\]; want bfloat16\[64, 64\]"),
        ({"epilogue": Epilogue(row_scale=True)}, "row_scale=None"),
        ({"implementation": "triton"}, "'triton'"),
    ],
)
def test_errors_carry_values(change, message):
    values, metadata, b, _ = problem(64, 64, 64)
    arguments = {"values": values, "metadata": metadata, "b": b} | change
    error = (
        Exception if {"metadata", "implementation"} & set(change) else ValueError
    )  # the type checker may speak first
    with pytest.raises(error, match=None if error is Exception else message):
        sparse24(**arguments)


def test_metadata_of_another_layout_is_named():
    values, _, b, _ = problem(64, 64, 64)
    with pytest.raises(ValueError, match=r"uint32\[2, 1, 128\].*uint32\[1, 1, 128\]"):
        dispatch.check_packed(values, jnp.zeros((2, 1, 128), jnp.uint32), b)


def test_a_named_kernel_never_falls_back(monkeypatch):
    values, metadata, b, _ = problem(64, 64, 64)
    monkeypatch.setattr(device, "current", lambda: None)
    with pytest.raises(NotImplementedError, match="no GPU"):
        kernel(values, metadata, b)
    monkeypatch.setattr(device, "current", lambda: device.Gpu("NVIDIA B200", "10.0", 148))
    with pytest.raises(NotImplementedError, match=r"NVIDIA B200 of compute capability 10\.0"):
        kernel(values, metadata, b)


def test_dispatch_takes_the_kernel_on_hopper_where_it_wins(monkeypatch):
    launched = []
    monkeypatch.setattr(device, "current", lambda: device.Gpu("NVIDIA H100", "9.0", 132))

    def launch(values, metadata, b, *_):
        launched.append(values.shape)
        return jnp.zeros((values.shape[0], b.shape[1]), b.dtype)

    monkeypatch.setattr(hopper, "sparse24", launch)
    for m, n, k in ((1024, 1024, 512), (64, 64, 64)):
        values, metadata, b, _ = problem(m, n, k)
        sparse24(values, metadata, b)
        assert len(launched) == 1, (m, n, k)
    assert not dense_wins(1024, 1024, 512)
    assert dense_wins(64, 64, 64)
    sparse24(values, metadata, b, implementation="hopper")
    assert launched == [(1024, 256), (64, 32)]
    with pytest.raises(NotImplementedError, match="float32"):
        sparse24(values.astype(jnp.float32), metadata, b.astype(jnp.float32), implementation="hopper")


# -------------------------------------------------------------------------------------------- on a Hopper GPU

SIZES = [(64, 64, 64), (8, 8, 8), (1000, 520, 264), (72, 1032, 520), (512, 768, 1024), (2056, 136, 4104)]


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, TileConfig(), TileConfig(warpgroup_m=128, warpgroup_n=128)])
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 64), (320, 448, 192), (1024, 2048, 4160)])
def test_interleaved_rows_of_b_give_the_bits_of_sorted_ones(m, n, k, config):
    values, metadata = pack(normal(0, m, k))
    b = normal(1, k, n)
    options: dict[str, Any] = {"transpose_out": True, "implementation": "hopper", "config": config}
    expected = sparse24(values, metadata, contraction_order(b, interleaved=True), **options)
    np.testing.assert_array_equal(sparse24(values, metadata, b, b_interleaved=True, **options), expected)


def test_interleaved_rows_of_b():
    values, metadata = pack(normal(0, 64, 128))
    b = normal(1, 128, 64)
    expected = sparse24(values, metadata, contraction_order(b, interleaved=True), implementation="reference")
    found = sparse24(values, metadata, b, b_interleaved=True, implementation="reference")
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="b_interleaved takes b"):
        sparse24(values, metadata, b.T, b_k_major=True, b_interleaved=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize(("b_k_major", "transpose_out"), [(False, False), (True, False), (False, True), (True, True)])
def test_kernel_agrees_with_f64(m, n, k, b_k_major, transpose_out):
    values, metadata, b, wanted = problem(m, n, k, b_k_major=b_k_major)
    out = kernel(values, metadata, b, b_k_major=b_k_major, transpose_out=transpose_out)
    assert relative_error(out, wanted.T if transpose_out else wanted) < LIMIT["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
def test_kernel_types(dtype, out_dtype):
    values, metadata, b, wanted = problem(520, 264, 512, dtype=dtype)
    out = kernel(values, metadata, b, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert relative_error(out, wanted) < LIMIT[out_dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [TileConfig(), TileConfig(128, 128), TileConfig(128, 192, store_slots=3), TileConfig(128, 128, 1, 2),
     TileConfig(64, 64, 2, 1, 6, 1), TileConfig(64, 128, 1, 1, 2, 1), TileConfig(raster_m=3, raster_n=2),
     TileConfig(stages=5, store_slots=1, deferred=True), TileConfig(128, 128, stages=6, store_slots=1, deferred=True)],
    ids=tune.label,
)  # fmt: skip
def test_every_tile_gives_the_same_bits(config):
    values, metadata, b, wanted = problem(2500 * 8, 776, 1032)
    out = kernel(values, metadata, b, config=config)
    assert relative_error(out, wanted) < LIMIT["bfloat16"]
    np.testing.assert_array_equal(out, kernel(values, metadata, b))


@pytest.mark.gpu
@pytest.mark.parametrize("transpose_out", [False, True])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "epilogue",
    [Epilogue("relu"), Epilogue("relu2"), Epilogue(None, "multiply", alpha=2.0), Epilogue(None, "add"),
     Epilogue("relu2", "add", row_scale=True, alpha=-0.5)],
    ids=str,
)  # fmt: skip
def test_epilogues_agree_with_the_reference(epilogue, out_dtype, transpose_out):
    m, n, k = 328, 456, 512
    values, metadata, b, _ = problem(m, n, k)
    shape = (n, m) if transpose_out else (m, n)
    options = {
        "epilogue": epilogue,
        "operand": None if epilogue.operand is None else normal(2, *shape, dtype=out_dtype),
        "row_scale": normal(3, m, dtype="float32") if epilogue.row_scale else None,
        "out_dtype": out_dtype,
        "transpose_out": transpose_out,
    }
    out = kernel(values, metadata, b, **options)
    wanted = sparse24(values, metadata, b, implementation="reference", **options)
    assert relative_error(out, wanted) < LIMIT[out_dtype] * 2


@pytest.mark.gpu
def test_values_in_tiles_give_the_same_bits():
    values, metadata, b, _ = problem(192, 136, 256)
    np.testing.assert_array_equal(kernel(to_tiles(values), metadata, b), kernel(values, metadata, b))


@pytest.mark.gpu
def test_a_hundred_runs_give_the_same_bits():
    values, metadata, b, _ = problem(4096, 1032, 1544)
    first = kernel(values, metadata, b)
    same = jax.jit(jnp.array_equal)
    assert all(bool(same(first, kernel(values, metadata, b))) for _ in range(100))


@pytest.mark.gpu
def test_every_element_is_written_over_poison():
    values, metadata, b, wanted = problem(1000, 520, 264)
    poison = jnp.full((1000 * 520 * 4,), jnp.nan, jnp.bfloat16)
    jax.block_until_ready(poison)
    poison.delete()
    assert relative_error(kernel(values, metadata, b), wanted) < LIMIT["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_bad_stored_entry_reaches_its_row_only(bad):
    values, metadata, b, _ = problem(192, 136, 256)
    clean = np.asarray(kernel(values, metadata, b), np.float32)
    out = np.asarray(kernel(values.at[70, 9].set(bad), metadata, b), np.float32)
    assert not np.isfinite(out[70]).any()
    np.testing.assert_array_equal(np.delete(out, 70, 0), np.delete(clean, 70, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("b_k_major", [False, True])
def test_a_bad_entry_of_b_meets_stored_entries_only(bad, b_k_major):
    values, metadata, b, _ = problem(192, 136, 256)
    values = values.at[:, ::2].set(jnp.where(values[:, ::2] > 1, 0, values[:, ::2]))
    clean = np.asarray(kernel(values, metadata, b), np.float32)
    b = b.at[37, 11].set(bad)
    out = np.asarray(kernel(values, metadata, b.T if b_k_major else b, b_k_major=b_k_major), np.float32)
    positions = dense(jnp.ones_like(values), metadata)
    stored = positions[:, 37] != 0
    assert 0 < stored.sum() < 192
    np.testing.assert_array_equal(np.isfinite(out[:, 11]), ~stored)
    np.testing.assert_array_equal(np.delete(out, 11, 1), np.delete(clean, 11, 1))
    np.testing.assert_array_equal(out[~stored], clean[~stored])


@pytest.mark.gpu
def test_zeros_of_either_sign_add_nothing():
    values, metadata, b, _ = problem(128, 72, 128)
    zero = kernel(jnp.zeros_like(values), metadata, b, out_dtype=jnp.float32)
    negative = kernel(jnp.full_like(values, -0.0), metadata, jnp.abs(b), out_dtype=jnp.float32)
    assert not np.asarray(zero).any()
    assert not np.asarray(negative).any()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(64, 65536, 64), (64, 64, 65536), (65536, 64, 64)], ids=str)
def test_extreme_sizes(size):
    values, metadata, b, wanted = problem(*size)
    assert relative_error(kernel(values, metadata, b), wanted) < LIMIT["bfloat16"]
