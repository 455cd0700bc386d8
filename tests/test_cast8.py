"""Casts to eight bits against ml_dtypes at every boundary, and scales against logarithms."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.cast8 import api, reference
from pallas_kernels.pack import hopper
from pallas_kernels.pack.reference import contraction_order
from tests import word_machine

pytestmark = pytest.mark.usefixtures("strict_dtypes")

EIGHT_BITS = [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def all_values(dtype) -> np.ndarray:
    """Every finite value, ascending, f32."""
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return np.sort(values[np.isfinite(values)])


def boundaries(dtype) -> np.ndarray:
    """Values, the ties between neighbours, and what lies next to a tie on both sides: where rounding twice shows."""
    values = all_values(dtype)
    ties = (values[1:] + values[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(to)) for to in (np.inf, -np.inf)]
    # Half an ulp of f16 and of bf16 away from a tie, which rounding to those first would lose.
    near = [(ties * (1 + sign * 2.0**-bits)).astype(np.float32) for bits in (9, 12, 13) for sign in (1, -1)]
    return np.concatenate([values, ties, *beside, *near])


def assert_same_eight_bits(found, expected):
    """To the bit, but for the sign of NaN."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), nan)
    found, expected = (np.where(nan, 0, x.view(np.uint8)) for x in (found, expected))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("power", [-60, -9, 0, 7])
def test_a_cast_rounds_once_to_nearest_even(dtype, power):
    v = boundaries(dtype)
    scaled = jnp.asarray(v * np.float32(2.0**power))
    found = jax.jit(reference.cast, static_argnums=2)(scaled, jnp.float32(2.0**power), dtype)
    assert_same_eight_bits(found, v.astype(dtype))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_cast_saturates_and_passes_nan_on(dtype):
    largest = float(ml_dtypes.finfo(dtype).max)
    v = jnp.array([np.inf, -np.inf, 1e38, -largest * 1.5, np.nextafter(largest, np.inf), -0.0, 0.0, np.nan], "float32")
    found = np.asarray(reference.cast(v, jnp.float32(1), dtype), np.float32)
    np.testing.assert_array_equal(found, [largest, -largest, largest, -largest, largest, 0, 0, np.nan])
    np.testing.assert_array_equal(np.signbit(found[:-1]), [0, 1, 0, 1, 0, 1, 0])
    assert np.isnan(np.asarray(reference.cast(v, jnp.float32(np.nan), dtype), np.float32)).all()


@pytest.mark.parametrize("power", [1, 2])
def test_scales_are_the_smallest_powers_under_which_nothing_saturates(power):
    rng = np.random.default_rng(0)
    amax = np.abs(rng.standard_normal(2000)) * 2.0 ** rng.integers(-40, 50, 2000)
    exact = 448 * 2.0 ** np.arange(-20, 20)
    amax = np.concatenate([amax, exact, exact * (1 + 2.0**-23), exact * (1 - 2.0**-23)]).astype(np.float32)
    scale = np.asarray(reference.scale_of(jnp.asarray(amax), power), np.float64)
    exponent = np.log2(scale)
    np.testing.assert_array_equal(exponent % power, 0)
    assert (amax <= 448 * scale).all()
    assert (amax > 448 * scale / 2**power).all()


def test_scales_at_the_ends():
    amax = jnp.array([0, 1e-45, 1e-30, 3e38, np.inf, np.nan], "float32")
    expected = [2.0**-60, 2.0**-60, 2.0**-60, 2.0**60, np.nan, np.nan]
    for power in (1, 2):
        np.testing.assert_array_equal(reference.scale_of(amax, power), np.array(expected, np.float32))


