"""beta, the three gradients through the soft threshold, and masks that are 2:4 along both axes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pack import reference as pack
from tests.helpers import assert_close
from venom_jax import Recipe, sparse_ffn, stats
from venom_jax.threshold import (
    optimal_scale,
    scaled_soft_threshold,
    sparse_weight,
    threshold_gradient,
    transposable_mask,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def test_scale_of_gaussian_weights():
    w = jax.random.normal(jax.random.key(0), (512, 1024))
    for axis in (0, 1):
        assert abs(float(optimal_scale(w, axis)) - 1.483) < 0.005


def test_scale_minimises_the_distance():
    w = jax.random.normal(jax.random.key(1), (32, 64))
    s = pack.soft_threshold(w, 0)
    beta = optimal_scale(w, 0)
    distance = [float(jnp.sum((w - b * s) ** 2)) for b in (0.99 * beta, beta, 1.01 * beta)]
    assert distance[1] < min(distance[0], distance[2])


def test_scale_of_nothing_is_one():
    assert optimal_scale(jnp.ones((8, 8)), 0) == 1  # equal magnitudes: S(w) = 0
    assert optimal_scale(jnp.zeros((8, 8)), 0) == 1


def test_straight_through_gradients():
    w = jax.random.normal(jax.random.key(2), (8, 12))
    g = jax.random.normal(jax.random.key(3), (8, 12))
    for mode, expected in (("ste", g), ("ste_scaled", 1.7 * g)):
        _, vjp = jax.vjp(lambda w, mode=mode: scaled_soft_threshold(w, jnp.float32(1.7), 0, mode), w)
        assert_close(vjp(g)[0], expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_exact_gradient_by_finite_differences(axis):
    with jax.enable_x64(True):
        w, g, direction = (jax.random.normal(jax.random.key(i), (16, 24), jnp.float64) for i in (4, 5, 6))
        beta = jnp.float64(1.4)

        def inner(step):
            return jnp.vdot(g, beta * pack.soft_threshold(w + step * direction, axis))

        step = 1e-7  # random entries are further apart than this, so no threshold changes hands
        expected = (inner(step) - inner(-step)) / (2 * step)
        exact = threshold_gradient(w, g, beta, axis, "exact")
        np.testing.assert_allclose(jnp.vdot(exact, direction), expected, rtol=1e-7)
        _, vjp = jax.vjp(lambda w: scaled_soft_threshold(w, beta, axis, "exact"), w)
        assert_close(vjp(g)[0], exact, "float64")


def test_exact_gradient_by_hand():
    w = jnp.array([[1.0, -2.0, 3.0, -4.0], [2.0, -2.0, 5.0, 2.0]])  # t = 2 at index 1; t = 2 at indices 0, 1, 3
    g = jnp.array([[10.0, 20.0, 30.0, 40.0], [1.0, 2.0, 3.0, 4.0]])
    # Row 0 keeps 3 (sign +) and -4 (sign -); entry 1 sets t: -beta * sign(-2) * (30 - 40).
    # Row 1 keeps 5; of the equals 0, 1 and 3 the highest index sets t: -beta * sign(2) * 3.
    expected = 2 * jnp.array([[0.0, -10.0, 30.0, 40.0], [0.0, 0.0, 3.0, -3.0]])
    np.testing.assert_allclose(threshold_gradient(w, g, jnp.float32(2), 1, "exact"), expected)


def test_transposable_masks_are_24_both_ways_and_keep_the_most():
    w = jax.random.normal(jax.random.key(5), (2, 8, 12))
    mask = np.asarray(transposable_mask(w))
    for layer, kept in zip(np.abs(np.asarray(w)), mask, strict=True):
        assert (kept.reshape(8, 3, 4).sum(2) == 2).all()
        assert (kept.T.reshape(12, 2, 4).sum(2) == 2).all()
        for i, j in itertools.product(range(0, 8, 4), range(0, 12, 4)):
            block, best = layer[i : i + 4, j : j + 4], 0.0
            for columns in itertools.product(itertools.combinations(range(4), 2), repeat=4):
                if all(sum(column in pair for pair in columns) == 2 for column in range(4)):
                    best = max(best, sum(block[row, list(pair)].sum() for row, pair in enumerate(columns)))
            assert block[kept[i : i + 4, j : j + 4]].sum() == pytest.approx(best, rel=1e-6)
    np.testing.assert_array_equal(transposable_mask(w[0].T), mask[0].T)
    assert optimal_scale(w[0], 0, "transposable") == pytest.approx(1.0, rel=1e-6)


def test_transposable_masks_keep_infinite_weights_and_refuse_odd_sizes():
    w = jnp.ones((4, 4)).at[1, 2].set(-jnp.inf).at[3, 0].set(jnp.nan)
    kept = np.asarray(transposable_mask(w))
    assert kept[1, 2]
    assert kept[3, 0]
    assert float(sparse_weight(w, 0, "transposable")[1, 2]) == -np.inf
    with pytest.raises(ValueError, match=r"\[8, 6\] do not split"):
        transposable_mask(jnp.ones((8, 6)))


def test_products_both_ways_read_the_same_masked_weight():
    """y1 and dx of a layer with transposable masks are those of a dense layer with the masked W1."""
    recipe = Recipe(weights=("y1", "dx"), weight_mask="transposable")
    keys = jax.random.split(jax.random.key(6), 4)
    x, dy = (jax.random.normal(key, (16, 8)) for key in keys[:2])
    w1, w2 = jax.random.normal(keys[2], (8, 16)), jax.random.normal(keys[3], (16, 8))
    masked = sparse_weight(w1, 0, "transposable")
    y, pull = jax.vjp(lambda x: sparse_ffn(x, w1, w2, recipe=recipe), x)
    expected, dense_pull = jax.vjp(lambda x: sparse_ffn(x, masked, w2, recipe=Recipe()), x)
    assert_close(y, expected)
    assert_close(pull(dy)[0], dense_pull(dy)[0])
    assert float(jnp.abs(y - sparse_ffn(x, w1, w2, recipe=Recipe(weights=("y1", "dx")))).max()) > 0.1
    masks = stats.weight_masks(w1, w2, "transposable")
    np.testing.assert_array_equal(masks.w1, np.packbits(np.asarray(masked) != 0))
    with pytest.raises(ValueError, match="is the soft threshold's"):
        Recipe(weight_mask="transposable", threshold_grad="exact")
    with pytest.raises(ValueError, match="is no multiple of 4"):
        recipe.check(6, 8)
