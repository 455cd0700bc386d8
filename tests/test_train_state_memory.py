"""What a step takes of memory, reckoned: against the compiler's figure, and what is said of a model that cannot fit."""

import dataclasses
from typing import Any

import jax
import pytest

from tests.trainer import run_config
from train.config.settings import Mesh, load_config
from train.model import decoder
from train.model.mesh import layout_of
from train.records.bench import parse_recipe, with_phases
from train.records.logger import plan
from train.state import memory
from train.state.state import initial_state
from train.step.step import make_train_step


def of_1b(**bindings):
    bound = [f"{name.replace('_', '.', 1)} = {value!r}" for name, value in bindings.items()]
    return load_config(["configs/size/1b.gin"], ["Data.folder = 'data'", *bound])


def test_what_lies_in_memory_between_steps_is_exact():
    config = run_config()
    state = initial_state(config)
    step: Any = make_train_step(decoder.structure(config.model, 1), config)
    batch = jax.ShapeDtypeStruct((8, 17), "int32")
    arguments = step.lower(state, batch).compile().memory_analysis().argument_size_in_bytes
    found = memory.estimate(config, 1, 1)
    assert found.parameters == decoder.parameter_count(config.model) * 4
    # Beside them tokens, counters and the method's state.
    assert found.parameters + found.optimizer == pytest.approx(arguments, rel=0.02)


@pytest.mark.parametrize(
    ("bindings", "gib"),
    [({"Train_remat": "dots", "Train_unroll": 1}, 38.5), ({"Train_remat": "none", "Train_unroll": 22}, 44.5)],
    ids=["loop", "unrolled"],
)
def test_a_step_of_1b_on_an_h100(bindings, gib):
    """What XLA allots to the compiled step."""
    found = memory.estimate(of_1b(Train_loss_chunks=8, **bindings), 1, 1)
    assert found.total / 2**30 == pytest.approx(gib, rel=0.12)


@pytest.mark.parametrize(
    ("size", "recipe", "devices", "gib"),
    [
        ("1b", "dense", 1, 46.1),
        ("1b", "act24", 1, 41.2),
        ("1b", "venom:4:2", 1, 37.7),
        ("1b", "venom:16:1", 1, 34.4),
        ("7b-layers", "dense", 1, 37.7),
        ("7b-layers", "venom:4:1", 1, 31.1),
        ("1b", "dense", 2, 35.2),
        ("1b", "venom:4:1", 2, 25.4),
    ],
)
def test_unrolled_layers_take_what_they_took(size, recipe, devices, gib):
    """2 x 8,192 tokens a device: docs/results/h100/train.json, and docs/results/compiled-memory.json for two."""
    bindings = ["Data.synthetic = True", f"Train.batch_size = {2 * devices}"]
    config = with_phases(load_config([f"configs/size/{size}.gin"], bindings), [parse_recipe(recipe)[1]])
    assert memory.estimate(config, 1, devices).total / 2**30 == pytest.approx(gib, rel=0.06)


@pytest.mark.parametrize(
    ("recipe", "gib"),
    [("dense", 34.6), ("act24", 32.2), ("all24", 30.6), ("act24:4:2", 30.7), ("venom:4:1", 29.1)],
)
def test_layers_in_eight_bits_take_what_they_took(recipe, gib):
    """8 of 7B's layers: docs/results/h200/train8.json."""
    config = with_phases(
        load_config(["configs/size/7b-layers.gin"], ["Data.synthetic = True"]), [parse_recipe(f"{recipe}@fp8")[1]]
    )
    assert memory.estimate(config, 1, 1).total / 2**30 == pytest.approx(gib, rel=0.07)


def test_microbatches_have_a_sum_of_gradients_beside_their_own():
    one, two = (memory.estimate(of_1b(Train_accumulation=n), 1, 1) for n in (1, 2))
    assert two.gradients == 2 * one.gradients
    assert two.activations * 2 == one.activations


def test_devices_share_what_is_cut():
    one, four = (memory.estimate(of_1b(Train_batch_size=8), 1, n) for n in (1, 4))
    assert four.fixed == pytest.approx(one.fixed / 4, rel=1e-3)
    assert four.activations * 4 == one.activations


def test_dry_run_shows_devices_that_are_not_there():
    text = plan(of_1b(Train_batch_size=8, Mesh_fsdp=4))
    assert "4 (Mesh.data=1 x Mesh.fsdp=4)" in text
    assert "GiB a device" in text
    with pytest.raises(ValueError, match=r"Train.batch_size=2 .* use a multiple of 4"):
        plan(of_1b(Mesh_fsdp=4))


def test_a_model_that_cannot_fit_is_refused_with_the_number_of_devices(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 2**34}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    message = r"does not fit: .* 16.00 GiB each, .* use Mesh.fsdp=2 or more .*XLA_PYTHON_CLIENT_MEM_FRACTION"
    with pytest.raises(ValueError, match=message):
        memory.check_fits(of_1b(), 1, 1)
    warning = memory.check_fits(of_1b(Train_batch_size=16), 1, 2)
    assert warning is not None
    assert "raise Train.accumulation" in warning
    assert memory.check_fits(run_config(), 1, 1) is None


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (Mesh(data=2, fsdp=2), r"Mesh.data=2 x Mesh.fsdp=2 needs 4 devices, but there are 1"),
        (Mesh(data=2, fsdp=None), r"Mesh.data=2 does not divide 1 devices"),
    ],
)
def test_a_mesh_larger_than_the_machine_is_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        layout_of(dataclasses.replace(run_config(), mesh=mesh))
