"""The unbiased pruning along tokens: never more than two of four, the right mean, the variance that was promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from venom_jax import Recipe, packed_ffn, router, sparse_ffn
from venom_jax.mvue import key_of_bits, unbiased24

DRAWS = 4000


@pytest.fixture(scope="module")
def drawn():
    """(x [8, 5], draws [DRAWS, 8, 5]): spread, one large, two alone, one alone and zeros, in one column each."""
    columns = [[1, 2, 3, 4], [0.1, -10, 0.2, 0.3], [0, -3, 0, 5], [0, 0, -7, 0], [0, 0, 0, 0]]
    x = jnp.array(columns, jnp.float32).T
    x = jnp.concatenate([x, -x[::-1]])
    draws = jax.jit(jax.vmap(unbiased24, (None, 0)))(x, jax.random.split(jax.random.key(0), DRAWS))
    return np.asarray(x), np.asarray(draws)


def test_at_most_two_of_four_survive(drawn):
    _, draws = drawn
    counts = (draws.reshape(DRAWS, 2, 4, -1) != 0).sum(axis=2)
    assert counts.max() == 2
    assert (counts[..., 0] == 2).all(), "two places, always taken"


def test_the_mean_is_kept_and_the_variance_is_the_least(drawn):
    """Of an entry x with probability p the variance is x^2 (1 / p - 1)."""
    x, draws = drawn
    size = np.abs(x.reshape(2, 4, -1))
    total, largest = size.sum(1, keepdims=True), size.max(1, keepdims=True)
    capped = 2 * largest > total
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.where(capped, np.where(size == largest, 1, size / (total - largest)), 2 * size / total)
    p = np.nan_to_num(p, nan=1.0).clip(1e-9, 1).reshape(x.shape)
    variance = np.where(x == 0, 0, x**2 * (1 / p - 1))
    error = np.abs(draws.mean(0) - x)
    assert (error <= 5 * np.sqrt(variance / DRAWS) + 1e-6).all()
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.2, atol=1e-5)


def test_two_or_fewer_are_kept_as_they_are(drawn):
    x, draws = drawn
    np.testing.assert_allclose(draws[:, :, 2:], np.broadcast_to(x[:, 2:], (DRAWS, 8, 3)), rtol=1e-6)


def test_what_is_not_finite_stays_visible():
    x = jnp.array([[1.0, 1], [jnp.nan, 2], [3, jnp.inf], [4, 4]])
    np.testing.assert_array_equal(jax.jit(unbiased24)(x, jax.random.key(0)), x)


def test_keys_differ_and_repeat():
    x = jnp.ones((4, 4))
    same, other = key_of_bits(x), key_of_bits(x.at[0, 0].add(1e-6))
    assert same == key_of_bits(x)
    assert same != other


def test_weight_gradients_have_the_dense_ones_as_their_mean():
    """Another scale of dy3, divided out again, changes the draw and, but for rounding, nothing else."""
    recipe = Recipe(wgrad="mvue", experts=2)
    keys = jax.random.split(jax.random.key(1), 4)
    x, w1, w2, dy3 = (
        jax.random.normal(key, shape) for key, shape in zip(keys, [(64, 8), (8, 16), (16, 8), (64, 8)], strict=True)
    )
    route = router.route(x, w1, recipe)

    def gradients(recipe, scale):
        def loss(w1, w2):
            return jnp.vdot(sparse_ffn(x, w1, w2, route, recipe=recipe, implementation="reference"), dy3 * scale)

        return jax.tree.map(lambda g: g / scale, jax.grad(loss, (0, 1))(w1, w2))

    exact = jax.jit(lambda: gradients(Recipe(experts=2), 1.0))()
    found = jax.jit(lambda scales: jax.lax.map(lambda s: gradients(recipe, s), scales))(1 + jnp.arange(400) / 400)
    for one, many in zip(exact, found, strict=True):
        spread = many.std(axis=0)
        assert (spread > 0).mean() > 0.9, "the draws differ"
        assert (jnp.abs(many.mean(axis=0) - one) <= 5 * spread / jnp.sqrt(400) + 1e-4).all()


def test_the_kernels_refuse_it():
    assert packed_ffn.unsupported(Recipe.act24(wgrad="mvue"), 64, 64) == "wgrad = 'mvue' runs in the reference only"
