"""The mixture of experts against a loop over experts in float64, at every edge of the routing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import brute_force
from tests.helpers import assert_close, relative_error
from venom_jax import Recipe, SparseMoE, linen, moe, phases
from venom_jax.mlp import Method

D, FE = 32, 64


def layer(experts=4, top_k=2, **options: Any) -> Any:
    return SparseMoE(D, FE, experts=experts, experts_per_token=top_k, rngs=nnx.Rngs(0), **options)


def tokens(count=70, seed=0):
    return jax.random.normal(jax.random.key(seed), (count, D))


def loop(made: SparseMoE, x, recipe=None):
    """y in float64 with numpy, expert by expert; dense, or with two of four activations kept."""
    x, router, w1, w2 = (np.asarray(t, np.float64) for t in (x, made.router[...], made.w1[...], made.w2[...]))
    logits = x @ router
    if made.scores == "softmax":
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    order = np.argsort(-(scores + np.asarray(made.bias[...], np.float64)), axis=1, kind="stable")[:, : made.top_k]
    y = np.zeros_like(x)
    for t, chosen in enumerate(order):
        p = scores[t, chosen] / (scores[t, chosen].sum() if made.renormalise else 1) * made.scale
        for weight, e in zip(p, chosen, strict=True):
            own = slice(e * FE, (e + 1) * FE)
            h = _activated(
                made, x[t], w1[:, own], None if made.up is None else np.asarray(made.up[...])[:, own], recipe
            )
            y[t] += weight * (h @ w2[own])
        if made.shared is not None:
            up = None if made.shared.up is None else np.asarray(made.shared.up[...])
            h = _activated(made, x[t], np.asarray(made.shared.w1[...], np.float64), up, recipe)
            y[t] += h @ np.asarray(made.shared.w2[...], np.float64)
    return y


def _activated(made, x, w1, up, recipe):
    a = np.maximum(x @ w1, 0)
    h = a if made.activation == "relu" else a * a
    h = h if up is None else h * (x @ up)
    if recipe is not None and recipe.activations:
        h = np.where(brute_force.keep_two(a if up is None else h), h, 0)
    return h


LAYERS = {
    "softmax": {},
    "sigmoid, scaled, shared": {"scores": "sigmoid", "scale": 2.5, "shared_experts": 2},
    "gated, not renormalised": {"gated": True, "renormalise": False, "activation": "relu", "shared_experts": 1},
    "k = E": {"experts": 3, "top_k": 3},
    "one of many": {"experts": 16, "top_k": 1},
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("recipe", [Recipe(), Recipe.act24()], ids=["dense", "act24"])
def test_equals_a_loop_over_experts(name, recipe):
    made, x = layer(**LAYERS[name]), tokens()
    made.bias[...] = jnp.linspace(0.0, 0.1, made.experts)
    with jax.default_matmul_precision("highest"):
        y, stats = made(x, recipe=recipe, return_stats=True)
    assert relative_error(y, loop(made, x, recipe)) < 2e-6
    assert stats.load.sum() == len(x) * made.top_k
    assert stats.dropped == 0


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.act24(wgrad="dense")], ids=["dense", "act24"])
@pytest.mark.parametrize("count", [1, 2, 70])
def test_few_tokens_and_empty_experts(count, recipe):
    """More experts than copies of tokens; one that nobody wants, and one that all want."""
    made, x = layer(experts=8), tokens(count)
    made.bias[...] = jnp.array([-9.0, 0, 0, 0, 9.0, 0, 0, 0])

    def loss(state):
        return jnp.sum(nnx.merge(graph, state, rest)(x, recipe=recipe) ** 2)

    graph, state, rest = nnx.split(made, nnx.Param, ...)
    with jax.default_matmul_precision("highest"):
        y, stats = made(x, recipe=recipe, return_stats=True)
        gradient = jax.jit(jax.grad(loss))(state)
    assert relative_error(y, loop(made, x, recipe)) < 2e-6
    assert stats.load[0] == 0
    assert stats.load[4] == count
    assert not np.asarray(gradient["w1"][...])[:, :FE].any(), "an expert without tokens has no gradient"
    assert np.isfinite(gradient["router"][...]).all()
    assert np.asarray(gradient["w2"][...])[4 * FE : 5 * FE].any()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_gradients_by_finite_differences(scores):
    """Of every parameter, the router's among them, and of the auxiliary losses, in f64, along random directions."""
    with jax.enable_x64(True):
        made, x = layer(scores=scores, shared_experts=1, gated=True, param_dtype=jnp.float64), tokens(20)
        x = x.astype(jnp.float64)
        graph, state, rest = nnx.split(made, nnx.Param, ...)

        @jax.jit
        def loss(state, x):
            y, stats = nnx.merge(graph, state, rest)(x, return_stats=True)
            return jnp.sum(jnp.sin(y)) + 10 * stats.balance_loss + stats.z_loss

        gradients = jax.grad(loss, (0, 1))(state, x)
        keys = jax.random.split(jax.random.key(3), 20)
        for i, leaf in enumerate(jax.tree.leaves((state, x))):
            direction = jax.random.normal(keys[i], leaf.shape, leaf.dtype)

            def moved(step, i=i, direction=direction):
                leaves, tree = jax.tree.flatten((state, x))
                leaves[i] = leaves[i] + step * direction
                return loss(*jax.tree.unflatten(tree, leaves))

            step = 1e-3  # scores are f32: smaller steps drown
            expected = (moved(step) - moved(-step)) / (2 * step)
            found = jnp.vdot(jax.tree.leaves(gradients)[i], direction)
            np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)


