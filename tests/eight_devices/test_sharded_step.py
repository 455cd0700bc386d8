"""The gradients over a mesh equal those of one device to rounding."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_close, relative_error
from tests.trainer import run_config
from train.config.settings import Mesh
from train.model import decoder
from train.model.mesh import ONE_DEVICE, layout_of
from train.state.state import initial_state
from train.step import explain
from train.step.step import make_diagnosis, make_gradients, make_train_step
from venom_jax import Recipe

BATCH = np.random.default_rng(5).integers(0, 300, (16, 65), np.int32)


@pytest.mark.parametrize(
    "options", [{"accumulation": 2, "remat": "full"}, {"unroll": 2}], ids=["microbatches, recomputed", "unrolled"]
)
def test_gradients_equal_those_of_one_device_and_one_microbatch(options):
    """In slices of the loss, with a tied head; test_sharded_ffn has all the recipes.  A block has 64 tokens, no fewer
    than a group is padded to, so that fours along tokens are full and their selection shows."""
    config = run_config(shape={"tied_head": True}, batch_size=16, seq_len=64, loss_chunks=2, **options)
    config = replace(config, mesh=Mesh(data=2, fsdp=4))
    whole = replace(config, train=replace(config.train, accumulation=1))

    def gradients_of(config, layout, recipe):
        graphdef, state = decoder.structure(config.model, config.max_experts), initial_state(config, layout)
        gradients = jax.jit(make_gradients(graphdef, config, layout), static_argnames="recipe")
        found = gradients(state.params, state.method, layout.rows(BATCH), jax.random.key(1), recipe=recipe)
        return jax.tree_util.tree_leaves_with_path(found)

    recipe = Recipe.all24(token_blocks=16)
    expected = gradients_of(whole, ONE_DEVICE, recipe)
    for (path, found), (_, one) in zip(gradients_of(config, layout_of(config), recipe), expected, strict=True):
        assert_close(found, one), path
    unpruned = gradients_of(whole, ONE_DEVICE, Recipe.all24(wgrad="dense"))
    errors = {
        jax.tree_util.keystr(path): relative_error(leaf, one)
        for (path, leaf), (_, one) in zip(unpruned, expected, strict=True)
    }
    assert max(error for name, error in errors.items() if "w1" in name) > 0.1, "the selection matters here"


@pytest.mark.parametrize("shape", [{"gated": True}, {"gated": True, "experts": 4, "shared_experts": 1, "d_expert": 16}])
def test_gates_and_experts_are_those_of_one_device(shape):
    """Neurons, or whole experts, are cut over devices and gathered for each pass."""
    config = replace(run_config(shape=shape, batch_size=16, seq_len=64, accumulation=2), mesh=Mesh(data=2, fsdp=4))
    recipe = Recipe.act24(token_blocks=16)
    results = []
    for found, layout in ((replace(config, mesh=Mesh()), ONE_DEVICE), (config, layout_of(config))):
        graphdef, state = decoder.structure(found.model, 1), initial_state(found, layout)
        gradients = jax.jit(make_gradients(graphdef, found, layout), static_argnames="recipe")
        results.append(gradients(state.params, state.method, layout.rows(BATCH), jax.random.key(1), recipe=recipe))
    for found, one in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(found, one)


def test_the_diagnosis_speaks_of_the_fours_that_the_devices_prune():
    config = replace(run_config(batch_size=16, seq_len=64, accumulation=2), mesh=Mesh(data=2, fsdp=4))
    graphdef, layout, few = decoder.structure(config.model, config.max_experts), layout_of(config), BATCH[:8]

    def kept(config, layout, tokens, recipe):
        state, diagnosis = initial_state(config, layout), make_diagnosis(graphdef, config, layout)
        return 1 - diagnosis(state.params, state.method, tokens, None, recipe=recipe)[0]["dropped_tokens"]

    whole = replace(config, train=replace(config.train, accumulation=1))
    one, by_device, finer = (kept(whole, ONE_DEVICE, few, Recipe.act24(token_blocks=n)) for n in (1, 8, 16))
    assert_close(kept(config, layout, layout.rows(few), Recipe.act24()), by_device)
    assert_close(kept(config, layout, layout.rows(few), Recipe.act24(token_blocks=32)), finer)
    assert min(relative_error(one, by_device), relative_error(by_device, finer)) > 1e-5, "the blocks matter here"


def test_the_guards_look_computes_the_gradients_of_the_devices():
    """Each device's tokens are fours of their own, though all are looked at in one place."""
    recipe = Recipe.act24()
    config = run_config(batch_size=16, seq_len=64, phases=((0, recipe),))
    config = replace(config, mesh=Mesh(data=2, fsdp=4))
    graphdef, layout = decoder.structure(config.model, config.max_experts), layout_of(config)
    state = initial_state(config, layout)
    gradients = jax.jit(make_gradients(graphdef, config, layout), static_argnames="recipe")
    expected, *_ = gradients(state.params, state.method, layout.rows(BATCH), jax.random.key(0), recipe=recipe)
    seen = dict(explain._tensors(graphdef, config, recipe, initial_state(config), jnp.asarray(BATCH), 0))
    for name in ("w1", "w2"):
        found = next(leaf for key, leaf in seen.items() if "gradient" in key and key.endswith(f"{name} in layer 0"))
        assert_close(found, expected["blocks"]["ffn"][name][0])


