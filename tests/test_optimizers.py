"""Every optimizer of optax and its contrib: a step commutes with a new order of neurons, or its state is refused."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from tests.helpers import relative_error
from venom_jax import trees

D, F = 8, 24
ORDER = np.random.default_rng(0).permutation(F)
FFN: dict[trees.Path, trees.Weight] = {
    ("ffn", "w1"): trees.Weight((D, F), 1, (), ORDER),
    ("ffn", "w2"): trees.Weight((F, D), 0, (), ORDER),
}
EVERY = [*FFN, ("other", "w1"), ("other", "w2")]

ADAM = optax.adam(1e-2)


def _early(step: Any, **_: Any) -> Any:
    return step < 100


BOTH_AXES = jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), {n: {"w1": 0, "w2": 0} for n in ("ffn", "other")})
MAKE: dict[str, Any] = {  # those that a learning rate alone does not make
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.1),
    "add_decayed_weights": lambda: optax.add_decayed_weights(0.1),
    "apply_every": lambda: optax.apply_every(4),
    "apply_if_finite": lambda: optax.apply_if_finite(ADAM, 3),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), ADAM),
    "clip": lambda: optax.clip(0.1),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(0.1),
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(0.1),
    "conditionally_mask": lambda: optax.conditionally_mask(ADAM, _early),
    "conditionally_transform": lambda: optax.conditionally_transform(ADAM, _early),
    "ema": lambda: optax.ema(0.9),
    "flatten": lambda: optax.flatten(ADAM),
    "freeze": lambda: optax.freeze({"ffn": False, "other": True}),
    "galore": lambda: contrib.galore(1e-2, rank=4),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adam)(learning_rate=1e-2),
    "masked": lambda: optax.masked(ADAM, {"ffn": True, "other": False}),
    "measure_with_ema": lambda: optax.measure_with_ema(lambda updates, **_: jax.tree.map(jnp.abs, updates), 0.9),
    "mechanize": lambda: contrib.mechanize(ADAM),
    "multi_transform": lambda: optax.multi_transform({"a": ADAM, "b": optax.lion(1e-2)}, {"ffn": "a", "other": "b"}),
    "named_chain": lambda: optax.named_chain(("first", ADAM)),
    "partition": lambda: optax.partition({"a": ADAM, "b": optax.lion(1e-2)}, {"ffn": "a", "other": "b"}),
    "polyak_sgd": lambda: optax.polyak_sgd(1e-2),
    "sam": lambda: contrib.sam(ADAM, optax.sgd(1e-2)),
    "scale": lambda: optax.scale(0.1),
    "scale_by_backtracking_linesearch": lambda: optax.scale_by_backtracking_linesearch(3),
    "scale_by_galore": lambda: contrib.scale_by_galore(rank=4),
    "scale_by_muon": lambda: contrib.scale_by_muon(weight_dimension_numbers=BOTH_AXES),
    "scale_by_madgrad": lambda: contrib.scale_by_madgrad(1e-2),
    "scale_by_schedule": lambda: optax.scale_by_schedule(lambda step: 0.1),
    "scale_by_zoom_linesearch": lambda: optax.scale_by_zoom_linesearch(3),
    "schedule_free": lambda: contrib.schedule_free(ADAM, 1e-2),
    "selective_transform": lambda: optax.selective_transform(ADAM, freeze_mask={"ffn": False, "other": True}),
    "snapshot": lambda: optax.snapshot("norm", lambda updates, **_: optax.tree.norm(updates)),
    "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(ADAM),
    "stateless": lambda: optax.stateless(lambda updates, params: updates),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda update, param: update),
    "trace": lambda: optax.trace(0.9),
    "with_extra_args_support": lambda: optax.with_extra_args_support(ADAM),
    "MultiSteps": lambda: optax.MultiSteps(ADAM, 2).gradient_transformation(),
}
ELSEWHERE = {
    "add_noise": "noise by the place of a weight",
    "noisy_sgd": "noise by the place of a weight",
    "differentially_private_aggregate": "takes a gradient for each example",
    "dpsgd": "takes a gradient for each example",
    "lookahead": "takes two sets of parameters: below",
}
_SEARCH = ("value", "grad", "value_fn")
MORE = {
    "lbfgs": _SEARCH,
    "scale_by_backtracking_linesearch": _SEARCH,
    "scale_by_zoom_linesearch": _SEARCH,
    "polyak_sgd": ("value",),
    "scale_by_polyak": ("value",),
    "momo": ("value",),
    "momo_adam": ("value",),
    "reduce_on_plateau": ("value",),
    "sophia": ("obj_fn",),
}
REFUSED = {"flatten": "ScaleByAdamState.*it belongs to no single parameter"}


def factories():
    """Functions of optax that return one optimizer or transformation, by name."""
    found = {}
    for module in (optax, contrib):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name[0] != "_" and "GradientTransformation" in str(inspect.signature(function).return_annotation):
                found[name] = functools.partial(make, name, function)
    return found | {"MultiSteps": MAKE["MultiSteps"]}


def make(name, function):
    if name in MAKE:
        return MAKE[name]()
    return function(1e-2) if "learning_rate" in inspect.signature(function).parameters else function()


def parameters(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {"w1": (D, F), "w2": (F, D)}
    nodes = [[jax.random.normal(key, shape) / 4 for key, shape in zip(pair, shapes.values(), strict=True)]
             for pair in (keys[:2], keys[2:])]  # fmt: skip
    return {node: dict(zip(shapes, pair, strict=True)) for node, pair in zip(("ffn", "other"), nodes, strict=True)}


def loss(params):
    """Of a layer whose neurons move, and one of the same sizes that is no SparseMLP and keeps its order."""
    x = jax.random.normal(jax.random.key(9), (16, D))
    for node in ("ffn", "other"):
        x = x + jnp.square(jax.nn.relu(x @ params[node]["w1"])) @ params[node]["w2"]
    return jnp.mean(jnp.sin(x))


def step(name, optimizer, params, state):
    """Downhill by a little, whatever the optimizer calls its step."""
    value, gradient = jax.value_and_grad(loss)(params)
    scale = 1.0 if MORE.get(name) == _SEARCH else 1e-2  # a search along a line has its own
    given = {"value": value, "grad": gradient, "value_fn": loss, "obj_fn": loss}
    more: dict[str, Any] = {key: given[key] for key in MORE.get(name, ())}
    updates, state = optax.with_extra_args_support(optimizer).update(gradient, state, params, **more)
    return optax.apply_updates(params, jax.tree.map(lambda update: scale * update, updates)), state


def moved(tree):
    return trees.permute(tree, FFN, EVERY)


@pytest.mark.parametrize("name", sorted(set(factories()) - set(ELSEWHERE)))
def test_a_step_commutes_with_the_permutation(name):
    optimizer = factories()[name]()
    params = parameters()
    state = optimizer.init(params)
    with jax.default_matmul_precision("highest"):
        for _ in range(2):
            params, state = step(name, optimizer, params, state)
        if name in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[name]):
                moved(state)
            return
        after, state_after = step(name, optimizer, params, state)
        found, state_found = step(name, optimizer, moved(params), moved(state))
    change = jax.tree.map(jnp.subtract, found, moved(params))
    wanted = jax.tree.map(jnp.subtract, moved(after), moved(params))
    for leaf, expected in zip(jax.tree.leaves(change), jax.tree.leaves(wanted), strict=True):
        assert relative_error(leaf, expected) < 2e-3
    pairs = zip(jax.tree.leaves(state_found), jax.tree.leaves(moved(state_after)), strict=True)
    if MORE.get(name) != _SEARCH:  # differences of two losses, next to zero
        assert all(relative_error(leaf, expected) < 2e-3 for leaf, expected in pairs)


def test_no_optimizer_is_left_out():
    assert set(MAKE) <= set(factories())
    assert len(factories()) > 100


def test_lookahead_has_slow_parameters():
    optimizer = optax.lookahead(ADAM, 3, 0.5)
    params: Any = optax.LookaheadParams.init_synced(parameters())
    state: Any = optimizer.init(params)
    assert jax.tree.structure(moved(state)) == jax.tree.structure(state)
    slow, found = params.slow, moved(params).slow
    np.testing.assert_array_equal(found["ffn"]["w1"], slow["ffn"]["w1"][:, ORDER])
    np.testing.assert_array_equal(found["other"]["w1"], slow["other"]["w1"])


def test_one_state_for_layers_of_other_orders_is_refused():
    """SM3 takes the largest over all layers of a stack, whose neurons go to other places each."""
    order = np.stack([ORDER, ORDER[::-1]])
    weights: dict[trees.Path, trees.Weight] = {("w1",): trees.Weight((2, D, F), 2, (0,), order)}
    state = optax.sm3(1e-2).init({"w1": jnp.ones((2, D, F))})
    with pytest.raises(
        ValueError, match=r"ScaleBySM3State.*one state for layers whose neurons have other orders of w1"
    ):
        trees.permute(state, weights, [("w1",)])
    adam: Any = ADAM.init({"w1": jnp.arange(2.0 * D * F).reshape(2, D, F)})
    adam = jax.tree.map(lambda leaf: leaf + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), adam)
    out = trees.permute(adam, weights, [("w1",)])
    np.testing.assert_array_equal(out[0].mu["w1"][1], adam[0].mu["w1"][1][:, ORDER[::-1]])


def test_layers_on_another_axis():
    order = np.stack([ORDER, ORDER[::-1]])
    weights: dict[trees.Path, trees.Weight] = {
        ("w1",): trees.Weight((D, 2, F), 2, (1,), order),
        ("w2",): trees.Weight((F, 2, D), 0, (1,), order),
    }
    tree = {"w1": np.arange(2 * D * F).reshape(D, 2, F), "w2": np.arange(2 * D * F).reshape(F, 2, D)}
    out = trees.permute(tree, weights, [("w1",), ("w2",)])
    for layer in range(2):
        np.testing.assert_array_equal(out["w1"][:, layer], tree["w1"][:, layer][:, order[layer]])
        np.testing.assert_array_equal(out["w2"][:, layer], tree["w2"][:, layer][order[layer]])
    assert isinstance(out["w1"], np.ndarray)
