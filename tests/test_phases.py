"""Transitions: what changes, what must not, and how often."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pallas_kernels.pack import reference as pack
from tests.helpers import assert_close
from venom_jax import LayerRecipes, Method, Recipe, SparseMLP, phases, stats, trees
from venom_jax.threshold import optimal_scale

DENSE, ALL24, VENOM = Recipe(), Recipe.all24(), Recipe.venom(4, 1)


class Stack(nnx.Module):
    """Two layers stacked on a leading axis, as a scanned model holds them, under a user's own names."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda key: SparseMLP(16, 64, max_experts=4, rngs=nnx.Rngs(key)))
        self.tower = make(jax.random.split(rngs.params(), 2))

    def __call__(self, x, recipe=DENSE):
        graph, params, method = nnx.split(self.tower, nnx.Param, Method)
        for layer in range(2):
            p, m = (jax.tree.map(lambda t, i=layer: t[i], tree) for tree in (params, method))
            x = x + nnx.merge(graph, p, m)(x, recipe=recipe)
        return x


@pytest.fixture
def model():
    return nnx.split(Stack(nnx.Rngs(0)), nnx.Param, Method)


def inputs():
    return jax.random.normal(jax.random.key(1), (50, 16))


def leaves(tree):
    return {trees.names_of(path): value for path, value in jax.tree_util.tree_leaves_with_path(tree)}


