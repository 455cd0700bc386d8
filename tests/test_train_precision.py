"""Runs in eight bits: which layers and phases, exact resumes, a change of precision, figures, refusals."""

import json
import shutil
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_close, relative_error
from tests.trainer import assert_same_bits, final_state, gin_bindings, records, run_config, run_to_end
from train import loop
from train.config.settings import load_config
from train.model import decoder
from train.model.cross_entropy import weighted_cross_entropy
from train.records import logger
from train.records.bench import measure, parse_recipe
from train.state.checkpoint import describe
from train.state.state import initial_state, run_structure
from train.step import explain
from venom_jax import LayerRecipes, Recipe
from venom_jax.fp8 import linear

FP8: dict[str, Any] = {"precision": "fp8"}


def labels(config):
    return [(phase.start, phase.label) for phase in config.schedule.phases]


def test_the_runs_precision_is_that_of_what_names_none():
    config = run_config(phases=((0, "dense"), (4, "act24@compute"), (8, Recipe.venom(4, 1))), precision="fp8")
    assert labels(config) == [(0, "dense fp8"), (4, "act24"), (8, "act24+w24 E=4 k=1 fp8")]
    config = run_config(phases=((0, "dense"), (4, "act24@fp8"), (8, Recipe.act24(**FP8))))
    assert labels(config) == [(0, "dense"), (4, "act24 fp8"), (8, "act24 fp8")]


def test_gin_names_the_precision():
    bindings = [*gin_bindings(Train_precision="fp8"), "half/Recipe.preset = 'act24'", "half/Recipe.experts = 2"]
    config = load_config([], [*bindings, "Phases.schedule = [(0, 'half@compute'), (3, 'half'), (5, @late/Recipe())]",
                              "late/Recipe.preset = 'all24'", "late/Recipe.precision = 'fp8'"])  # fmt: skip
    assert labels(config) == [(0, "half E=2 k=1"), (3, "half E=2 k=1 fp8"), (5, "act24+w24 fp8")]
    with pytest.raises(ValueError, match=r"'act24@fp4' has the precision 'fp4'; the precisions are compute, fp8"):
        load_config([], [*gin_bindings(), "Phases.schedule = [(0, 'act24@fp4')]"])


def test_edges_and_end_stay_in_the_compute_dtype():
    plain, eight = Recipe.act24(), Recipe.act24(**FP8)
    config = run_config(
        shape={"layers": 6}, phases=((0, "dense"), (4, "act24"), (9, "all24")), fp8_edges=2, fp8_until=0.5, **FP8
    )
    assert [phase.start for phase in config.schedule.phases] == [0, 4, 6, 9]
    assert config.schedule.phases[1].recipe == LayerRecipes(((0, plain), (2, eight), (4, plain)))
    assert config.schedule.phases[1].label == "act24, act24 fp8 from layer 2, act24 from layer 4"
    assert labels(config)[2:] == [(6, "act24"), (9, "all24")]
    with pytest.raises(ValueError, match=r"fp8_edges=3 leaves no layer of Model.layers=6 in eight bits"):
        run_config(shape={"layers": 6}, fp8_edges=3, **FP8)


