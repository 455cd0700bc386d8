"""What a run may have besides: a moving average, samples on the way, checkpoints kept for good; all of it resumes."""

import shutil

import jax
import numpy as np
import pytest

from tests.trainer import assert_same_bits, final_state, gin_bindings, records, run_config, run_to_end
from train import loop
from train.config.settings import load_config
from train.data.token_files import train_iterator
from train.evaluation import validation
from train.evaluation.export import export
from train.records import metrics
from train.state.state import abstract_state, initial_state
from venom_jax import Recipe, router

OPTIONS = {
    "Optimizer_ema": 0.9,
    "Optimizer_first_moment_dtype": "bfloat16",
    "Optimizer_no_decay": ["*scale", "embedding"],
    "Model_qk_norm": True,
    "Model_document_start": 0,
    "Train_z_loss": 1e-3,
    "Train_steps": 9,
    "Train_keep_checkpoints": 1,
    "Train_keep_every": 3,
    "Train_checkpoint_every": 1,
    "Train_eval_every": 9,
    "Train_sample_every": 4,
}
SCHEDULE = "Phases.schedule = [(0, 'dense'), (4, 'all24'), (7, 'dense')]"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, workdir) of a run with everything on, and a sparse phase in it."""
    config, workdir = load_config([], [*gin_bindings(**OPTIONS), SCHEDULE]), tmp_path_factory.mktemp("options")
    assert run_to_end(config, workdir) == 0
    return config, workdir


def test_it_resumes_to_the_same_bits(finished, tmp_path):
    """From step 6, inside the sparse phase; the average is baked at 7, as the weights are."""
    config, whole = finished
    workdir = shutil.copytree(whole, tmp_path / "resumed")
    shutil.rmtree(workdir / "checkpoints" / "9")
    assert run_to_end(config, workdir) == 0
    assert records(workdir) == records(whole)
    found = final_state(config, workdir)
    assert_same_bits(found, final_state(config, whole))
    assert {str(found[name].dtype) for name in found if ".mu" in name} == {"bfloat16"}
    assert any(name.startswith(".ema") for name in found)


def test_the_newest_and_the_round_steps_are_kept(finished):
    assert sorted(path.name for path in (finished[1] / "checkpoints").iterdir()) == ["3", "6", "9"]


def test_samples_come_on_the_way(finished):
    samples = records(finished[1], "sample")
    assert [record["step"] for record in samples] == [4, 8]
    assert all(record["text"].startswith("The ") for record in samples)
    assert samples[0]["text"] != samples[1]["text"]


def test_the_average_is_evaluated_beside_the_last_weights(finished):
    config, workdir = finished
    for record in records(workdir, "eval"):
        assert record["val_loss_ema"] != record["val_loss"]
    last = records(workdir, "eval")[-1]
    run = validation.restore(workdir, ema=True)
    values = validation.Evaluator(run.graphdef, config, loop.open_data(config)[1])(run.state, int(run.state.phase))
    assert values["val_loss"] == last["val_loss_ema"]
    assert "val_loss_ema" not in values


def test_the_average_takes_part_in_every_transition():
    """Equal to the parameters before, it is equal to them after: permuted, and baked, with them."""
    config = run_config(phases=((0, "dense"), (3, "venom"), (6, "dense")), optimizer={"ema": 0.9})
    state = initial_state(config)
    first = state.params
    for index in (1, 2):
        state, _ = loop.switch_phase(state, config, index)
        jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    w1 = np.asarray(state.params["blocks"]["ffn"]["w1"])
    assert (np.count_nonzero(w1.reshape(2, 8, 4, -1), axis=2) <= 2).all(), "baked"
    assert (np.asarray(first["blocks"]["ffn"]["w1"]) != w1).any()


def test_what_has_no_average_or_no_export_says_so(finished, tmp_path):
    with pytest.raises(NotImplementedError, match=r"Model.qk_norm=True has no export"):
        export(str(finished[1]), tmp_path / "out", "float32")
    (tmp_path / "config.gin").write_text(load_config([], gin_bindings()).text)
    with pytest.raises(ValueError, match=r"no averaged weights: its run had Optimizer.ema=None"):
        validation.restore(tmp_path, ema=True)


def test_the_most_used_device_counts(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device({"peak_bytes_in_use": 5}), Device({}), Device(None)])
    assert metrics.peak_memory() == 5
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    assert metrics.peak_memory() is None


def test_a_learned_router_is_fitted_at_its_phase_and_routes():
    """Each token goes where <x, r_e> of the fitted rows is largest, in the state and structure of the run."""
    learned = Recipe.act24(experts=4, router="learned")
    config = run_config(phases=((0, "dense"), (4, learned)))
    state, report = loop.switch_phase(initial_state(config), config, 1)
    assert report["clustered_experts"] == 4
    rows = np.asarray(state.method["blocks"]["ffn"]["router"])
    assert rows.shape == (config.model.layers, 4, config.model.d_model)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1).mean(axis=-1), 1, rtol=1e-5)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_state(config))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)

    inputs = loop.sample_ffn_inputs(state, config, learned, loop.ONE_DEVICE)
    diagnosis = loop.make_diagnosis(loop.run_structure(config), config)
    tokens = np.asarray(next(train_iterator(loop.open_data(config)[0], batch_size=8, seq_len=16, seed=0))["tokens"])
    figures, _ = diagnosis(state.params, state.method, tokens, None, recipe=learned)
    assert (np.asarray(figures["kept_router"]) <= np.asarray(figures["kept_oracle"]) + 1e-6).all()
    chosen = [np.argmax(np.asarray(x) @ own.T, axis=1) for x, own in zip(inputs, rows, strict=True)]
    w1 = state.params["blocks"]["ffn"]["w1"]
    for layer, expected in enumerate(chosen):
        found = router.route(inputs[layer], w1[layer], learned, learned=state.method["blocks"]["ffn"]["router"][layer])
        assert (np.asarray(found)[:, 0] == expected).mean() > 0.99
    with pytest.raises(ValueError, match="make the layer with learned_router=True"):
        router.route(inputs[0], w1[0], learned)