def test_permuting_leaves_the_function_and_the_next_step_unchanged(model):
    graph, params, method = model
    optimizer = optax.adamw(1e-2)
    x, target = inputs(), inputs()[::-1]

    def step(params, method, state):
        def loss(params):
            return jnp.mean((nnx.merge(graph, params, method)(x) - target) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in range(3):  # moments that differ from neuron to neuron
        params, state, _ = step(params, method, state)
    out = phases.transition(params, method, [state], DENSE, Recipe(experts=4), seed=0)
    assert (leaves(out.params)["tower", "w1"] != leaves(params)["tower", "w1"]).any()
    plain, _, value = step(params, method, state)
    moved, _, value_moved = step(out.params, out.method, out.trees[0])
    np.testing.assert_allclose(value, value_moved, rtol=1e-6)

    order = leaves(out.method)["tower", "permutation"]
    for layer in range(2):
        assert_close(leaves(moved)["tower", "w1"][layer], leaves(plain)["tower", "w1"][layer][:, order[layer]])
        assert_close(leaves(moved)["tower", "w2"][layer], leaves(plain)["tower", "w2"][layer][order[layer]])


def test_permutations_compose(model):
    _, params, method = model
    first = phases.transition(params, method, [], DENSE, Recipe(experts=4), seed=0)
    second = phases.transition(first.params, first.method, [], Recipe(experts=4), Recipe(experts=2), seed=1)
    order = leaves(second.method)["tower", "permutation"]
    for layer in range(2):
        expected = leaves(params)["tower", "w1"][layer][:, order[layer]]
        np.testing.assert_array_equal(leaves(second.params)["tower", "w1"][layer], expected)


def test_scales_are_frozen_when_weights_turn_sparse(model):
    _, params, method = model
    out = phases.transition(params, method, [], DENSE, ALL24, seed=0)
    beta, w1, w2 = leaves(out.method)["tower", "beta"], leaves(params)["tower", "w1"], leaves(params)["tower", "w2"]
    for layer in range(2):
        expected = np.array([optimal_scale(w1[layer], 0), 1, optimal_scale(w2[layer], 1), 1])
        np.testing.assert_allclose(beta[layer], expected, rtol=1e-6)
    assert out.report["beta_y1"] == pytest.approx(float(beta[:, 0].mean()))
    assert "beta_y3" not in out.report

    moved = jax.tree.map(lambda w: 2 * w + 0.1, out.params)  # training went on: the scale stays
    again = phases.transition(moved, out.method, [], ALL24, VENOM, seed=0)
    np.testing.assert_array_equal(leaves(again.method)["tower", "beta"], beta)


@pytest.mark.parametrize("axis_case", [("y1", "w1", 0), ("y3", "w2", 0), ("dy2", "w2", 1), ("dx", "w1", 1)])
def test_each_product_has_its_own_scale(model, axis_case):
    gemm, name, axis = axis_case
    _, params, method = model
    out = phases.transition(params, method, [], DENSE, Recipe(weights=(gemm,)), seed=0)
    index = ("y1", "y3", "dy2", "dx").index(gemm)
    expected = [optimal_scale(w, axis) for w in leaves(params)["tower", name]]
    np.testing.assert_allclose(leaves(out.method)["tower", "beta"][:, index], expected, rtol=1e-6)


def test_a_scale_follows_its_mask_and_the_order_of_the_neurons(model):
    _, params, method = model
    threshold, both = (Recipe(weights=("y1", "dx"), weight_mask=mask) for mask in ("threshold", "transposable"))
    there = phases.transition(params, method, [], DENSE, threshold, seed=0)
    out = phases.transition(there.params, there.method, [], threshold, both, seed=0)
    expected = [optimal_scale(w, 0, "transposable") for w in leaves(out.params)["tower", "w1"]]
    np.testing.assert_allclose(leaves(out.method)["tower", "beta"][:, 0], expected, rtol=1e-6)
    assert (leaves(out.method)["tower", "beta"][:, 0] != leaves(there.method)["tower", "beta"][:, 0]).all()

    moved = phases.transition(params, method, [], DENSE, Recipe(weights=("y3",), experts=4), seed=0)
    after, before = ([optimal_scale(w, 0) for w in leaves(tree)["tower", "w2"]] for tree in (moved.params, params))
    np.testing.assert_allclose(leaves(moved.method)["tower", "beta"][:, 1], after, rtol=1e-6)
    assert (np.array(after) != np.array(before)).all(), "along F the order matters"

    sparse = phases.transition(params, method, [], DENSE, Recipe(weights=("y1", "y3")), seed=0)
    routed = Recipe(weights=("y1", "y3"), experts=4)
    moved = phases.transition(sparse.params, sparse.method, [], Recipe(weights=("y1", "y3")), routed, seed=0)
    beta, kept = (leaves(tree.method)["tower", "beta"] for tree in (moved, sparse))
    np.testing.assert_allclose(
        beta[:, 1], [optimal_scale(w, 0) for w in leaves(moved.params)["tower", "w2"]], rtol=1e-6
    )
    assert (beta[:, 1] != kept[:, 1]).all(), "fours along F are others"
    np.testing.assert_array_equal(beta[:, 0], kept[:, 0], "fours along D are not")


def test_baking_keeps_the_forward_and_happens_once(model):
    graph, params, method = model
    weights = Recipe(weights=("y1", "dy2"))
    params, method, *_ = phases.transition(params, method, [], DENSE, weights, seed=0)
    x = inputs()
    sparse = nnx.merge(graph, params, method)(x, weights)
    averages = [jax.tree.map(lambda w: 0.5 * w, params)]
    out = phases.transition(params, method, [], weights, DENSE, seed=0, averages=averages)
    assert_close(nnx.merge(graph, out.params, out.method)(x), sparse)
    w1 = leaves(params)["tower", "w1"]
    beta = leaves(method)["tower", "beta"][:, 0, None, None]
    baked = beta * jax.vmap(lambda w: pack.soft_threshold(w, 0))(w1)
    np.testing.assert_array_equal(leaves(out.params)["tower", "w1"], baked)
    np.testing.assert_array_equal(leaves(out.params)["tower", "w2"], leaves(params)["tower", "w2"])
    np.testing.assert_array_equal(leaves(out.averages[0])["tower", "w1"], 0.5 * baked)
    np.testing.assert_array_equal(leaves(out.method)["tower", "beta"], np.ones((2, 4)))
    assert out.report == {"baked_w1": 1.0}

    again = phases.transition(out.params, out.method, [], DENSE, Recipe.act24(), seed=0)
    assert again.report == {}
    np.testing.assert_array_equal(leaves(again.params)["tower", "w1"], baked)


def test_w2_is_baked_where_the_forward_reads_it_sparse(model):
    graph, params, method = model
    recipe = Recipe(weights=("y3", "dx"))
    params, method, *_ = phases.transition(params, method, [], DENSE, recipe, seed=0)
    sparse = nnx.merge(graph, params, method)(inputs(), recipe)
    out = phases.transition(params, method, [], recipe, DENSE, seed=0)
    assert_close(nnx.merge(graph, out.params, out.method)(inputs()), sparse)
    np.testing.assert_array_equal(leaves(out.params)["tower", "w1"], leaves(params)["tower", "w1"])


def test_temporary_bake_changes_nothing_else(model):
    graph, params, method = model
    params, method, *_ = phases.transition(params, method, [], DENSE, ALL24, seed=0)
    before = jax.tree.map(jnp.copy, params)
    baked = phases.bake(params, method, ALL24)
    features = Recipe(weights=("y1",))
    assert_close(nnx.merge(graph, baked, method)(inputs()), nnx.merge(graph, params, method)(inputs(), features))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    jax.tree.map(np.testing.assert_array_equal, phases.bake(params, method, DENSE), params)


def test_moments_are_permuted_and_not_baked(model):
    _, params, method = model
    params, method, *_ = phases.transition(params, method, [], DENSE, ALL24, seed=0)
    moments = optax.ScaleByAdamState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.square, params))
    out = phases.transition(params, method, [moments], ALL24, VENOM, seed=0)
    np.testing.assert_array_equal(leaves(out.trees[0].mu)["tower", "w1"], leaves(out.params)["tower", "w1"])
    np.testing.assert_array_equal(leaves(out.trees[0].nu)["tower", "w2"], leaves(out.params)["tower", "w2"] ** 2)
    baked = phases.transition(out.params, out.method, out.trees, VENOM, DENSE, seed=0)
    np.testing.assert_array_equal(leaves(baked.trees[0].mu)["tower", "w1"], leaves(out.params)["tower", "w1"])


