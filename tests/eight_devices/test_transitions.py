"""A change of recipe leaves every leaf where it lies, on a mesh of either kind, and gives one device's numbers."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers import assert_close
from venom_jax import Method, Recipe, SparseMLP, phases

D, F, AXES = 16, 64, ("data", "fsdp")
RECIPES = [Recipe.all24(), Recipe.venom(4, 1), Recipe.dense()]


def model():
    """Two layers in a stack, and Adam's state after a step."""
    make = nnx.vmap(lambda key: SparseMLP(D, F, max_experts=4, rngs=nnx.Rngs(key)))
    _, params, method = nnx.split(make(jax.random.split(jax.random.key(0), 2)), nnx.Param, Method)
    params, method = (nnx.to_pure_dict(tree) for tree in (params, method))
    optimizer = optax.adam(1e-2)
    gradient = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params)
    return params, method, optimizer.update(gradient, optimizer.init(params))[1]


def run(params, method, state):
    found = []
    for recipe in RECIPES:
        out = phases.transition(params, method, [state], None, recipe, seed=0, averages=[params])
        params, method, (state,) = out.params, out.method, out.trees
        found.append(out[:4])
    return found, phases.bake(params, method, RECIPES[0])


@pytest.mark.parametrize("ambient", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_leaves_stay_where_they_lie(kind, ambient):
    """Rows C and D: neurons cut, and the kind of mesh that `jax.make_mesh` makes by itself."""
    mesh = jax.make_mesh((2, 4), AXES, axis_types=(kind,) * 2)
    specs = {(2, D, F): P(None, None, "fsdp"), (2, F, D): P(None, "fsdp", "data")}
    given = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, specs.get(leaf.shape, P()))), model())
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        found, baked = run(*given)
    expected, its_baked = run(*model())
    for out, reference in zip(jax.tree.leaves((found, baked)), jax.tree.leaves((expected, its_baked)), strict=True):
        if out.ndim:
            assert_close(np.asarray(out, np.float32), np.asarray(reference, np.float32))
    for out in found:
        for leaf, before in zip(
            jax.tree.leaves(out), jax.tree.leaves((*given[:2], [given[2]], [given[0]])), strict=True
        ):
            assert leaf.sharding == before.sharding
    assert baked["w2"].sharding == given[0]["w2"].sharding
