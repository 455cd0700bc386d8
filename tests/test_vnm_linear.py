"""VNMLinear: its product and both gradients against dense autodiff, the held mask, linen, and bad input."""

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import venom_jax.linen
from tests.helpers import assert_close
from venom_jax import VNM, Pattern, Sparse24, VNMLinear, prune, vnm_linear, vnm_matmul
from venom_jax import vnm as layers

P = Pattern(v=64, m=Fraction(8))


def layer(gradient: Any = "masked") -> VNMLinear:
    return VNMLinear(32, 72, pattern=P, gradient=gradient, rngs=nnx.Rngs(0))


X = jax.random.normal(jax.random.key(1), (3, 5, 32))
TARGET = jax.random.normal(jax.random.key(2), (3, 5, 72))


@pytest.mark.parametrize("gradient", ["masked", "ste"])
def test_product_and_gradients_are_those_of_the_masked_weight(gradient):
    made = layer(gradient)
    w, mask = made.w[...], made.packed().mask().T
    assert int(mask.sum()) == 72 * 32 // 4
    graphdef, params, rest = nnx.split(made, nnx.Param, ...)

    @jax.jit
    def value_and_grads(x, params):
        return jax.value_and_grad(lambda x, p: ((nnx.merge(graphdef, p, rest)(x) - TARGET) ** 2).sum(), (0, 1))(
            x, params
        )

    def plain(x, w):
        return ((x @ w - TARGET) ** 2).sum()

    value, (dx, dparams) = value_and_grads(X, params)
    wanted, (dx_wanted, dw_wanted) = jax.value_and_grad(plain, (0, 1))(X, w * mask)
    assert_close(value, wanted)
    assert_close(dx, dx_wanted)
    dw = dparams["w"][...]
    assert_close(dw, dw_wanted * mask if gradient == "masked" else dw_wanted)
    assert bool((dw[~mask] == 0).all()) == (gradient == "masked")


def test_the_places_are_held_until_pruned_again():
    made = layer()
    before = made.packed()
    made.w[...] = jax.random.normal(jax.random.key(3), made.w[...].shape)
    held = made.packed()
    np.testing.assert_array_equal(held.columns, before.columns)
    np.testing.assert_array_equal(held.metadata, before.metadata)
    np.testing.assert_array_equal(held.to_dense(), jnp.where(before.mask(), made.w[...].T, 0))
    made.prune(columns="energy")
    np.testing.assert_array_equal(made.packed().to_dense(), prune.vnm(made.w[...].T, P, columns="energy").to_dense())
    assert (np.asarray(made.packed().columns) != np.asarray(before.columns)).any()


def test_in_half_precision_masters_stay_in_full():
    made = layer()
    y = made(X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert made.w[...].dtype == jnp.float32
    exact = X @ (made.w[...] * made.packed().mask().T)
    assert_close(y, exact, "bfloat16")


def test_a_stored_matrix_multiplies_any_number_of_columns():
    packed = prune.vnm(jax.random.normal(jax.random.key(4), (72, 64)), Pattern(v=64, m=Fraction(4)))
    b = jax.random.normal(jax.random.key(5), (64, 5))
    wanted = np.asarray(packed.to_dense(), np.float64) @ np.asarray(b, np.float64)
    assert_close(vnm_matmul(packed, b), wanted)
    assert_close(vnm_matmul(packed, b, transpose_out=True), wanted.T)


def test_plain_24_is_handed_over_where_the_caller_keeps_it(monkeypatch):
    """The dispatcher takes the faster of the two forms; with m = 4 the stored matrix is both."""
    handed, original = [], layers.vnm
    monkeypatch.setattr(layers, "vnm", lambda *a, as_24, **options: handed.append(as_24) or original(*a, **options))
    b = jax.random.normal(jax.random.key(5), (64, 8))
    for m in (4, 8):
        packed = prune.vnm(jax.random.normal(jax.random.key(4), (72, 64)), Pattern(v=64, m=Fraction(m)))
        plain = packed.to_sparse24()
        np.testing.assert_array_equal(vnm_matmul(packed, b), vnm_matmul(packed, b, as_24=plain))
        alone, given = handed[-2:]
        assert given[0] is plain.values
        assert (alone is None) == (m != 4)
    with pytest.raises(ValueError, match=r"as_24 is \(64, 72\) along axis 0; the stored matrix is \(72, 64\), axis 1"):
        vnm_matmul(packed, b, as_24=Sparse24.pack(packed.to_dense().T, axis=0))


def test_linen_has_the_same_layer():
    module: Any = venom_jax.linen.VNMLinear(72, pattern=P)
    variables: Any = module.init(jax.random.key(0), X)
    assert set(variables) == {"params", "Method"}
    y = module.apply(variables, X)
    held = VNM(None, variables["Method"]["metadata"], variables["Method"]["columns"], (72, 32), P)
    np.testing.assert_array_equal(y.reshape(-1, 72), vnm_linear(X.reshape(-1, 32), variables["params"]["w"], held))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"72 x 30 does not split into blocks of pattern.m = 8"):
        VNMLinear(30, 72, pattern=P, rngs=nnx.Rngs(0))
    made = layer()
    with pytest.raises(Exception, match=r"gradient = 'dense': use one of 'ste', 'masked'|Type-check"):
        layer("dense")
    with pytest.raises(
        ValueError, match=r"a VNM of shape \(72, 32\) for weights \(32, 64\); it stores w\^T, \(64, 32\)"
    ):
        vnm_linear(X[0], made.w[:, :64], made.packed())
    with pytest.raises(ValueError, match=r"b of shape \(16, 8\) has 16 rows; the stored matrix is \(72, 32\)"):
        vnm_matmul(made.packed(), jnp.zeros((16, 8)))
    with pytest.raises(Exception, match=r"b of shape \(32,\) is no matrix|Type-check"):
        vnm_matmul(made.packed(), jnp.zeros(32))
    with pytest.raises(NotImplementedError, match="compute capability"):
        made(X, implementation="hopper")


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [Pattern(v=64, m=Fraction(16)), Pattern(v=128, m=Fraction(8))], ids=str)
def test_on_a_hopper_gpu_the_layer_is_the_reference(pattern):
    made = VNMLinear(1024, 520, pattern=pattern, rngs=nnx.Rngs(0))
    held, w = made.packed(), made.w[...]
    x = jax.random.normal(jax.random.key(1), (331, 1024)).astype(jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(2), (331, 520)).astype(jnp.bfloat16)

    def both(implementation):
        y, pull = jax.vjp(lambda x, w: vnm_linear(x, w, held, implementation=implementation), x, w)
        return y, *pull(dy)

    for found, wanted in zip(both("hopper"), both("reference"), strict=True):
        assert_close(found, wanted, "bfloat16")