def test_balance_bias(model):
    _, params, method = model
    recipe = Recipe.venom(4, 1, balance_rate=0.25)
    params, method, *_ = phases.transition(params, method, [], DENSE, recipe, seed=0)
    loads = jnp.array([[10.0, 0, 10, 20], [10, 10, 10, 10]])
    moved = phases.update_bias(method, loads, recipe)
    np.testing.assert_array_equal(leaves(moved)["tower", "bias"], [[0, 0.25, 0, -0.25], [0, 0, 0, 0]])
    still = phases.update_bias(method, loads, Recipe.venom(4, 1))
    np.testing.assert_array_equal(leaves(still)["tower", "bias"], np.zeros((2, 4)))
    out = phases.transition(params, moved, [], recipe, Recipe.venom(2, 1), seed=0)
    np.testing.assert_array_equal(leaves(out.method)["tower", "bias"], np.zeros((2, 4)))
    formed_anew = Recipe.venom(4, 2, shared=1)
    inputs_of: Any = {("tower",): jnp.stack([inputs(), inputs()])}
    out = phases.transition(params, moved, [], recipe, formed_anew, seed=0, inputs=inputs_of)
    np.testing.assert_array_equal(leaves(out.method)["tower", "bias"], np.zeros((2, 4)))
    same = phases.transition(params, moved, [], recipe, Recipe.venom(4, 2), seed=0)
    assert leaves(same.method)["tower", "bias"].any(), "the same experts keep it"
    kept = phases.transition(params, moved, [], recipe, DENSE, seed=0)
    np.testing.assert_array_equal(leaves(kept.method)["tower", "permutation"], leaves(method)["tower", "permutation"])


def test_wrong_trees_are_named(model):
    _, params, method = model
    with pytest.raises(ValueError, match="max_experts = 4; the recipe has 8"):
        phases.transition(params, method, [], DENSE, Recipe.venom(8, 1), seed=0)
    with pytest.raises(ValueError, match="no FFN layer found"):
        phases.transition({"kernel": jnp.ones((2, 2))}, method, [], DENSE, ALL24, seed=0)
    with pytest.raises(ValueError, match="no leaf tower/b"):
        phases.transition(params, {}, [], DENSE, ALL24, seed=0)
    with pytest.raises(ValueError, match="this tree holds 2"):
        phases.update_bias({"a": method, "b": method}, jnp.ones(4), Recipe.venom(4, 1, balance_rate=1.0))


def test_neurons_are_ordered_as_the_processes_agree(model, monkeypatch):
    _, params, method = model
    own = phases.transition(params, method, [], DENSE, VENOM, seed=0)
    monkeypatch.setattr(phases, "_agreed", lambda found, like: found[..., ::-1].copy())
    agreed = phases.transition(params, method, [], DENSE, VENOM, seed=0)
    orders = [leaves(tree.method)["tower", "permutation"] for tree in (own, agreed)]
    np.testing.assert_array_equal(orders[1], orders[0][..., ::-1])


