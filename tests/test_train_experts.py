"""Runs of models with gated FFNs and mixtures of experts."""

import shutil
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_close
from tests.trainer import MODEL, assert_same_bits, build, final_state, records, run_config, run_to_end
from train.config.settings import Model, load_config
from train.model import arcee, cache, decoder
from train.model.mesh import ONE_DEVICE
from train.records.logger import plan
from train.state.memory import estimate
from train.state.state import initial_state
from train.step.step import make_gradients
from venom_jax import Recipe

GATED: dict[str, Any] = {"gated": True, "activation": "relu"}
EXPERTS: dict[str, Any] = {
    "experts": 4,
    "experts_per_token": 2,
    "shared_experts": 1,
    "d_expert": 16,
    "expert_scores": "sigmoid",
}
SHAPES: dict[str, dict[str, Any]] = {"gated": GATED, "experts": EXPERTS, "gated experts": GATED | EXPERTS}
PHASES = ((0, "dense"), (4, "all24"), (10, "dense"))


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gated", "experts")]


@pytest.mark.parametrize("name", ["gated experts", *_SLOW])
def test_a_run_resumes_bit_by_bit(name, tmp_path):
    """Through all phases, with microbatches that share packed weights; stopped in the middle of a sparse one."""
    kept = {"checkpoint_every": 3, "keep_checkpoints": 9, "eval_every": 12}
    config = run_config(shape=SHAPES[name], phases=PHASES, accumulation=2, **kept)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_to_end(config, whole) == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "12")
    assert run_to_end(config, parts) == 0
    assert_same_bits(final_state(config, parts), final_state(config, whole))
    found = records(whole, "train")
    assert found[-1]["loss"] < found[0]["loss"] - 0.5
    if "experts" in name:
        assert found[5]["load_mean"] == pytest.approx(0.5), "half of four experts"
        assert found[5]["load_min"] < found[5]["load_max"]


@pytest.mark.parametrize("name", SHAPES)
def test_counts(name):
    config = replace(MODEL, **SHAPES[name])
    _, params, _ = build(config, 1, 0)
    sizes = jax.tree.map(lambda leaf: leaf.size, params)
    assert decoder.parameter_count(config) == sum(jax.tree.leaves(sizes))
    idle = 2 * 16 * MODEL.d_model * config.ffn_matrices * MODEL.layers if config.experts else 0
    assert decoder.active_parameter_count(config) == decoder.parameter_count(config) - idle
    ffn = sum(jax.tree.leaves(sizes["blocks"]["ffn"])) - idle
    assert decoder.component_flops(config, 16)["ffn"] == 6 * ffn, "two operations forward, four backward"


def test_a_gate_executes_two_thirds_with_act24():
    """Of nine products y1 twice and dh stay dense: three, and six take half."""
    config = replace(MODEL, **GATED)
    dense, sparse = (decoder.flops_per_token(config, 16, recipe) for recipe in (Recipe(), Recipe.act24()))
    assert dense - sparse == pytest.approx(decoder.component_flops(config, 16)["ffn"] / 3)


def test_the_plan_names_active_parameters():
    config = run_config(shape=EXPERTS, phases=((0, "act24"),))
    assert f"{decoder.active_parameter_count(config.model):,} active" in plan(config)
    assert estimate(config, 1, 1).parameters == 4 * decoder.parameter_count(config.model)


def test_auxiliary_losses_reach_the_router():
    tokens = jax.random.randint(jax.random.key(0), (8, 17), 0, MODEL.vocab_size)
    found = {}
    for name, extra in (("none", {}), ("z", {"expert_z_loss": 1.0}), ("balance", {"expert_balance_loss": 1.0})):
        config = run_config(shape=EXPERTS | extra)
        state = initial_state(config)
        graphdef = decoder.structure(config.model, 1)
        step = jax.jit(make_gradients(graphdef, config, ONE_DEVICE), static_argnames="recipe")
        grads, _, metrics = step(state.params, state.method, tokens, jax.random.key(0), recipe=Recipe())
        found[name] = (metrics["loss"], grads["blocks"]["ffn"]["router"])
    assert found["z"][0] > found["none"][0] + 2, "two layers of about (log 4)^2"
    assert found["balance"][0] > found["none"][0] + 1.9
    for name in ("z", "balance"):
        assert np.abs(found[name][1] - found["none"][1]).max() > 1e-5


def test_the_bias_moves_once_a_step():
    config = run_config(shape=EXPERTS)
    before = initial_state(config).method["blocks"]["ffn"]["bias"]
    load = jnp.tile(jnp.array([9.0, 1, 1, 1]), (MODEL.layers, 1))
    method = initial_state(config).method
    after = decoder.balance(config.model, method, load, Recipe())["blocks"]["ffn"]["bias"]
    np.testing.assert_allclose(after - before, jnp.tile(jnp.array([-1, 1, 1, 1]) * 1e-3, (MODEL.layers, 1)))


def test_tokens_one_by_one_are_those_of_a_whole_sequence():
    graphdef, params, method = build(replace(MODEL, **EXPERTS), 1, 0)
    model = decoder.assemble(graphdef, params, method)
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, MODEL.vocab_size)
    expected, *_ = model.hidden(tokens, recipe=Recipe())
    keys = cache.empty(model, 2, 8, jnp.float32)
    for i in range(8):
        hidden, keys = cache.extend(model, tokens[:, i : i + 1], keys, i)
        assert_close(hidden[:, 0], expected[:, i])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"experts": 1}, "use at least 2"),
        ({"experts": 2, "experts_per_token": 3}, "Model.experts_per_token=3"),
        ({"shared_experts": 1}, "Model.experts=0 has none"),
        ({"activation": "gelu"}, "Model.activation='gelu' must be one of 'relu2', 'relu', 'relu2_clamped'"),
        ({"clamp": 0.0}, "clamp = 0.0"),
    ],
)
def test_bad_shapes_are_named(shape, message):
    with pytest.raises(ValueError, match=message):
        replace(MODEL, **shape)


def test_what_does_not_go_together_is_named():
    with pytest.raises(ValueError, match="routes by itself"):
        run_config(shape=EXPERTS, phases=((0, "venom"),))
    with pytest.raises(ValueError, match=r"Train.diagnosis_every=3 looks into a plain"):
        run_config(shape=GATED, diagnosis_every=3)
    with pytest.raises(NotImplementedError, match="have no export"):
        arcee.config_json(Model(**vars(MODEL) | GATED), seq_len=16, eos_id=0, dtype="float32")


@pytest.mark.parametrize("name", ["gated", "experts"])
def test_the_bundled_options_load(name):
    files = ["configs/size/tiny.gin", "configs/recipe/act24.gin", f"configs/options/{name}.gin"]
    assert not load_config(files, ["Data.synthetic = True"]).model.is_plain
