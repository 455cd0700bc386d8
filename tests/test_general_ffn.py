"""Gated layers, other activations, biases, dropout and weighted experts: the reference, and the form of the kernels."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_close, relative_error
from venom_jax import Recipe, sparse_ffn
from venom_jax.ffn_parts import Weights
from venom_jax.general_ffn import _form, _layer, feed_forward, pack_weights
from venom_jax.nonlinearity import value

D, F, T = 64, 256, 130
BETA, BETA_UP = jnp.array([1.5, 1.3, 1.6, 1.2], jnp.float32), jnp.float32(1.4)


def inputs(tokens=T, *, gated=True, biases=False, d_model=D, d_ffn=F, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 7)
    x, dy = (jax.random.normal(key, (tokens, d_model), dtype) for key in keys[:2])
    w1, up = (jax.random.normal(key, (d_model, d_ffn)) / d_model**0.5 for key in keys[2:4])
    w2 = jax.random.normal(keys[4], (d_ffn, d_model)) / d_ffn**0.5
    b1, b_up = (jax.random.normal(key, (d_ffn,)) for key in keys[5:7])
    weights = Weights(w1, w2, up if gated else None, b1 if biases else None, b_up if biases and gated else None)
    return x, weights, dy


def routed(tokens, recipe, seed=1):
    """Experts of each token and their weights, or None twice."""
    if not recipe.routed:
        return None, None
    keys = jax.random.split(jax.random.key(seed), 2)
    _, route = jax.lax.top_k(jax.random.normal(keys[0], (tokens, recipe.experts)), recipe.top_k)
    return jnp.sort(route, axis=1).astype(jnp.int32), jax.random.uniform(keys[1], route.shape) + 0.1


@functools.partial(jax.jit, static_argnames=("recipe", "kernels", "activation", "dropout", "clamp"))
def run(x, weights, dy, recipe, kernels=None, activation="relu2", dropout=0.0, clamp=1.0):
    route, p = routed(len(x), recipe)
    key = jax.random.key(7) if dropout else None
    form = _form(x, weights, route, p, recipe, activation, clamp, dropout, key, "reference", None)
    form = dataclasses.replace(form, kernels=kernels)
    data = None if key is None else jax.random.key_data(key)

    def apply(x, weights, p):
        return _layer(form, x, weights, p, BETA, BETA_UP, None, route, data)

    (y, density), vjp = jax.vjp(apply, x, weights, p)
    dx, found, dp = vjp((dy, jnp.zeros_like(density)))
    return y, density, dx, dp, *found


def dense(x, weights, p, route, recipe, activation: Any = "relu2", clamp=1.0):
    """The layer without any sparsity but the route, by a loop over the experts."""
    experts = recipe.experts
    y = 0.0
    for e in range(experts):
        own = slice(e * weights.w1.shape[1] // experts, (e + 1) * weights.w1.shape[1] // experts)

        def part(w, own=own):
            return None if w is None else w[..., own]

        g = x @ part(weights.w1) + (0 if weights.b1 is None else part(weights.b1))
        a = jax.nn.relu(g)
        a = clamp * jnp.tanh(a / clamp) if activation == "relu2_clamped" else a
        h = value(a, activation)
        if weights.up is not None:
            h = h * (x @ part(weights.up) + (0 if weights.b_up is None else part(weights.b_up)))
        chosen = 1.0 if p is None else jnp.sum(jnp.where(route == e, p, 0), axis=1, keepdims=True)
        y = y + chosen * (h @ weights.w2[own])
    return y


ROUTING = Recipe(experts=4, top_k=2)


@pytest.mark.parametrize("activation", ["relu2", "relu", "relu2_clamped"])
@pytest.mark.parametrize(
    ("gated", "biases", "recipe"),
    [(True, True, Recipe()), (False, True, ROUTING), (True, True, ROUTING), (True, False, ROUTING)],
)
def test_dense_gradients_are_those_of_autodiff(gated, biases, recipe, activation):
    """In f64, with nothing pruned: every gradient, the weights of the experts' among them."""
    with jax.enable_x64(True):
        x, weights, dy = jax.tree.map(lambda t: t.astype(jnp.float64), inputs(gated=gated, biases=biases))
        route, p = routed(len(x), recipe)
        found = run(x, weights, dy, recipe, activation=activation)
        y, vjp = jax.vjp(lambda x, w, p: dense(x, w, p, route, recipe, activation), x, weights, p)
        dx, gradient, dp = vjp(dy)
        expected = (y, dx, dp, *gradient)
        for out, ref in zip((found[0], *found[2:]), expected, strict=True):
            if ref is not None:
                assert relative_error(out, ref) < 1e-6  # p and the biases enter in f32