def test_bias_moves_the_choice_and_balances():
    logits = jax.random.normal(jax.random.key(0), (256, 4)) + jnp.array([0.7, 0, 0, 0])
    bias, loads = jnp.zeros(4), []
    for _ in range(200):
        load = moe.choose(logits, bias, 1).load
        bias = moe.updated_bias(bias, load, 0.01)
        loads.append(float(load.max()))
    assert loads[-1] < 70 < 100 < loads[0], "the fullest expert comes near its share of 64"
    routing = moe.choose(jnp.zeros((5, 4)), jnp.array([0.0, 1, 0, 0]), 1)
    np.testing.assert_array_equal(routing.route, 1)
    np.testing.assert_allclose(routing.weights, 1.0)


def test_statistics():
    routing = moe.choose(jnp.zeros((8, 4)), jnp.zeros(4), 2)
    np.testing.assert_array_equal(routing.route, jnp.tile(jnp.array([0, 1]), (8, 1)))  # ties to the lower
    np.testing.assert_allclose(routing.entropy, np.log(4), rtol=1e-6)
    np.testing.assert_allclose(routing.z_loss, np.log(4) ** 2, rtol=1e-6)
    np.testing.assert_allclose(routing.balance_loss, 1.0, rtol=1e-6)
    np.testing.assert_array_equal(routing.load, [8, 8, 0, 0])


def test_an_expert_whose_score_is_zero_is_no_trouble():
    """Sigmoid scores underflow: weights and gradients stay finite."""
    logits = jnp.full((4, 3), -200.0)
    weights, vjp = jax.vjp(lambda t: moe.choose(t, jnp.zeros(3), 2, scores="sigmoid").weights, logits)
    assert np.isfinite(weights).all()
    assert np.isfinite(vjp(jnp.ones_like(weights))[0]).all()


def test_phases_carry_it():
    """all24 freezes a scale for the experts' weights, and going back to dense changes nothing of them but by baking."""
    made, x = layer(), tokens(64)
    graph, params, method = nnx.split(made, nnx.Param, Method)
    on = phases.transition(params, method, [], Recipe(), Recipe.all24(), seed=0)
    sparse = nnx.merge(graph, on.params, on.method)
    assert 1.2 < sparse.beta[...][0] < 1.8
    off = phases.transition(on.params, on.method, [], Recipe.all24(), Recipe.act24(), seed=0)
    dense = nnx.merge(graph, off.params, off.method)
    assert_close(dense(x, recipe=Recipe.act24()), sparse(x, recipe=Recipe.all24()))


def test_under_remat_and_scan():
    made, x = layer(), tokens(64)
    graph, state, rest = nnx.split(made, nnx.Param, ...)

    def loss(state, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, state, rest)(x, recipe=Recipe.act24())))

    def scanned(state, x):
        return jax.lax.scan(lambda t, _: (t + jax.checkpoint(loss)(state, x), None), jnp.float32(0), length=2)[0] / 2

    expected = jax.jit(jax.grad(loss))(state, x)
    for out, ref in zip(*map(jax.tree.leaves, (jax.jit(jax.grad(scanned))(state, x), expected)), strict=True):
        assert_close(out, ref)


def test_nan_stays_with_its_token():
    made, x = layer(), tokens(64)
    apply = jax.jit(functools.partial(made, recipe=Recipe.act24()))
    clean, y = apply(x), apply(x.at[7].set(jnp.nan))
    others = np.arange(64) != 7
    assert np.isnan(y[7]).all()
    np.testing.assert_array_equal(np.asarray(y)[others], np.asarray(clean)[others])


def test_linen():
    module = linen.sparse_moe(D, FE, experts=4, experts_per_token=2, shared_experts=1)
    variables: Any = module.init(jax.random.key(0), tokens())
    assert variables["params"]["shared"]["w1"].shape == (D, FE)
    found: Any = module.apply(variables, tokens(), recipe=Recipe.act24(), return_stats=True)
    y, stats = found
    assert y.shape == (70, D)
    assert stats.load.sum() == 140


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="experts_per_token = 5 exceeds experts = 4"):
        layer(top_k=5)
    with pytest.raises(ValueError, match="use at least 2 experts"):
        layer(experts=1, top_k=1)
    with pytest.raises(ValueError, match="scores = 'top'; use one of 'softmax', 'sigmoid'"):
        layer(scores="top")
    with pytest.raises(ValueError, match="inside experts nothing routes"):
        layer()(tokens(), recipe=Recipe.venom(4, 1))
    with pytest.raises(ValueError, match="give one of the two"):
        layer()(tokens(), axis="a", expert_axis="b")
