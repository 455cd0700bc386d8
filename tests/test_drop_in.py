"""The layer in other people's code, by the inputs that people tried: modules, boxes, trees, memory, strict modes."""

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import venom_jax
from tests.helpers import assert_close
from venom_jax import LayerRecipes, Method, Recipe, SparseMLP, memory_of_phase, phases, sparse_ffn, trees

DENSE, ACT24, ALL24, VENOM = Recipe.dense(), Recipe.act24(), Recipe.all24(), Recipe.venom(4, 1)
D, F = 16, 64


def tokens(rows=12):
    return jax.random.normal(jax.random.key(1), (rows, D))


def layer(**options):
    return SparseMLP(D, F, max_experts=4, rngs=nnx.Rngs(0), **options)


def leaves(tree):
    return dict(trees.named_leaves(tree))


# --- linen


class Stacked(nn.Module):
    """Layers scanned on axis 1, as MaxText keeps them."""

    state: bool = True
    axis: int = 1

    @nn.compact
    def __call__(self, x, recipe=DENSE):
        axes: Any = {"params": self.axis} | ({"Method": 0} if self.state else {})
        scan = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
        return scan(recipe, name="layers")(x, None)[0]


class Layer(nn.Module):
    recipe: Recipe

    @nn.compact
    def __call__(self, x, _):
        return x + venom_jax.linen.SparseMLP(F, max_experts=4, recipe=self.recipe)(x), None


def test_linen_and_nnx_are_one_layer():
    module = venom_jax.linen.SparseMLP(F, max_experts=4, learned_router=True)
    variables = module.init(jax.random.key(0), tokens())
    assert set(variables["params"]) == {"w1", "w2"}
    assert set(variables["Method"]) == {"beta", "bias", "permutation", "phase", "router"}
    mlp = layer(learned_router=True)
    mlp.w1[...], mlp.w2[...] = variables["params"]["w1"], variables["params"]["w2"]
    for recipe in (DENSE, ACT24, Recipe(experts=4, top_k=2)):
        y, stats = module.apply(variables, tokens(), recipe=recipe, return_stats=True)  # pyrefly: ignore
        expected, its_stats = mlp(tokens(), recipe=recipe, return_stats=True)
        np.testing.assert_array_equal(y, expected)
        jax.tree.map(np.testing.assert_array_equal, stats, its_stats)


def test_boxes_of_linen_go_through_everything():
    """Row B: `nn.with_partitioning` on w1."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "fsdp"))
    module = venom_jax.linen.SparseMLP(F, max_experts=4, w1_init=init)
    variables = module.init(jax.random.key(0), tokens())
    assert isinstance(variables["params"]["w1"], nn.Partitioned)
    state = optax.adam(1e-2).init(variables["params"])
    out = phases.transition(variables["params"], variables["Method"], [state], DENSE, VENOM, seed=0)
    assert jax.tree.structure(out.params) == jax.tree.structure(variables["params"])
    order = out.method["permutation"]
    np.testing.assert_array_equal(out.params["w1"].value, variables["params"]["w1"].value[:, order])
    module.apply({"params": out.params, "Method": out.method}, tokens(), recipe=VENOM)


def test_a_scan_without_the_state_is_told():
    """Row F: nn.scan without "Method" in variable_axes."""
    variables = Stacked().init(jax.random.key(0), tokens())
    with pytest.raises(ValueError, match=r'give apply the collection "Method" .* variable_axes={"params": 0, "Method'):
        Stacked(state=False).init(jax.random.key(0), tokens())
    with pytest.raises(ValueError, match=r"layers/SparseMLP_0 has parameters but no state"):
        Stacked().apply({"params": variables["params"]}, tokens())
    with pytest.raises(ValueError, match=r"no leaf layers/SparseMLP_0/beta, .* variable_axes"):
        phases.transition(variables["params"], {}, [], DENSE, ALL24, seed=0)


# --- transitions


def test_layers_on_axis_1():
    """Row E: MaxText's default place of the layers."""
    x = tokens()
    found = []
    for axis in (0, 1):
        model = Stacked(axis=axis)
        variables = model.init(jax.random.key(0), x)
        state = optax.adam(1e-2).init(variables["params"])
        out = phases.transition(
            variables["params"], variables["Method"], [state], None, VENOM, seed=0, averages=[variables["params"]],
            layer_axis=axis,
        )  # fmt: skip
        assert jax.tree.map(jnp.shape, out[:3]) == jax.tree.map(
            jnp.shape, (variables["params"], variables["Method"], [state])
        )
        y = model.apply({"params": out.params, "Method": out.method}, x, VENOM)
        dense = phases.bake(out.params, out.method, VENOM, layer_axis=axis)
        found.append((y, dense["layers"]["SparseMLP_0"]["w1"], out.averages[0]["layers"]["SparseMLP_0"]["w2"]))
    assert_close(found[0][0], found[1][0])
    assert_close(found[0][1], jnp.moveaxis(found[1][1], 1, 0))
    assert_close(found[0][2], jnp.moveaxis(found[1][2], 1, 0))
    variables = Stacked().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"layers first; want \[..., D, F\] .* Give layer_axis"):
        phases.transition(variables["params"], variables["Method"], [], DENSE, VENOM, seed=0)