def test_finite_differences_of_a_gate():
    with jax.enable_x64(True):
        x, weights, dy = jax.tree.map(lambda t: t.astype(jnp.float64), inputs(40))
        _, _, dx, _, dw1, dw2, dup, *_ = run(x, weights, dy, Recipe())

        def loss(x, weights):
            return jnp.vdot(dense(x, weights, None, None, Recipe()), dy)

        directions = [jax.random.normal(jax.random.key(i), t.shape, t.dtype) for i, t in enumerate((x, *weights[:3]))]
        step = 1e-6
        ends = []
        for sign in (1, -1):
            moved = [t + sign * step * d for t, d in zip((x, *weights[:3]), directions, strict=True)]
            ends.append(loss(moved[0], Weights(*moved[1:])))
        found = sum(jnp.vdot(g, d) for g, d in zip((dx, dw1, dw2, dup), directions, strict=True))
        np.testing.assert_allclose(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-6)


def test_lossless_gate_equals_dense():
    """At most two gates of four are open, along neurons and along interleaved tokens: pruning removes nothing."""
    x, weights, dy = inputs(128)
    weights = weights._replace(w1=jnp.where((jnp.arange(F) % 4 < 2)[None, :], weights.w1, 0.0))
    x = jnp.where((jnp.arange(128) < 64)[:, None], x, 0.0)
    with jax.default_matmul_precision("highest"):
        found = run(x, weights, dy, Recipe.act24())
        y, vjp = jax.vjp(lambda x, w: dense(x, w, None, None, Recipe()), x, weights)
        dx, gradient = vjp(dy)
    for out, ref in zip((found[0], found[2], *found[4:7]), (y, dx, *gradient[:3]), strict=True):
        assert_close(out, ref)


CASES = {
    "gated act24": (Recipe.act24(), {}),
    "gated all24": (Recipe.all24(), {}),
    "gated relu, features only": (Recipe(activations=True), {"activation": "relu"}),
    "gated clamped": (Recipe.act24(), {"activation": "relu2_clamped"}),
    "gated, tokens only": (Recipe(wgrad="24"), {"activation": "relu2_clamped"}),
    "gated, biases and dropout": (Recipe.act24(), {"biases": True, "dropout": 0.25}),
    "gated experts": (Recipe.act24(experts=4, top_k=2), {}),
    "gated experts, weights 2:4": (Recipe.all24(experts=4, top_k=2), {"biases": True}),
    "gated experts, dense": (ROUTING, {"dropout": 0.25}),
    "experts act24": (Recipe.act24(experts=4, top_k=2), {"gated": False}),
    "experts all24": (Recipe.all24(experts=4, top_k=1), {"gated": False}),
    "experts, dense": (ROUTING, {"gated": False, "activation": "relu2_clamped"}),
    "experts clamped": (Recipe.act24(experts=4, top_k=2), {"gated": False, "activation": "relu2_clamped"}),
    "relu act24": (Recipe.act24(), {"gated": False, "activation": "relu"}),
    "relu, features only": (Recipe(activations=True), {"gated": False, "activation": "relu"}),
    "biases and dropout": (Recipe.act24(), {"gated": False, "biases": True, "dropout": 0.25}),
}


