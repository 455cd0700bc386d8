"""Dense projections in eight bits: against numpy with the same casts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from tests import brute_force8
from tests.helpers import relative_error
from venom_jax import fp8

D, N = 64, 96


def inputs(*leading, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(1), 3)
    x, dy = (
        jax.random.normal(key, (*leading, size), jnp.float32).astype(dtype)
        for key, size in ((keys[0], D), (keys[1], N))
    )
    return x, jax.random.normal(keys[2], (D, N)) / D**0.5, dy


@functools.partial(jax.jit, static_argnames=("implementation", "packed"))
def run(x, w, dy, implementation=None, packed=False):
    weight = fp8.pack_linear(w, implementation=implementation) if packed else None
    y, vjp = jax.vjp(lambda x, w: fp8.linear(x, w, weight, implementation=implementation), x, w)
    return y, *vjp(dy)


def expected(x, w, dy):
    """y, dx, dw of matrices."""
    x, w, dy = (np.asarray(t, np.float64) for t in (x, w, dy))
    (x_row, _), (x_column, _), (dy_row, _), (dy_column, _) = (brute_force8.over(t, i) for t in (x, dy) for i in (0, 1))
    return x_row @ brute_force8.over(w, 1)[0], dy_row @ brute_force8.over(w, 0)[0].T, x_column.T @ dy_column


@pytest.mark.parametrize("tokens", [1, 48])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_against_numpy(tokens, dtype):
    x, w, dy = inputs(tokens, dtype=dtype)
    x = (x * jnp.arange(1, D + 1, dtype=dtype)).at[0].multiply(100)
    outputs = run(x, w, dy)
    assert [t.dtype for t in outputs] == [dtype, dtype, jnp.float32]
    for out, ref in zip(outputs, expected(x, w, dy), strict=True):
        assert relative_error(out, ref) < (2e-3 if dtype == jnp.bfloat16 else 2e-6)
    for out, ref in zip(run(x, w, dy, packed=True), outputs, strict=True):
        np.testing.assert_array_equal(out, ref)


def test_error_against_the_product_itself():
    x, w, dy = inputs(512)
    y, vjp = jax.vjp(lambda x, w: x @ w.astype(x.dtype), x, w)
    for out, ref in zip(run(x, w, dy), (y, *vjp(dy)), strict=True):
        assert 0.03 < relative_error(out, ref) < 0.04, "two casts of 2.6 % each"


def test_leading_axes_remat_scan_and_vmap():
    x, w, dy = inputs(2, 3, 16, dtype=jnp.float32)
    flat = run(x.reshape(96, D), w, dy.reshape(96, N))
    for out, ref in zip(run(x, w, dy), flat, strict=True):
        np.testing.assert_array_equal(out.reshape(ref.shape), ref)

    def loss(x, w):
        return jnp.vdot(fp8.linear(x, w), dy[0, 0])

    def scanned(x, w):
        return jax.lax.scan(lambda t, _: (t + jax.checkpoint(loss)(x, w), None), 0.0, length=2)[0] / 2

    def mapped(x, w):
        return jax.vmap(loss, (0, None))(jnp.stack([x, x]), w).mean()

    exact = jax.grad(loss, (0, 1))(x[0, 0], w)
    for function in (scanned, mapped):
        for out, ref in zip(jax.jit(jax.grad(function, (0, 1)))(x[0, 0], w), exact, strict=True):
            assert relative_error(out, ref) < 2e-6


def test_nan_stays_with_its_token():
    x, w, dy = inputs(48)
    clean, spoilt = run(x, w, dy), run(x.at[5, 3].set(jnp.nan), w, dy)
    others = np.arange(48) != 5
    assert np.isnan(np.asarray(spoilt[0][5], np.float32)).all()
    np.testing.assert_array_equal(*(np.asarray(t[0], np.float32)[others] for t in (spoilt, clean)))
    assert np.isnan(spoilt[2]).any()


def test_bad_input_is_named(monkeypatch):
    x, w, _ = inputs(48)
    with pytest.raises(ValueError, match=r"\(48, 64\) and w \(96, 64\) do not fit: x ends in 64, w begins with 96"):
        fp8.linear(x, w.T)
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0"):
        fp8.linear(x, w, implementation="hopper")
    monkeypatch.setattr(device, "hopper_available", lambda: True)
    with pytest.raises(ValueError, match="N=90 must be a positive multiple of 16"):
        fp8.linear(x, w[:, :90], implementation="hopper")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 2048])
def test_hopper_against_reference(tokens):
    x, w, dy = inputs(tokens)
    for out, ref in zip(run(x, w, dy, "hopper"), run(x, w, dy, "reference"), strict=True):
        assert relative_error(out, ref) < 3e-3