def test_diagnosis_against_numpy():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (128, 16))
    w1, w2 = jax.random.normal(keys[1], (16, 64)), jax.random.normal(keys[2], (64, 16))
    report, _ = stats.diagnose(x, w1, w2, jnp.ones(4), jnp.zeros(4), Recipe.act24())
    assert "flip_rate" not in report
    a = np.maximum(np.asarray(x) @ np.asarray(w1), 0)
    kept = np.where(pack.select24(jnp.asarray(a)), a, 0)
    np.testing.assert_allclose(report["density"], (a > 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(report["dropped_features"], 1 - (kept**4).sum() / (a**4).sum(), rtol=1e-4)
    np.testing.assert_allclose(report["crowded"], ((a > 0).reshape(128, 16, 4).sum(-1) > 2).mean(), rtol=1e-6)
    interleaved = a.reshape(4, 32, 64).transpose(1, 0, 2).reshape(128, 64)
    kept = np.where(pack.select24(jnp.asarray(interleaved), 0), interleaved, 0)
    np.testing.assert_allclose(report["dropped_tokens"], 1 - (kept**4).sum() / (a**4).sum(), rtol=1e-4)
    assert report["kept_router"] == report["kept_oracle"] == 1

    flipped = w1.at[:4, 0].set(jnp.array([1.0, 2.0, 3.0, 4.0])), w1.at[:4, 0].set(jnp.array([4.0, 3.0, 2.0, 1.0]))
    before = stats.weight_masks(flipped[0], w2)
    after, _ = stats.diagnose(x, flipped[1], w2, jnp.ones(4), jnp.zeros(4), Recipe.act24(), before)
    np.testing.assert_allclose(after["flip_rate"], 4 / (2 * 16 * 64), rtol=1e-6)

    routed, _ = stats.diagnose(x, w1, w2, jnp.ones(4), jnp.zeros(4), VENOM)
    assert 0 < routed["kept_router"] <= routed["kept_oracle"] <= 1
    # y1 of this recipe reads S(W1).
    s = np.asarray(pack.soft_threshold(w1, 0))
    a = np.maximum(np.asarray(x) @ s, 0)
    best = (a**2).reshape(128, 4, 16).sum(-1).argmax(1)
    own = np.repeat(best[:, None] == np.arange(4), 16, axis=1)
    np.testing.assert_allclose(routed["kept_oracle"], ((a * own) ** 4).sum() / (a**4).sum(), rtol=1e-4)
    best = Recipe.venom(4, 1, router="oracle", hidden="full")
    in_hindsight, _ = stats.diagnose(x, w1, w2, jnp.ones(4), jnp.zeros(4), best)
    np.testing.assert_allclose(in_hindsight["kept_router"], routed["kept_oracle"], rtol=1e-6)


def test_recipes_of_layers_are_each_layers_own_transition(model):
    """Every leaf of a layer, in every tree, is what a transition of the whole stack to that layer's recipe gives."""
    _, params, method = model
    state = optax.adam(1e-2).init(params)
    state = jax.tree.map(lambda leaf: leaf + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), state)
    mixed, later = LayerRecipes(((0, ALL24), (1, VENOM))), LayerRecipes(((0, DENSE), (1, Recipe.venom(2, 1))))

    def run(first, second):
        there = phases.transition(params, method, [state], DENSE, first, seed=3, averages=[params])
        grown = jax.tree.map(lambda w: w * 1.5, there.params)
        return there, phases.transition(grown, there.method, there.trees, first, second, seed=4, averages=[params])

    found = run(mixed, later)
    for layer, (first, second) in enumerate([(ALL24, DENSE), (VENOM, Recipe.venom(2, 1))]):
        for out, expected in zip(found, run(first, second), strict=True):
            pairs = zip(leaves(out[:4]).items(), leaves(expected[:4]).items(), strict=True)
            for (path, value), (same, wanted) in pairs:
                assert path == same
                if value.ndim:
                    np.testing.assert_array_equal(value[layer], wanted[layer], err_msg=str(path))
    assert found[0].report["clustered_experts"] == 4
    betas = leaves(found[0].method)["tower", "beta"]
    assert found[0].report["beta_y1"] == pytest.approx(float(betas[:, 0].mean())), "of both layers"
    assert abs(float(betas[0, 0] - betas[1, 0])) > 1e-4
    assert found[1].report["baked_w1"] == 1
    assert found[1].report["clustered_experts"] == 2


def test_recipes_of_layers_bake_and_balance_by_layer(model):
    _, params, method = model
    mixed = LayerRecipes(((0, Recipe(weights=("y1",))), (1, Recipe(experts=4, balance_rate=0.5))))
    _, method, *_ = phases.transition(params, method, [], DENSE, mixed, seed=0)
    baked, plain = (leaves(phases.bake(params, method, r))["tower", "w1"] for r in (mixed, Recipe(weights=("y1",))))
    np.testing.assert_array_equal(baked[0], plain[0])
    np.testing.assert_array_equal(baked[1], leaves(params)["tower", "w1"][1])
    loads = jnp.array([[5.0, 1, 1, 1], [5.0, 1, 1, 1]])
    bias = leaves(phases.update_bias(method, loads, mixed))["tower", "bias"]
    np.testing.assert_array_equal(bias, [[0, 0, 0, 0], [-0.5, 0.5, 0.5, 0.5]])


def test_recipes_of_layers_need_one_stack_and_layers_in_order(model):
    _, params, method = model
    two = LayerRecipes(((0, DENSE), (1, VENOM)))
    both = [{"a": tree, "b": tree} for tree in (params, method)]
    with pytest.raises(ValueError, match=r"FFNs without one, found 2, of which a/tower has w1 \(2, 16, 64\)"):
        phases.transition(both[0], both[1], [], DENSE, two, seed=0)
    with pytest.raises(ValueError, match="from layer 5 on, but the stack has 2 layers"):
        phases.transition(params, method, [], DENSE, LayerRecipes(((0, DENSE), (5, VENOM))), seed=0)
    for starts in ((), ((1, DENSE),), ((0, DENSE), (0, VENOM))):
        with pytest.raises(ValueError, match="must start at 0 and increase"):
            LayerRecipes(starts)