def check_forms(name, kernels, dtype, tokens=T, d_model=D, d_ffn=F):
    recipe, options = CASES[name]
    options = dict(options)
    made = {key: options.pop(key) for key in ("gated", "biases") if key in options}
    x, weights, dy = inputs(tokens, d_model=d_model, d_ffn=d_ffn, dtype=dtype, **made)
    with jax.default_matmul_precision("highest"):
        expected = run(x, weights, dy, recipe, "reference" if kernels == "hopper" else None, **options)
        found = run(x, weights, dy, recipe, kernels, **options)
    for out, ref in zip(found, expected, strict=True):
        if ref is not None:
            assert_close(out, ref, dtype)


@pytest.mark.parametrize("name", CASES)
def test_packed_form_equals_masked_form(name):
    check_forms(name, "reference", jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [100, 2048])
@pytest.mark.parametrize("name", CASES)
def test_hopper_against_reference_kernels(name, tokens):
    check_forms(name, "hopper", jnp.bfloat16, tokens, 256, 1024)


@pytest.mark.parametrize("recipe", [Recipe.all24(), Recipe.venom(4, 2)], ids=["all24", "venom"])
def test_without_options_it_is_the_plain_layer(recipe):
    x, weights, dy = inputs(gated=False)
    route, _ = routed(len(x), recipe)
    plain = functools.partial(sparse_ffn, route=route, beta=BETA, recipe=recipe, return_density=True)

    def general(x, w1, w2):
        return feed_forward(x, Weights(w1, w2), route, None, BETA, recipe=recipe, return_density=True)

    results = []
    for layer in (plain, general):
        y, vjp, density = jax.vjp(layer, x, weights.w1, weights.w2, has_aux=True)
        results.append((y, density, *vjp(dy)))
    for out, ref in zip(*results, strict=True):
        assert_close(out, ref)


def test_packed_weights_give_the_same_numbers():
    x, weights, _ = inputs()
    packed = pack_weights(weights, BETA, BETA_UP, dtype=x.dtype)
    apply = functools.partial(feed_forward, x, weights, None, None, BETA, BETA_UP, recipe=Recipe.all24())
    np.testing.assert_array_equal(apply(packed=packed), apply())


def test_dropout_keeps_the_expectation_and_needs_a_key():
    x, weights, _ = inputs(64, gated=False)
    apply = jax.jit(lambda key: feed_forward(x, weights, recipe=Recipe(), dropout=0.5, key=key))
    mean = sum(apply(jax.random.key(i)) for i in range(200)) / 200
    assert relative_error(mean, feed_forward(x, weights, recipe=Recipe())) < 0.1
    with pytest.raises(ValueError, match=r"dropout = 0.5 draws a mask: give key"):
        feed_forward(x, weights, recipe=Recipe(), dropout=0.5)


def test_bad_input_is_named():
    x, weights, _ = inputs(biases=True)
    apply = functools.partial(feed_forward, x, weights, recipe=Recipe())
    with pytest.raises(ValueError, match=r"activation = 'gelu'; use one of 'relu2', 'relu', 'relu2_clamped'"):
        apply(activation="gelu")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="clamp = 0"):
        apply(clamp=0.0)
    with pytest.raises(ValueError, match=r"dropout = 1.0: use a rate"):
        apply(dropout=1.0)
    with pytest.raises(ValueError, match=r"takes route=None, got one of shape \(130, 1\)"):
        apply(jnp.zeros((T, 1), jnp.int32))
    with pytest.raises(ValueError, match="there is no up"):
        feed_forward(x, weights._replace(up=None), recipe=Recipe())
    with pytest.raises(ValueError, match=r"b1 has shape \(3,\)"):
        feed_forward(x, weights._replace(b1=jnp.zeros(3)), recipe=Recipe())
    for recipe in (
        Recipe(weights=("y3",)),
        Recipe.act24(wgrad="split95"),
        Recipe.act24(token_copy="rebuilt"),
        Recipe.venom(4, 1, hidden="full"),
    ):
        route = jnp.zeros((T, 1), jnp.int32) if recipe.routed else None
        with pytest.raises(NotImplementedError, match="of the plain layer only"):
            feed_forward(x, weights, route, recipe=recipe)