def test_numpy_leaves_stay_numpy():
    """Row D: a checkpoint as numpy arrays."""
    _, params, method = nnx.split(layer(), nnx.Param, Method)
    params, method = (jax.tree.map(np.asarray, nnx.to_pure_dict(tree)) for tree in (params, method))
    state = jax.tree.map(np.asarray, optax.adam(1e-2).init(params))
    out = phases.transition(params, method, [state], DENSE, VENOM, seed=0)
    back = phases.transition(out.params, out.method, out.trees, VENOM, DENSE, seed=0)
    for tree in (out, back):
        assert all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in jax.tree.leaves(tree[:3]))
    np.testing.assert_array_equal(out.params["w1"], params["w1"][:, out.method["permutation"]])


def test_only_nodes_with_state_are_layers():
    """Row F: another layer's leaves named w1 and w2, of the same sizes."""
    _, params, method = nnx.split(layer(), nnx.Param, Method)
    params, method = (nnx.to_pure_dict(tree) for tree in (params, method))
    other = {name: params[name] + 1 for name in ("w1", "w2")}
    tree = {"ffn": params, "lora": other}
    out = phases.transition(tree, {"ffn": method}, [optax.sgd(1e-2, 0.9).init(tree)], None, VENOM, seed=0)
    jax.tree.map(np.testing.assert_array_equal, out.params["lora"], other)
    assert (out.params["ffn"]["w1"] != params["w1"]).any()


class Blocks(nnx.Module):
    def __init__(self, count=11):
        self.blocks = nnx.List([layer() for _ in range(count)])

    def __call__(self, x):
        for block in self.blocks:
            x = x + block(x) / 4
        return x


def test_a_list_of_blocks_takes_recipes_of_layers():
    """Row F: block 10 is after block 9."""
    model = Blocks()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before = [np.asarray(block.w1[...]) for block in model.blocks]
    report = phases.change_recipe(model, optimizer, LayerRecipes(((0, DENSE), (9, ACT24), (10, VENOM))))
    assert [block.recipe for block in model.blocks] == [DENSE] * 9 + [ACT24, VENOM]
    assert report["clustered_experts"] == 4
    for block, was in zip(model.blocks[:10], before, strict=False):
        np.testing.assert_array_equal(block.w1[...], was)
    assert (np.asarray(model.blocks[10].w1[...]) != before[10]).any()
    with pytest.raises(ValueError, match="from layer 20 on, but the stack has 11 layers"):
        phases.change_recipe(model, optimizer, LayerRecipes(((0, DENSE), (20, VENOM))))


def test_change_recipe_in_place_is_transition():
    model, reference = Blocks(2), Blocks(2)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = tokens()

    @nnx.jit
    def step(model, optimizer):
        value, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x[::-1]) ** 2))(model)
        optimizer.update(model, gradient)
        return value

    step(model, optimizer)
    graph, params, method = nnx.split(model, nnx.Param, Method)
    expected = phases.transition(params, method, [nnx.as_pure(optimizer.opt_state)], DENSE, VENOM, seed=7)
    average = nnx.state(nnx.merge(graph, params, method, copy=True), nnx.Param)
    report = phases.change_recipe(model, optimizer, VENOM, seed=7, averages=[average])
    found = nnx.state(model, nnx.Param), nnx.state(model, Method), nnx.as_pure(optimizer.opt_state), average
    for tree, wanted in zip(found, (expected.params, expected.method, expected.trees[0], expected.params), strict=True):
        jax.tree.map(np.testing.assert_array_equal, tree, wanted)
    assert report == expected.report
    assert {block.recipe for block in model.blocks} == {VENOM}
    first, last = step(model, optimizer), [step(model, optimizer) for _ in range(10)][-1]
    assert last < first
    phases.change_recipe(model, None, DENSE)
    phases.check(model, DENSE)
    assert jax.tree.structure(nnx.state(reference, Method)) == jax.tree.structure(nnx.state(model, Method))


