"""The loss by slices, and the gradient it makes while it has the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import assert_close
from train.cross_entropy import head_logits, weighted_cross_entropy

B, S, D, V = 2, 8, 16, 50
KEYS = jax.random.split(jax.random.key(0), 4)
HIDDEN, HEAD = jax.random.normal(KEYS[0], (B, S, D)), jax.random.normal(KEYS[1], (D, V))
LABELS = jax.random.randint(KEYS[2], (B, S), 0, V)
WEIGHTS = jax.random.uniform(KEYS[3], (B, S)).at[0, :3].set(0)


def plain(hidden, head):
    losses = optax.softmax_cross_entropy_with_integer_labels(head_logits(hidden, head), LABELS)
    return 3 * (losses * WEIGHTS).sum()


@pytest.mark.parametrize("slices", [1, 4])
def test_value_and_gradients_are_those_of_the_whole(slices):
    """Times 3, so that a backward which forgets its cotangent is found."""
    sliced = jax.jit(jax.value_and_grad(lambda h, w: 3 * weighted_cross_entropy(h, w, LABELS, WEIGHTS, slices), (0, 1)))
    (value, found), (expected_value, expected) = sliced(HIDDEN, HEAD), jax.value_and_grad(plain, (0, 1))(HIDDEN, HEAD)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    without_gradient = 3 * weighted_cross_entropy(HIDDEN, HEAD, LABELS, WEIGHTS, slices)
    np.testing.assert_allclose(without_gradient, expected_value, rtol=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, "float32")


def test_logits_of_all_positions_never_exist():
    """The largest array of value and gradient is a slice's logits, here an eighth of all."""
    head = jnp.zeros((4, 1000))
    hidden, labels = jnp.zeros((1, 800, 4)), jnp.zeros((1, 800), jnp.int32)
    grad = jax.grad(lambda h, w: weighted_cross_entropy(h, w, labels, jnp.ones((1, 800)), 8), (0, 1))
    memory = jax.jit(grad).lower(hidden, head).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * 800 * 1000
