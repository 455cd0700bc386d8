"""Mixtures of experts and gated layers over devices equal those on one: weights gathered, or tokens exchanged."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.helpers import assert_close
from venom_jax import Recipe, SparseMoE
from venom_jax.ffn_parts import Weights
from venom_jax.general_ffn import feed_forward

D, TOKENS = 64, 256
MESH = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("devices",), axis_types=(AxisType.Auto,))
RECIPES = {"dense": Recipe(), "act24": Recipe.act24(token_blocks=4), "weights": Recipe.all24(wgrad="dense")}
CUT = {"w1": P(None, "devices"), "up": P(None, "devices"), "w2": P("devices")}


def specs(state, how):
    """Where experts are whole, the shared ones are on every device."""

    def spec(path, _):
        names = [entry.key for entry in path if hasattr(entry, "key")]
        return P() if how == "expert_axis" and "shared" in names else CUT.get(names[-1], P())

    return jax.tree.map_with_path(spec, state)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("how", "experts"), [("axis", 8), ("expert_axis", 8), ("expert_axis", 4)])
def test_a_mixture_is_that_of_one_device(how, experts, recipe):
    recipe = RECIPES[recipe]
    if how == "expert_axis" and recipe.wgrad == "24":
        recipe = Recipe.act24(wgrad="dense")  # fours of tokens form among those that an expert got
    if how == "expert_axis" and "dy2" in recipe.weights:
        recipe = Recipe(activations=True, weights=("y1",))  # the weights' gradient reads W2 as dy2 does, or dense
    options = {"experts": experts, "experts_per_token": 2, "shared_experts": 1, "gated": True}
    made = SparseMoE(D, 64, **options, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(made, nnx.Param, ...)
    x, dy = (jax.random.normal(jax.random.key(i), (TOKENS, D)) for i in (1, 2))

    def apply(params, x, recipe, **where):
        y, stats = nnx.merge(graph, params, rest)(x, recipe=recipe, return_stats=True, **where)
        return y, stats.load

    def whole(params, x):
        return apply(params, x, recipe)

    local = Recipe.act24() if recipe.wgrad == "24" else recipe

    def parts(params, x):
        def one(params, x):
            y, load = apply(params, x, local, **{how: "devices"})
            return y, jax.lax.psum(load, "devices")

        tree = specs(params, how)
        run = jax.shard_map(
            one, mesh=MESH, in_specs=(tree, P("devices")), out_specs=(P("devices"), P()), check_vma=False
        )
        return run(params, x)

    results = []
    with jax.default_matmul_precision("highest"):
        for function in (whole, parts):

            @jax.jit
            def both(params, x, dy, function=function):
                y, vjp, load = jax.vjp(function, params, x, has_aux=True)
                return y, load, *vjp(dy)

            results.append(both(params, x, dy))
    assert results[0][1].sum() == 2 * TOKENS
    for out, ref in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(out, ref)


def test_a_part_that_does_not_fit_is_named():
    made = SparseMoE(D, 64, experts=6, experts_per_token=2, rngs=nnx.Rngs(0))
    run = jax.shard_map(
        functools.partial(made, expert_axis="devices"), mesh=MESH, in_specs=P("devices"), out_specs=P("devices")
    )
    with pytest.raises(ValueError, match="experts = 6 do not part among the 4 devices of 'devices'"):
        jax.jit(run)(jnp.zeros((8, D)))


@pytest.mark.parametrize("recipe", ["dense", "weights"])
def test_a_gated_layer_with_its_neurons_cut(recipe):
    recipe = RECIPES[recipe]
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((D, 256), (256, D), (D, 256), (256,), (256,))
    weights = Weights(*(jax.random.normal(key, shape) / 8 for key, shape in zip(keys, shapes, strict=True)))
    x = jax.random.normal(jax.random.key(1), (TOKENS, D))
    specs: list[Any] = [P(None, "devices"), P("devices"), P(None, "devices"), P("devices"), P("devices")]
    cut = Weights(*specs)

    def loss(x, weights, axis=None):
        return jnp.sin(feed_forward(x, weights, recipe=recipe, axis=axis)).sum()

    def parts(x, weights):
        def one(x, weights):
            return jax.lax.psum(loss(x, weights, "devices"), "devices")

        return jax.shard_map(one, mesh=MESH, in_specs=(P("devices"), cut), out_specs=P(), check_vma=False)(x, weights)

    found, expected = (jax.jit(jax.grad(f, (0, 1)))(x, weights) for f in (parts, loss))
    for out, ref in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert_close(out, ref)
