"""SparseMLP with a gate, another activation, biases and dropout, through phases too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from tests.helpers import assert_close, relative_error
from venom_jax import Method, Recipe, SparseMLP, phases

D, F = 32, 128
X = jax.random.normal(jax.random.key(0), (64, D))


def layer(**options) -> Any:
    made = SparseMLP(D, F, max_experts=4, rngs=nnx.Rngs(0), **options)
    for bias in (made.b1, made.b_up, made.b2):
        if bias is not None:
            bias[...] = jax.random.normal(jax.random.key(1), bias.shape) / 4
    return made


@pytest.mark.parametrize("activation", ["relu2", "relu", "relu2_clamped"])
def test_gated_with_biases(activation):
    made = layer(gated=True, activation=activation, use_bias=True, clamp=1.0)
    a = jax.nn.relu(X @ made.w1[...] + made.b1[...])
    phi = {"relu": a, "relu2": a**2, "relu2_clamped": jnp.tanh(a) ** 2}[activation]
    expected = (phi * (X @ made.up[...] + made.b_up[...])) @ made.w2[...] + made.b2[...]
    assert_close(made(X), expected)
    y, stats = made(X, recipe=Recipe.act24(), return_stats=True)
    assert 0.05 < relative_error(y, expected) < 0.7
    np.testing.assert_allclose(stats.density, (a > 0).mean(), rtol=1e-6)


def test_dropout_only_where_a_key_is_given():
    made = layer(dropout=0.5)
    assert_close(made(X), layer()(X))
    dropped = made(X, dropout_key=jax.random.key(0))
    assert relative_error(dropped, layer()(X)) > 0.1
    np.testing.assert_array_equal(dropped, made(X, dropout_key=jax.random.key(0)))


@pytest.mark.parametrize("use_bias", [False, True])
def test_phases_leave_the_function(use_bias):
    """Clustering permutes all that a neuron has; baking takes up with W1, by its own scale."""
    made = layer(gated=True, use_bias=use_bias)
    graph, params, method = nnx.split(made, nnx.Param, Method)

    def apply(found, recipe):
        return nnx.merge(graph, found.params, found.method)(X, recipe=recipe)

    routed = phases.transition(params, method, [], Recipe(), Recipe(experts=4, top_k=4), seed=0)
    assert not np.array_equal(jax.tree.leaves(routed.params["w1"])[0], made.w1[...])
    assert_close(apply(routed, Recipe()), made(X))
    sparse = phases.transition(routed.params, routed.method, [], Recipe(experts=4, top_k=4), Recipe.all24(), seed=0)
    scales = nnx.merge(graph, sparse.params, sparse.method)
    assert 1.2 < scales.beta_up[...] < 1.8
    assert scales.beta_up[...] != scales.beta[...][0]
    baked = phases.transition(sparse.params, sparse.method, [], Recipe.all24(), Recipe.act24(), seed=0)
    assert_close(apply(baked, Recipe.act24()), apply(sparse, Recipe.all24()))


def test_bad_activation_is_named():
    with pytest.raises((ValueError, TypeCheckError), match="activation"):  # the annotation comes first under pytest
        layer(activation="silu")
