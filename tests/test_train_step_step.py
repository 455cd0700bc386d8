"""One optimizer step: it learns, its branches are the recipes, its microbatches add up."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import assert_close, relative_error
from tests.trainer import build, run_config
from train.evaluation.likelihood import Scorer
from train.model import decoder
from train.state.state import initial_state
from train.step.step import (
    _load_metrics,
    make_diagnosis,
    make_eval_step,
    make_ffn_inputs,
    make_train_step,
    token_losses,
)
from venom_jax import LayerRecipes, Recipe, phases

BATCH = jax.random.randint(jax.random.key(5), (8, 17), 0, 300)


def start(config):
    """(train step, first state) of a run."""
    graphdef = decoder.structure(config.model, config.max_experts)
    return make_train_step(graphdef, config), initial_state(config)


def at_phase(state, index):
    return replace(state, phase=jnp.asarray(index, jnp.int32))


@pytest.fixture(scope="module")
def dense():
    return start(run_config())


def copy(state):
    """The step donates its state."""
    return jax.tree.map(jnp.copy, state)


@pytest.fixture(scope="module")
def dense_twice(dense):
    """(state after two dense steps, metrics of both)."""
    step, state = dense
    state, first = step(copy(state), BATCH)
    state, second = step(state, BATCH)
    return state, [first, second]


def test_the_first_loss_is_that_of_a_uniform_guess_and_steps_count(dense_twice):
    state, (first, _) = dense_twice
    assert float(first["loss"]) == pytest.approx(np.log(320), abs=0.1)
    assert float(first["lr"]) == 0.0
    assert int(state.step) == 2


def test_the_state_is_donated(dense):
    step, state = dense
    given = copy(state)
    step(given, BATCH)
    assert given.params["embedding"].is_deleted()


BALANCED = Recipe.venom(balance_rate=0.01, wgrad="dense")


@pytest.fixture(scope="module")
def two_phases():
    """(config, step, first state) of a run of two recipes, whose batches come in microbatches and loss chunks.

    Dense weight gradients, because groups of tokens form within a microbatch.
    """
    config = run_config(phases=((0, "dense"), (20, BALANCED)), steps=200, accumulation=2, loss_chunks=4)
    return config, *start(config)


def test_overfits_one_batch(two_phases):
    config, step, first = two_phases
    state, losses = copy(first), []
    for phase in (0, 1):
        if phase:
            old, new = (config.schedule.phases[i].recipe for i in (0, 1))
            out = phases.transition(state.params, state.method, [state.opt_state], old, new, seed=0)
            state = replace(state, params=out.params, method=out.method, opt_state=out.trees[0])
        state = at_phase(state, phase)
        for _ in range(60):
            state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[0] < 3.0
    assert losses[1] < 0.7 * losses[0]


def test_microbatches_and_loss_chunks_equal_the_large_batch(two_phases, dense_twice):
    step, state = two_phases[1], copy(two_phases[2])
    for expected in dense_twice[1]:
        state, metrics = step(state, BATCH)
        for name in ("loss", "grad_norm", "density"):
            assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    found, expected = (optax.tree.get(tree, "mu") for tree in (state.opt_state, dense_twice[0].opt_state))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < 1e-4


def test_each_phase_runs_its_own_recipe(two_phases, dense_twice):
    """The second branch of the switch gives what its recipe gives alone, not what the first gives."""
    config, step, state = two_phases
    graphdef = decoder.structure(config.model, config.max_experts)

    @jax.jit
    @jax.value_and_grad
    def alone(params):
        losses, _ = token_losses(graphdef, params, state.method, BATCH, recipe=BALANCED, key=None, config=config)
        return losses.mean()

    loss, grads = alone(state.params)
    norm = np.sqrt(sum(float(jnp.square(leaf).sum()) for leaf in jax.tree.leaves(grads)))
    _, metrics = step(at_phase(copy(state), 1), BATCH)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert float(dense_twice[1][0]["grad_norm"]) != pytest.approx(norm, rel=1e-3)


def test_the_whole_step_is_in_the_branches(two_phases):
    _, step, state = two_phases
    program = step.trace(state, BATCH).jaxpr
    outside = [e for e in program.eqns if e.primitive.name != "cond"]
    assert len(outside) < len(program.eqns)
    assert max(out.aval.size for e in outside for out in e.outvars) < 10


def test_the_bias_moves_once_per_step_towards_balance(two_phases):
    """Once, although two microbatches each count their load; and only where a phase routes."""
    _, step, state = two_phases
    dense, _ = step(copy(state), BATCH)
    assert not np.asarray(dense.method["blocks"]["ffn"]["bias"]).any()
    routed, metrics = step(at_phase(copy(state), 1), BATCH)
    bias = np.asarray(routed.method["blocks"]["ffn"]["bias"])
    assert bias.any()
    np.testing.assert_allclose(np.abs(bias[bias != 0]), 0.01, rtol=1e-6)
    assert float(metrics["load_mean"]) == pytest.approx(0.25)
    assert float(metrics["load_max"]) > 0.25 > float(metrics["load_min"])


def test_permuting_the_neurons_changes_neither_loss_nor_next_step(dense, dense_twice):
    """Clustering permutes parameters and both moments; all else equal, a run cannot tell."""
    step, _ = dense
    config = run_config(phases=((0, "dense"), (1, Recipe.venom(experts=4))))
    state = copy(dense_twice[0])
    wide = jax.tree.map(jnp.copy, state.method)
    wide["blocks"]["ffn"]["bias"] = jnp.zeros((config.model.layers, 4))
    out = phases.transition(state.params, wide, [state.opt_state], *config.schedule.recipes, seed=0)
    order = np.asarray(out.method["blocks"]["ffn"]["permutation"])
    assert (order != np.arange(config.model.d_ffn)).any()
    permuted = copy(replace(state, params=out.params, opt_state=out.trees[0]))
    next_plain, plain = step(state, BATCH)
    next_permuted, moved = step(permuted, BATCH)
    assert float(moved["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-6)
    w1 = jnp.take_along_axis(next_plain.params["blocks"]["ffn"]["w1"], order[:, None, :], axis=-1)
    w2 = jnp.take_along_axis(next_plain.params["blocks"]["ffn"]["w2"], order[:, :, None], axis=-2)
    assert_close(next_permuted.params["blocks"]["ffn"]["w1"], w1, "float32")
    assert_close(next_permuted.params["blocks"]["ffn"]["w2"], w2, "float32")
    assert_close(next_permuted.params["embedding"], next_plain.params["embedding"], "float32")


def test_evaluation_weighs_rows_and_repeats_exactly():
    config = run_config(phases=((0, "dense"), (1, Recipe.venom(router="random"))))
    graphdef, params, method = build(config.model, config.max_experts, 0)
    step = make_eval_step(graphdef, config)
    recipe = config.schedule.recipes[1]
    full = step(params, method, BATCH, np.ones(8, np.float32), recipe=recipe)
    again = step(params, method, BATCH, np.ones(8, np.float32), recipe=recipe)
    assert float(full[0]) == float(again[0])
    assert float(full[1]) == 8 * 16
    halves = [np.repeat([1.0, 0.0], 4), np.repeat([0.0, 1.0], 4)]
    parts = [step(params, method, BATCH, half.astype(np.float32), recipe=recipe) for half in halves]
    assert sum(float(part[0]) for part in parts) == pytest.approx(float(full[0]), rel=1e-5)


def test_diagnosis_reports_flips_against_the_last_masks(dense_twice):
    config = run_config(phases=((0, "dense"), (1, "venom")))
    graphdef = decoder.structure(config.model, config.max_experts)
    diagnosis = make_diagnosis(graphdef, config)
    state = initial_state(config)
    params, method = state.params, state.method
    figures, masks = diagnosis(params, method, BATCH, None, recipe=Recipe.venom())
    assert "flip_rate" not in figures
    assert all(value.shape == (config.model.layers,) for value in figures.values())
    same, _ = diagnosis(params, method, BATCH, masks, recipe=Recipe.venom())
    assert float(same["flip_rate"].max()) == 0
    other, _ = diagnosis(dense_twice[0].params, method, BATCH, masks, recipe=Recipe.venom())
    assert 0 < float(other["flip_rate"].max()) < 0.5


def test_what_only_looks_takes_tokens_that_do_not_split_into_blocks():
    """A microbatch of 15 tokens is one of the batch's eight blocks."""
    recipe = Recipe.act24(token_blocks=8)
    config = run_config(phases=((0, recipe),), accumulation=8, seq_len=15)
    graphdef, params, method = build(config.model, config.max_experts, 0)
    few = BATCH[:1, :16]
    one = Recipe.act24()
    evaluation, inputs = make_eval_step(graphdef, config), make_ffn_inputs(graphdef, config)
    losses = [evaluation(params, method, few, np.ones(1, np.float32), recipe=each)[0] for each in (recipe, one)]
    assert float(losses[0]) == float(losses[1])
    seen = [inputs(params, method, few, recipe=each) for each in (recipe, one)]
    np.testing.assert_array_equal(*seen)
    score = Scorer(graphdef, config, params, method, recipe)
    assert score([([1, 2], [3])]) == Scorer(graphdef, config, params, method, one)([([1, 2], [3])])
    figures, _ = make_diagnosis(graphdef, config)(params, method, few, None, recipe=recipe)
    whole = make_diagnosis(graphdef, replace(config, train=replace(config.train, accumulation=1)))
    np.testing.assert_array_equal(
        figures["dropped_tokens"], whole(params, method, few, None, recipe=one)[0]["dropped_tokens"]
    )


def test_loads_of_layers_with_unlike_experts_are_relative_to_their_own_mean():
    """Four experts in the first layer, two in the second: 0.4 of 0.25 is more than 0.6 of 0.5."""
    recipe = LayerRecipes(((0, Recipe.venom(4, 1)), (1, Recipe.venom(2, 1))))
    load = jnp.array([[40.0, 20, 20, 20], [60, 40, 0, 0]])
    found = {name: float(value) for name, value in _load_metrics(load, recipe, 100).items()}
    mean = (0.25 + 0.5) / 2
    assert found == pytest.approx({"load_mean": mean, "load_max": 1.6 * mean, "load_min": 0.8 * mean})
    unrouted = LayerRecipes(((0, Recipe.act24()), (1, Recipe.all24())))
    assert {float(value) for value in _load_metrics(jnp.zeros((2, 4)), unrouted, 100).values()} == {0.0}