# --- memory of the phase


def test_every_recipe_is_remembered():
    recipes = [
        DENSE, ACT24, ALL24, VENOM, Recipe(weights=("y1", "dx"), weight_mask="transposable"),
        Recipe.venom(8, 3, shared=2, clustering="coactivation"), Recipe.venom(4, 2, router="learned"),
        Recipe(experts=2, router="oracle", hidden="full"),
    ]  # fmt: skip
    for recipe in recipes:
        assert memory_of_phase.same(memory_of_phase.decode(memory_of_phase.encode(recipe)), recipe)
    assert memory_of_phase.same(ACT24, DENSE), "no state"
    assert not memory_of_phase.same(ALL24, VENOM)
    with pytest.raises(ValueError, match="which no recipe has"):
        memory_of_phase.decode(np.array([0, 1, 0, 0, 0]))


def test_a_wrong_old_recipe_is_told():
    """Row 10 of the other table: weights would stay unbaked."""
    _, params, method = nnx.split(layer(), nnx.Param, Method)
    out = phases.transition(params, method, [], None, ALL24, seed=0)
    with pytest.raises(ValueError, match=r"made for weights y1, dy2 2:4, old says no sparse weight"):
        phases.transition(out.params, out.method, [], DENSE, DENSE, seed=0)
    back = phases.transition(out.params, out.method, [], None, DENSE, seed=0)
    assert back.report == {"baked_w1": 1.0}
    _, params, method = nnx.split(layer(remember=False), nnx.Param, Method)
    with pytest.raises(ValueError, match="remembers no recipe; give the one before as old"):
        phases.transition(params, method, [], None, ALL24, seed=0)


def test_a_phase_forgotten_after_a_resume_is_told():
    mlp, resumed = layer(), layer()
    phases.change_recipe(mlp, None, VENOM)
    nnx.update(resumed, nnx.state(mlp))
    phases.check(resumed, VENOM)
    with pytest.raises(ValueError, match=r"was made for weights y1, dy2 2:4, 4 experts .* the recipe has no sparse"):
        phases.check(resumed, resumed.recipe)
    with pytest.raises(ValueError, match="no layer of this tree remembers"):
        phases.check({}, DENSE)


def test_a_recipe_before_its_transition_is_told():
    memory_of_phase._warn.cache_clear()
    with pytest.warns(
        memory_of_phase.PhaseWarning, match="made for no sparse weight runs a recipe with weights"
    ) as told:
        layer()(tokens(), recipe=VENOM)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer()(tokens(), recipe=VENOM)  # once
        layer()(tokens(), recipe=ACT24)  # needs no state
        mlp = layer()
        phases.change_recipe(mlp, None, Recipe.venom(2, 1))
        mlp(tokens())
        mlp(tokens(), recipe=DENSE)  # as on weights that were baked for an evaluation


# --- the module


def test_the_recipe_is_an_attribute_and_an_argument():
    mlp = layer(recipe=ACT24)
    np.testing.assert_array_equal(mlp(tokens()), mlp(tokens(), recipe=ACT24))
    mlp.set_attributes(recipe=DENSE)
    np.testing.assert_array_equal(mlp(tokens()), mlp(tokens(), recipe=DENSE))
    assert (mlp(tokens()) != mlp(tokens(), recipe=ACT24)).any()


def test_dtype_and_metadata():
    metadata: Any = {"w1_metadata": {"out_sharding": (None, "fsdp"), "eager_sharding": False}}
    mlp = layer(dtype=jnp.bfloat16, **metadata)
    assert mlp(tokens()).dtype == jnp.bfloat16
    np.testing.assert_array_equal(mlp(tokens()), mlp(tokens().astype(jnp.bfloat16)))
    assert mlp.w1.get_metadata()["out_sharding"] == (None, "fsdp")
    assert mlp.w1[...].dtype == jnp.float32