def matrix(rows: int, columns: int, dtype="bfloat16") -> jax.Array:
    """Rows and columns of unlike size, one of each 1e4 times as large, one of zeros."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal((rows, 1)))
    x[3] *= 1e4
    x[:, 5] *= 1e4
    x[1], x[:, 2] = 0, -0.0
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rows_and_columns(interleaved, dtype):
    x = matrix(64, 32, dtype)
    row, column = jax.jit(api.by_row)(x), jax.jit(lambda x: api.by_column(x, interleaved=interleaved))(x)
    exact = np.asarray(x, np.float32)
    for found, expected in (
        (row, exact),
        (column, np.asarray(contraction_order(jnp.asarray(exact), interleaved=interleaved)).T),
    ):
        amax = np.abs(expected).max(1)
        assert_same_eight_bits(
            found.values, (expected / np.asarray(found.scale)[:, None]).astype(ml_dtypes.float8_e4m3fn)
        )
        np.testing.assert_array_equal(found.scale, reference.scale_of(jnp.asarray(amax)))
        assert (
            np.abs(np.asarray(api.widen(found)) - expected)
            <= 2.0**-4 * np.abs(expected) + 2.0**-9 * amax[:, None] / 224
        ).all()


def test_what_is_not_finite_makes_its_row_nan_and_no_other():
    x = matrix(64, 32).at[7, 9].set(jnp.inf).at[11, 13].set(jnp.nan)
    for found, bad in ((api.by_row(x), (7, 11)), (api.by_column(x, interleaved=False), (9, 13))):
        nan = np.isnan(np.asarray(found.values, np.float32))
        np.testing.assert_array_equal(np.isnan(found.scale), nan.all(1))
        np.testing.assert_array_equal(np.flatnonzero(nan.any(1)), bad)
        assert nan[list(bad)].all()


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_come_neurons_first(axis):
    w = matrix(32, 64, "float32")
    found = api.weights(w if axis == 0 else w.T, axis=axis)
    assert_same_eight_bits(found.values, api.by_row(w).values)


def test_a_fold_has_one_scale_and_rounds_only_what_is_small():
    rng = np.random.default_rng(0)
    a = api.weights(matrix(32, 64, "float32"), axis=0)
    factor = jnp.asarray(2.0 ** rng.integers(-8, 8, 32), "float32")
    found = jax.jit(api.fold)(a, factor)
    expected = np.asarray(api.widen(a)) * np.asarray(factor)[:, None]
    assert found.scale.shape == ()
    assert_same_eight_bits(found.values, (expected.T / float(found.scale)).astype(ml_dtypes.float8_e4m3fn))
    exact = np.abs(expected.T) >= 2.0**-6 * float(found.scale)
    np.testing.assert_array_equal(np.asarray(api.widen(found))[exact], expected.T[exact])
    assert np.abs(np.asarray(found.values, np.float32)).max() > 224
    # A neuron without weights, whose factor is the largest, decides nothing.
    rows = api.Cast(a.values, a.scale.at[1].set(reference.scale_of(jnp.float32(0))))
    np.testing.assert_array_equal(api.fold(rows, factor.at[1].set(2.0**30)).scale, found.scale)


def test_dense_activations_and_their_gradient():
    rng = np.random.default_rng(0)
    y, dy2 = matrix(64, 32), jnp.asarray(rng.standard_normal((64, 32)), "bfloat16")
    scale = reference.scale_of(jnp.square(reference.largest(y, 0)), power=2)
    found = jax.jit(api.activate)(y, scale)
    y2 = np.square(np.maximum(np.asarray(y, np.float64), 0))
    assert_same_eight_bits(found.rows, (y2 / np.asarray(scale)).astype(np.float32).astype(ml_dtypes.float8_e4m3fn))
    assert_same_eight_bits(found.columns, np.asarray(found.rows).T)
    a = np.sqrt(np.asarray(found.rows, np.float32)).astype(ml_dtypes.bfloat16) * np.sqrt(np.asarray(scale, np.float64))
    dy1 = 2 * np.asarray(dy2, np.float64) * a
    gradient_scale = reference.scale_of(jnp.asarray(np.abs(dy1).max(0), "float32"))
    taken = jax.jit(api.differentiate)(dy2, found.columns, scale, gradient_scale)
    expected = (dy1 / np.asarray(gradient_scale)).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    assert_same_eight_bits(taken.rows, expected)
    assert_same_eight_bits(taken.columns, np.asarray(taken.rows).T)


@pytest.fixture
def emulated(monkeypatch):
    """implementation="hopper" runs the kernels' threads in numpy."""

    def launch(body, blocks, dtype, arrays, out, *, shared):
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        machine = word_machine.NumpyPermuteMachine
        name = jnp.dtype(dtype).name
        found = word_machine.run_blocks(body, blocks, name, arrays, out, shared=shared, machine=machine)
        return {name: jnp.asarray(array) for name, array in found.items()}

    monkeypatch.setattr(hopper, "launch", launch)
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)


def every_value(rows: int, columns: int, dtype="bfloat16") -> jax.Array:
    """`matrix` with ties between e4m3 values, inf, NaN, and what is subnormal in e4m3 under its row's scale."""
    rng = np.random.default_rng(columns)
    x = np.array(matrix(rows, columns, "float32"))
    ties = boundaries(ml_dtypes.float8_e4m3fn)
    x = np.where(rng.random(x.shape) < 0.3, rng.choice(ties, x.shape), x)
    x[13, 21], x[23, 29], x[31, 3] = np.inf, np.nan, -np.inf
    x[1], x[:, 2], x[40], x[45, 45] = 0, -0.0, 1e-30, 2.0**100
    return jnp.asarray(x, dtype)