def test_what_eight_bits_do_not_take_is_said_before_anything_runs():
    with pytest.raises(ValueError, match=r"precision = 'fp8' has no scales for wgrad = 'mvue'"):
        run_config(phases=((0, Recipe.act24(wgrad="mvue")),), **FP8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in eight bits, sparse from step 2 on, every two steps saved, with evaluation, diagnosis and a sample."""
    config = run_config(
        phases=((0, "dense"), (2, "all24")), steps=4, eval_every=2, checkpoint_every=2, keep_checkpoints=9,
        diagnosis_every=4, **FP8,
    )  # fmt: skip
    workdir = tmp_path_factory.mktemp("fp8")
    assert run_to_end(config, workdir) == 0
    return config, workdir


def resumed(workdir, step, folder):
    """A copy of the workdir without the checkpoints behind a step."""
    shutil.copytree(workdir, folder)
    for saved in (folder / "checkpoints").iterdir():
        if int(saved.name) > step:
            shutil.rmtree(saved)
    return folder


def test_resuming_equals_never_stopping(finished, tmp_path):
    config, uninterrupted = finished
    workdir = resumed(uninterrupted, 2, tmp_path / "again")
    assert run_to_end(config, workdir) == 0
    assert records(workdir) == records(uninterrupted)
    assert_same_bits(final_state(config, workdir), final_state(config, uninterrupted))
    losses = [record["loss"] for record in records(workdir, "train")]
    assert losses[-1] < losses[0]
    assert all(np.isfinite(record["val_loss_sparse"]) for record in records(workdir, "eval")[1:])
    assert (workdir / "sample.txt").read_text()


def test_a_checkpoint_goes_on_in_another_precision_and_back(finished, tmp_path):
    """As a run does whose schedule says so; nothing of a checkpoint belongs to one precision."""
    config, uninterrupted = finished
    phases = ((0, "dense@fp8"), (2, "all24@compute"))
    scheduled = replace(config, phases=replace(config.phases, schedule=phases))
    assert run_to_end(scheduled, tmp_path / "scheduled") == 0
    workdir = resumed(uninterrupted, 2, tmp_path / "switched")
    plain = replace(config, train=replace(config.train, precision="compute"))
    assert run_to_end(plain, workdir) == 0
    assert_same_bits(final_state(plain, workdir), final_state(scheduled, tmp_path / "scheduled"))
    other = final_state(config, uninterrupted)
    assert any(found.tobytes() != other[name].tobytes() for name, found in final_state(plain, workdir).items())
    # The way back, now with a phase for the precision alone, which the checkpoint knows nothing of.
    phases = ((0, "dense@fp8"), (1, "dense@compute"), (2, "all24@fp8"))
    back = replace(scheduled, phases=replace(config.phases, schedule=phases))
    workdir = resumed(workdir, 2, tmp_path / "back")
    assert run_to_end(back, workdir) == 0
    found = final_state(back, workdir)
    assert found.pop(".phase") == 2
    assert_same_bits(found, {name: value for name, value in other.items() if name != ".phase"})


def test_an_older_checkpoint_does_not_name_the_precision():
    assert describe(Recipe.act24(**FP8)) == describe(Recipe.act24())
    mixed = LayerRecipes(((0, Recipe.act24()), (1, Recipe.act24(**FP8)), (3, Recipe.dense(**FP8))))
    assert describe(mixed) == f"LayerRecipes(0: {describe(Recipe.act24())}, 3: {describe(Recipe.dense())})"
    assert describe(LayerRecipes(mixed.starts[:2])) == describe(Recipe.act24())


def test_the_projections_are_in_eight_bits_where_the_layer_is():
    config = run_config()
    graphdef, state = run_structure(config), initial_state(config)
    block = jax.tree.map(lambda leaf: leaf[0], state.params["blocks"]["attention"])
    x = jax.random.normal(jax.random.key(0), (2, 16, 32))
    wanted = linear(x, block["qkv"])
    assert relative_error(wanted, x @ block["qkv"]) > 0.01
    assert_close(decoder.Multiply(in_fp8=True)(x, block["qkv"], "qkv"), wanted)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 16), np.int32))
    model = decoder.assemble(graphdef, state.params, state.method)
    recipes = {"plain": Recipe(), "eight": Recipe(**FP8), "mixed": LayerRecipes(((0, Recipe()), (1, Recipe(**FP8))))}
    logits = {name: model(tokens, recipe=recipe)[0] for name, recipe in recipes.items()}
    assert relative_error(logits["eight"], logits["plain"]) > relative_error(logits["mixed"], logits["plain"]) > 1e-3


@pytest.mark.parametrize("slices", [1, 2])
def test_the_head_in_eight_bits(slices):
    keys = jax.random.split(jax.random.key(1), 3)
    hidden, head = jax.random.normal(keys[0], (2, 16, 32)), jax.random.normal(keys[1], (32, 48)) / 6
    labels = jax.random.randint(keys[2], (2, 16), 0, 48)
    weights = jnp.full((2, 16), 1 / 32)

    def loss_and_gradients(in_fp8):
        def loss(hidden, head):
            return weighted_cross_entropy(hidden, head, labels, weights, slices, 1e-4, in_fp8)

        return jax.value_and_grad(loss, (0, 1))(hidden, head)

    (found, gradients), (wanted, expected) = loss_and_gradients(True), loss_and_gradients(False)
    assert float(found) == pytest.approx(float(wanted), rel=0.01)
    assert found != wanted
    alone = weighted_cross_entropy(hidden, head, labels, weights, slices, 1e-4, True)
    assert float(alone) == pytest.approx(float(found), rel=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        assert 0.005 < relative_error(one, other) < 0.1


def test_microbatches_share_their_casts():
    """Weights packed once for all microbatches are those that each would have packed."""
    config = run_config(phases=((0, "all24"),), accumulation=2, **FP8)
    state = initial_state(config)
    recipe: Any = config.schedule.recipes[0]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (8, 16), np.int32))
    model = decoder.assemble(run_structure(config), state.params, state.method)
    packed = decoder.pack_ffns(state.params, state.method, recipe, jnp.float32)
    assert packed is not None
    one, other = (model(tokens, recipe=recipe, packed=given)[0] for given in (packed, None))
    assert np.array_equal(one, other)
    mixed = LayerRecipes(((0, Recipe()), (1, recipe)))
    assert decoder.pack_ffns(state.params, state.method, mixed, jnp.float32) is None


def test_operations_on_eight_bits_count_half():
    shape = run_config().model
    parts = decoder.component_flops(shape, 16)
    found = decoder.compute_flops_per_token(shape, 16, Recipe.dense(**FP8))
    assert found == parts["head"] + parts["attention"] + (parts["projections"] + parts["ffn"]) / 2
    assert decoder.compute_flops_per_token(shape, 16, Recipe.dense()) == decoder.flops_per_token(shape, 16, Recipe())
    sparse = decoder.compute_flops_per_token(shape, 16, Recipe.act24(**FP8), fp8_head=True)
    assert sparse == (parts["head"] + parts["projections"]) / 2 + parts["attention"] + parts["ffn"] / 3


def test_the_plan_and_the_first_line_say_it():
    config = run_config(phases=((0, "dense"), (4, "act24@compute")), **FP8)
    assert "steps 0 to 4: dense fp8, executes 100.0% of the dense FLOPs, 59.3% of them on eight bits" in logger.plan(
        config
    )
    assert "no sparse kernels: act24; as products of rounded operands, no kernels of eight bits: dense fp8" in (
        logger.opening(config, 1)
    )


def test_a_race_of_all_recipes(tmp_path, capsys):
    output = tmp_path / "steps.json"
    rows = measure(
        run_config(), ["dense@fp8", "act24@fp8"], "small", 1, parts=True, switch=True, output=output, together=True
    )
    assert [(row["case"], row["precision"]) for row in rows] == [
        ("small dense", "float32"), ("small dense fp8", "fp8"), ("small act24 fp8", "fp8")
    ]  # fmt: skip
    assert {row["rival_ms"] for row in rows} == {rows[0]["ms"]}
    assert rows[2]["dense_fp8_ms"] == rows[1]["ms"]
    assert rows[2]["speedup_over_dense_fp8"] == pytest.approx(rows[1]["ms"] / rows[2]["ms"], rel=0.01)
    assert all("part_ms" in row for row in rows)
    assert json.loads(output.read_text()) == rows
    assert parse_recipe("venom:4:1@fp8") == ("venom E=4 k=1 fp8", Recipe.venom(4, 1, **FP8))


def test_the_guard_says_where_eight_bits_are_to_blame(monkeypatch):
    config = run_config(phases=((0, "dense"),), **FP8)
    state = initial_state(config)

    def tensors(graphdef, config, recipe, *rest):
        yield "the output of layer 0", jnp.asarray([jnp.nan if recipe.in_fp8 else 1.0])
        yield "the gradient of head", jnp.ones(1)

    monkeypatch.setattr(explain, "_tensors", tensors)
    found = explain.first_bad(run_structure(config), config, state, jnp.zeros((8, 17), jnp.int32), 0)
    assert found == (
        "not finite is the output of layer 0 (1 NaN and 0 inf of 1 values) in eight bits; in float32 all is: try "
        "Train.precision='compute'"
    )


def test_the_guard_finds_what_is_not_finite_in_eight_bits():
    config = run_config(phases=((0, "act24"),), **FP8)
    state = loop.first_state(config, None)[0]
    blocks = state.params["blocks"]
    w2 = blocks["ffn"]["w2"].at[1, 2, 3].set(jnp.nan)
    broken = replace(state, params=state.params | {"blocks": blocks | {"ffn": blocks["ffn"] | {"w2": w2}}})
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (8, 17), np.int32))
    seen = explain._tensors(run_structure(config), config, config.schedule.recipes[0], broken, tokens, 0)
    bad = (name for name, value in seen if not np.isfinite(np.asarray(value, np.float32)).all())
    assert [next(bad), next(bad)] == ["the parameter ffn.w2 in layer 1", "the output of layer 1 (behind the FFN)"]