def test_six_lines_without_state():
    """`sparse_ffn` in the place of two products, with any leading axes."""
    mlp = layer()
    x = tokens().reshape(3, 4, D)
    y, density = sparse_ffn(x, mlp.w1[...], mlp.w2[...], recipe=ACT24, return_density=True)
    np.testing.assert_array_equal(y, mlp(x, recipe=ACT24))
    assert 0 < float(density) < 1
    route = jnp.tile(jnp.arange(4)[:, None], (3, 1)).reshape(3, 4, 1)
    routed = sparse_ffn(x, mlp.w1[...], mlp.w2[...], route, recipe=Recipe(experts=4))
    np.testing.assert_array_equal(
        routed, sparse_ffn(x, mlp.w1[...], mlp.w2[...], route.reshape(-1, 1), recipe=Recipe(experts=4))
    )


@pytest.mark.parametrize("page", ["README.md", "docs/api/venom_jax.md"])
def test_the_six_lines_run(page):
    text = (Path(__file__).resolve().parent.parent / page).read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "sparse_ffn" in block)
    assert len(code.splitlines()) <= 6
    scope: dict[str, Any] = {}
    exec(code, scope)
    mlp = layer()
    out = scope["feed_forward"](tokens(), mlp.w1[...], mlp.w2[...])
    np.testing.assert_array_equal(out, mlp(tokens(), recipe=ACT24))


# --- strict modes and odd inputs

EVERY = {
    "dense": DENSE,
    "act24": ACT24,
    "all24, exact": Recipe.all24(threshold_grad="exact"),
    "both ways": Recipe(weights=("y1", "dx"), weight_mask="transposable"),
    "venom": VENOM,
    "venom, shared": Recipe.venom(4, 2, shared=1),
    "oracle": Recipe(experts=4, router="oracle", hidden="full"),
    "split95": Recipe.act24(wgrad="split95"),
    "mvue": Recipe.act24(wgrad="mvue"),
}


@pytest.mark.parametrize("name", EVERY)
def test_strict_modes(name):
    """No silent promotion of ranks or dtypes, NaNs told, tokens none, one, or odd in number."""
    mlp, recipe = layer(learned_router=True), EVERY[name]

    def loss(params, x):
        y, stats = nnx.merge(graph, params, rest)(x, recipe=recipe, return_stats=True)
        return jnp.sum(y.astype(jnp.float32) ** 2), stats

    graph, params, rest = nnx.split(mlp, nnx.Param, ...)
    strict = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True)
    with strict[0], strict[1], strict[2]:
        for x in (tokens(7), tokens(0), jnp.zeros((1, D), jnp.bfloat16)):
            (value, stats), found = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
            assert np.isfinite(value)
            assert found[1].shape == x.shape
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found, stats)))
            if not x.size:
                assert not any(leaf.any() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("recipe", [DENSE, VENOM])
def test_float64(recipe):
    with jax.enable_x64(True):
        mlp = layer(param_dtype=jnp.float64)
        assert mlp(tokens().astype(jnp.float64), recipe=recipe).dtype == jnp.float64
        assert layer()(tokens().astype(jnp.float32), recipe=recipe).dtype == jnp.float32


def test_inputs_that_do_not_fit_have_one_error():
    """Without the tests' own checking of types."""
    mlp = layer()
    call: Any = inspect.unwrap(SparseMLP.__call__)
    plain: Any = inspect.unwrap(sparse_ffn)
    for recipe in (DENSE, VENOM):
        with pytest.raises(ValueError, match="x is int32; the layer takes floating-point numbers, cast it"):
            call(mlp, jnp.ones((3, D), jnp.int32), recipe=recipe)
        with pytest.raises(ValueError, match=r"shapes do not fit: x \(3, 15\), w1 \(16, 64\), w2 \(64, 16\)"):
            call(mlp, jnp.ones((3, 15)), recipe=recipe)
    with pytest.raises(ValueError, match="w1 is complex64"):
        plain(tokens(), mlp.w1[...].astype(jnp.complex64), mlp.w2[...], recipe=ACT24)
    with pytest.raises(ValueError, match="shapes do not fit"):
        plain(tokens(), mlp.w1[...], mlp.w1[...], recipe=ACT24)


def test_forward_mode_is_dense_or_a_named_error():
    mlp, x = layer(), tokens()
    y, dy = jax.jvp(mlp, (x,), (x,))
    step = 1e-2
    assert_close(y, mlp(x))
    np.testing.assert_allclose(dy, (mlp(x + step * x) - mlp(x - step * x)) / (2 * step), rtol=2e-2, atol=2e-3)
    for recipe in (ACT24, VENOM):
        with pytest.raises(NotImplementedError, match=r"forward-mode derivatives .* Use recipe = Recipe.dense"):
            jax.jvp(lambda x, recipe=recipe: mlp(x, recipe=recipe), (x,), (x,))