def agree(function, *arguments):
    """The kernel against the reference, jitted: to the bit, but for the sign of NaN."""
    found = function(*arguments, implementation="hopper")
    expected = jax.jit(lambda *given: function(*given, implementation="reference"))(*arguments)
    for out, ref in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert out.shape == ref.shape
        if ref.dtype == jnp.float32:
            np.testing.assert_array_equal(out, ref)
        else:
            assert_same_eight_bits(out, ref)


def check_casts(rows: int, columns: int, dtype: str):
    x = every_value(rows, columns, dtype)
    agree(api.by_row, x)
    for interleaved in (True, False):
        agree(functools.partial(api.by_column, interleaved=interleaved), x)
        agree(functools.partial(api.both_ways, interleaved=interleaved), x)


def check_folded_and_dense(rows: int, columns: int):
    rng = np.random.default_rng(0)
    a = api.by_row(matrix(rows, columns, "float32"), implementation="reference")
    a = api.Cast(jnp.asarray(rng.integers(0, 256, a.values.shape), "uint8").view(a.values.dtype), a.scale)
    agree(api.fold, a, jnp.asarray(2.0 ** rng.integers(-30, 30, rows), "float32"))
    agree(api.fold, a, jnp.ones(rows, "float32").at[5].set(jnp.nan))
    y, dy2 = every_value(rows, columns), every_value(rows, columns)[::-1]
    squared = jnp.asarray(4.0 ** rng.integers(-6, 6, columns), "float32").at[3].set(jnp.nan)
    gradient = jnp.asarray(2.0 ** rng.integers(-20, 6, columns), "float32")
    agree(api.activate, y, squared)
    kept = jnp.asarray(rng.integers(0, 256, (columns, rows)), "uint8").view(a.values.dtype)
    agree(api.differentiate, dy2, kept, squared, gradient)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("rows", "columns", "dtype"), [(128, 192, "bfloat16"), (64, 2112, "float32")])
def test_emulated_casts(rows, columns, dtype):
    check_casts(rows, columns, dtype)


@pytest.mark.usefixtures("emulated")
def test_emulated_fold_and_dense_activations():
    check_folded_and_dense(128, 192)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (192, 320), (4096, 2048), (16448, 4096), (64, 8192)])
def test_hopper_casts(rows, columns, dtype):
    check_casts(rows, columns, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (192, 320), (4160, 2048)])
def test_hopper_fold_and_dense_activations(rows, columns):
    check_folded_and_dense(rows, columns)


@pytest.mark.gpu
def test_hopper_casts_by_xla():
    """XLA's own conversion on a GPU, which runs where no kernel does, rounds once too."""
    for dtype in EIGHT_BITS:
        v = boundaries(dtype)
        assert_same_eight_bits(jax.jit(reference.narrow, static_argnums=1)(v, dtype), v.astype(dtype))


def test_kernels_lower(monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)

    def everything(x, y, scale):
        rows, columns = api.by_row(x), api.by_column(x, interleaved=True)
        both = api.activate(y, scale)
        return columns, api.fold(rows, scale), api.differentiate(y, both.columns, scale, scale)

    x, y = (jax.ShapeDtypeStruct((256, 256), dtype) for dtype in ("float32", "bfloat16"))
    traced = jax.jit(everything).trace(x, y, jax.ShapeDtypeStruct((256,), jnp.float32))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 5


def test_no_root_lies_near_a_tie_of_bf16():
    """So that an approximate root, within 2^-22 of the exact one, rounds to the same bf16."""
    values = all_values(ml_dtypes.float8_e4m3fn)
    exact = np.sqrt(values[values > 0].astype(np.float64))
    for sign in (1, -1):
        moved = (exact * (1 + sign * 2.0**-21)).astype(np.float32).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(moved, exact.astype(np.float32).astype(ml_dtypes.bfloat16))


def test_rows_that_are_no_quarters_are_refused():
    with pytest.raises(ValueError, match="6 rows are no four quarters"):
        api.by_column(jnp.zeros((6, 16), jnp.bfloat16), interleaved=True)


@pytest.mark.usefixtures("emulated")
def test_sizes_and_types_that_the_kernels_do_not_take():
    for x in (jnp.zeros((64, 72), jnp.bfloat16), jnp.zeros((64, 64), jnp.float16)):
        with pytest.raises(NotImplementedError, match=rf"does not take {x.dtype}\[64, {x.shape[1]}\]"):
            api.by_column(x, interleaved=False, implementation="hopper")
        assert api.by_column(x, interleaved=False).values.shape == x.shape[::-1], "None takes what runs"
    with pytest.raises(NotImplementedError, match=r"does not take float32\[2, 8208\]"):
        api.by_row(jnp.zeros((2, 8208), jnp.float32), implementation="hopper")
