"""SparseMLP inside a user's own nnx and linen models, through all recipes."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import venom_jax
from tests.helpers import assert_close
from venom_jax import Method, Recipe, SparseMLP, phases

RECIPES = [Recipe(), Recipe.act24(), Recipe.all24(precision="fp8"), Recipe.venom(4, 2, balance_rate=0.1)]


class Block(nnx.Module):
    """A user's block: norm, sparse MLP, residual."""

    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(32, rngs=rngs)
        self.mlp = SparseMLP(32, 64, max_experts=8, rngs=rngs)

    def __call__(self, x, recipe):
        y, stats = self.mlp(self.norm(x), recipe=recipe, return_stats=True)
        return x + y, stats


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, recipe):
        return x + venom_jax.linen.SparseMLP(64, max_experts=8, name="mlp")(linen.RMSNorm()(x), recipe=recipe)


def batch():
    x = jax.random.normal(jax.random.key(0), (4, 24, 32))
    return x, jnp.roll(x, 1, axis=-1)


def test_trains_through_all_recipes_in_an_nnx_model():
    x, target = batch()
    graph, params, method = nnx.split(Block(nnx.Rngs(0)), nnx.Param, Method)
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    def step(params, state, recipe):
        def loss(params):
            y, stats = nnx.merge(graph, params, method)(x, recipe)
            return jnp.mean((y - target) ** 2), stats

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value, stats

    step = jax.jit(step, static_argnums=2)
    structures, old = set(), Recipe()
    for recipe in RECIPES:
        params, method, (state,), *_ = phases.transition(params, method, [state], old, recipe, seed=0)
        params, state, first, stats = step(params, state, recipe)
        for _ in range(30):
            params, state, last, stats = step(params, state, recipe)
        assert last < first
        assert 0 < stats.density < 1
        assert stats.load.sum() == (4 * 24 * recipe.top_k if recipe.routed else 0)
        structures.add(str(jax.tree.map(jnp.shape, stats)))
        old = recipe
    assert len(structures) == 1, "every recipe returns the same tree, as lax.cond needs"


def test_trains_in_a_linen_model():
    x, target = batch()
    model = LinenBlock()
    variables = model.init(jax.random.key(0), x, Recipe())
    params, method = variables["params"], variables["Method"]
    params, method, *_ = phases.transition(params, method, [], Recipe(), Recipe.venom(4, 1), seed=0)

    @jax.jit
    def step(params):
        def loss(params):
            y = jnp.asarray(model.apply({"params": params, "Method": method}, x, Recipe.venom(4, 1)))
            return jnp.mean((y - target) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

    losses = []
    for _ in range(30):
        params, value = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]


def test_one_recipe_in_each_branch_of_a_cond():
    x, _ = batch()
    graph, params, method = nnx.split(Block(nnx.Rngs(0)), nnx.Param, Method)

    def branch(recipe):
        return jax.grad(lambda p: jnp.sum(nnx.merge(graph, p, method)(x, recipe)[0] ** 2))

    @jax.jit
    def gradient(params, sparse):
        return jax.lax.cond(sparse, branch(Recipe.venom(4, 1)), branch(Recipe()), params)

    for sparse, recipe in ((True, Recipe.venom(4, 1)), (False, Recipe())):
        for a, b in zip(
            jax.tree.leaves(gradient(params, sparse)), jax.tree.leaves(branch(recipe)(params)), strict=True
        ):
            assert_close(a, b)


def test_leading_axes_are_one_batch():
    x, _ = batch()
    mlp = SparseMLP(32, 64, max_experts=4, rngs=nnx.Rngs(0))
    recipe = Recipe.venom(4, 1)
    np.testing.assert_array_equal(mlp(x, recipe=recipe), mlp(x.reshape(-1, 32), recipe=recipe).reshape(x.shape))


def test_precision_reaches_the_layer_in_nnx_and_linen():
    x, _ = batch()
    recipe = Recipe.act24(precision="fp8")
    mlp = SparseMLP(32, 64, max_experts=8, rngs=nnx.Rngs(0))
    expected = venom_jax.sparse_ffn(x.reshape(-1, 32), mlp.w1[...], mlp.w2[...], recipe=recipe).reshape(x.shape)
    np.testing.assert_array_equal(mlp(x, recipe=recipe), expected)
    packed = venom_jax.pack_weights(mlp.w1[...], mlp.w2[...], mlp.beta[...], recipe=recipe)
    np.testing.assert_array_equal(mlp(x, recipe=recipe, packed=packed), expected)
    in_linen = venom_jax.linen.SparseMLP(64, max_experts=8)
    variables = {"params": {"w1": mlp.w1[...], "w2": mlp.w2[...]}}
    method = in_linen.init(jax.random.key(0), x)["Method"]
    np.testing.assert_array_equal(in_linen.apply(variables | {"Method": method}, x, recipe=recipe), expected)


def test_dense_recipe_is_the_plain_mlp():
    x, _ = batch()
    mlp = SparseMLP(32, 64, rngs=nnx.Rngs(0))
    expected = jnp.square(jax.nn.relu(x @ mlp.w1[...])) @ mlp.w2[...]
    np.testing.assert_allclose(mlp(x), expected, rtol=1e-4, atol=1e-5)


def test_bad_calls_are_refused():
    mlp = SparseMLP(32, 64, max_experts=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="experts = 4 in a layer made with max_experts = 2"):
        mlp(jnp.ones((3, 32)), recipe=Recipe.venom(4, 1))
    with pytest.raises(ValueError, match="d_model=0"):
        SparseMLP(0, 64, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no multiple of 4"):
        SparseMLP(30, 64, rngs=nnx.Rngs(0))(jnp.ones((3, 30)), recipe=Recipe.all24())


def test_a_recipes_name_is_no_recipe():
    """Without the tests' own checking of types."""
    name: Any = "venom"
    with pytest.raises(ValueError, match=r"recipe='venom' must be a Recipe, such as Recipe.venom"):
        inspect.unwrap(SparseMLP.__call__)(SparseMLP(32, 64, rngs=nnx.Rngs(0)), batch()[0], recipe=name)
