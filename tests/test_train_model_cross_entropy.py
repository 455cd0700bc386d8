"""The loss by slices, and the gradient it makes while it has the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import assert_close
from train.model.cross_entropy import head_logits, weighted_cross_entropy

B, S, D, V = 2, 8, 16, 50
KEYS = jax.random.split(jax.random.key(0), 4)
HIDDEN, HEAD = jax.random.normal(KEYS[0], (B, S, D)), jax.random.normal(KEYS[1], (D, V))
LABELS = jax.random.randint(KEYS[2], (B, S), 0, V)
WEIGHTS = jax.random.uniform(KEYS[3], (B, S)).at[0, :3].set(0)


def plain(hidden, head, z_loss):
    logits = head_logits(hidden, head)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    losses += z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return 3 * (losses * WEIGHTS).sum()


@pytest.mark.parametrize(("slices", "z_loss"), [(1, 0.0), (4, 0.0), (4, 0.1)])
def test_value_and_gradients_are_those_of_the_whole(slices, z_loss):
    """Times 3, so that a backward which forgets its cotangent is found."""

    def loss(hidden, head):
        return 3 * weighted_cross_entropy(hidden, head, LABELS, WEIGHTS, slices, z_loss)

    value, found = jax.jit(jax.value_and_grad(loss, (0, 1)))(HIDDEN, HEAD)
    expected_value, expected = jax.value_and_grad(plain, (0, 1))(HIDDEN, HEAD, z_loss)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    without_gradient = loss(HIDDEN, HEAD)
    np.testing.assert_allclose(without_gradient, expected_value, rtol=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, "float32")


def test_logits_for_evaluation_are_not_rounded():
    hidden, head = (np.asarray(t.astype(jnp.bfloat16), np.float64) for t in (HIDDEN, HEAD))
    found = head_logits(HIDDEN.astype(jnp.bfloat16), HEAD)
    np.testing.assert_allclose(found, hidden @ head, rtol=1e-4, atol=1e-5)


def test_logits_of_all_positions_never_exist():
    """The largest array of value and gradient is a slice's logits, here an eighth of all."""
    head = jnp.zeros((4, 1000))
    hidden, labels = jnp.zeros((1, 800, 4)), jnp.zeros((1, 800), jnp.int32)
    grad = jax.grad(lambda h, w: weighted_cross_entropy(h, w, labels, jnp.ones((1, 800)), 8), (0, 1))
    memory = jax.jit(grad).lower(hidden, head).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * 800 * 1000