@pytest.mark.parametrize("fsdp", [4, 1])
def test_eight_bits_give_the_gradients_of_one_device_but_for_its_scales_of_tokens(fsdp):
    """Weights have one scale wherever they lie; x and dy have each device's own, which move bits as roundings do."""
    recipe = Recipe.act24(token_blocks=8, precision="fp8")
    config = run_config(batch_size=16, seq_len=64, phases=((0, recipe),), fp8_head=True)
    config = replace(config, mesh=Mesh(data=8 // fsdp, fsdp=fsdp))

    def gradients_of(layout):
        graphdef, state = decoder.structure(config.model, config.max_experts), initial_state(config, layout)
        gradients = jax.jit(make_gradients(graphdef, config, layout), static_argnames="recipe")
        grads, _, metrics = gradients(state.params, state.method, layout.rows(BATCH), jax.random.key(1), recipe=recipe)
        return grads, metrics["loss"]

    (found, loss), (expected, whole) = gradients_of(layout_of(config)), gradients_of(ONE_DEVICE)
    assert float(loss) == pytest.approx(float(whole), rel=1e-4)
    errors = jax.tree.map(relative_error, found, expected)
    assert max(jax.tree.leaves(errors)) < 0.05, errors


@pytest.mark.parametrize(("accumulation", "shape"), [(1, "32x16"), (2, "2x32x16")], ids=["by layer", "at the end"])
def test_copies_sum_a_layers_gradients_in_the_backward_unless_there_are_microbatches(accumulation, shape):
    """W1 is 32 x 64 in each of two layers, over four devices."""
    config = replace(run_config(batch_size=16, accumulation=accumulation), mesh=Mesh(data=2, fsdp=4))
    layout, graphdef = layout_of(config), decoder.structure(config.model, config.max_experts)
    state, gradients = initial_state(config, layout), make_gradients(graphdef, config, layout)
    arguments = (state.params, state.method, layout.rows(BATCH), jax.random.key(1))
    text = jax.jit(gradients, static_argnames="recipe").lower(*arguments, recipe=Recipe()).as_text()
    summed = re.findall(r"\}\) : \(tensor<((?:2x)?32x16)xf32>\) -> tensor<\1xf32>", text)
    assert set(summed) == {shape}


def test_muon_shares_matrices_among_devices():
    """Two layers, so stacks of two and four matrices on eight devices: the same update as on one."""
    config = replace(run_config(batch_size=16, optimizer={"kind": "muon"}), mesh=Mesh(data=2, fsdp=4))
    layout = layout_of(config)

    def step_of(layout):
        state = initial_state(config, layout)
        train_step = make_train_step(decoder.structure(config.model, config.max_experts), config, layout)
        for _ in range(2):
            state, _ = train_step(state, layout.rows(BATCH[:, :17]))
        return state

    found, expected = step_of(layout), step_of(ONE_DEVICE)
    start = initial_state(config)
    for name in ("w1", "w2"):
        after, alone, before = (np.asarray(one.params["blocks"]["ffn"][name]) for one in (found, expected, start))
        assert relative_error(after - before, alone - before) < 1e-3
        assert np.abs(alone - before).max() > 0
