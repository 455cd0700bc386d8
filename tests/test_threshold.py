"""beta, and the three gradients through the soft threshold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pack import reference as pack
from tests.helpers import assert_close
from venom_jax.threshold import optimal_scale, scaled_soft_threshold, threshold_gradient

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
