"""A whole run: what it writes, how it stops, what it refuses to save."""

import json
import signal
from dataclasses import replace

import optax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer import records, run_config, run_to_end, three_phases
from train import loop
from train.config.settings import LearningRate, Phases
from train.records import logger
from train.records.metrics import cut_metrics, read_metrics
from train.step.guard import BadStepError
from venom_jax import Recipe

VENOM = "act24+w24 E=4 k=1"


@pytest.fixture(scope="module")
def finished():
    """The workdir of a run from start to end."""
    return three_phases()[1]


def test_one_program_serves_all_phases():
    assert three_phases()[2]._cache_size() == 1


def test_each_step_is_recorded_once_with_its_phase(finished):
    train = records(finished, "train")
    assert [record["step"] for record in train] == list(range(1, 13))
    assert [record["phase_index"] for record in train] == [0] * 4 + [1] * 4 + [2] * 4
    assert {record["phase"] for record in train} == {"dense", VENOM}
    for record in train:
        assert {"loss", "grad_norm", "lr", "density", "phase"} <= record.keys()
        assert ("load_max" in record) == (record["phase_index"] == 1)
    assert all(record["tokens_per_second"] > 0 for record in read_metrics(finished) if record["kind"] == "train")
    assert not any("mfu_dense" in record for record in train), "no peak is known for a CPU"


def test_phases_are_announced_with_what_changed(finished):
    phases = records(finished, "phase")
    assert [(record["step"], record["phase"]) for record in phases] == [
        (0, "dense"),
        (4, VENOM),
        (8, "dense"),
    ]
    assert phases[1]["report"]["clustered_experts"] == 4
    assert phases[1]["report"]["beta_y1"] == pytest.approx(1.48, abs=0.1)
    assert phases[2]["report"] == {"baked_w1": 1}


def test_both_figures_are_reported_in_a_sparse_phase_only(finished):
    evaluations = {record["step"]: record for record in records(finished, "eval")}
    assert list(evaluations) == [3, 6, 9, 12]
    assert [step for step, record in evaluations.items() if "val_loss_sparse" in record] == [6]
    six = evaluations[6]
    assert six["val_loss_sparse"] != six["val_loss"]
    # loss / ln 2 / bytes per token: the ratio is the same for every evaluation of the same data.
    ratios = [record["val_bits_per_byte"] / record["val_loss"] for record in evaluations.values()]
    assert ratios == pytest.approx([ratios[0]] * 4)
    assert six["val_bits_per_byte_sparse"] / six["val_loss_sparse"] == pytest.approx(ratios[0])


def test_it_learns(finished):
    losses = [record["val_loss"] for record in records(finished, "eval")]
    assert losses[-1] < losses[0] - 0.3


def test_diagnosis_is_recorded(finished):
    """Masks are compared within a phase only: the neurons move between phases."""
    diagnoses = {record["step"]: record for record in records(finished, "diagnosis")}
    assert list(diagnoses) == [3, 6, 9, 12]
    assert 0 < diagnoses[6]["kept_router"] < diagnoses[6]["kept_oracle"] < 1
    assert diagnoses[12]["kept_router"] == 1
    assert [step for step, record in diagnoses.items() if "flip_rate" in record] == [12]


def test_the_end_is_summarised_plotted_and_sampled(finished):
    (end,) = records(finished, "end")
    assert end["val_loss"] == records(finished, "eval")[-1]["val_loss"]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "sample.txt").read_text().startswith("The ")


def test_tensorboard_reads_the_same_numbers(finished):
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    expected = {record["step"]: record["loss"] for record in records(finished, "train")}
    assert found == pytest.approx(expected)
    assert len(events.Scalars("eval/val_bits_per_byte_sparse")) == 1


def test_layers_shared_experts_and_a_soft_landing_in_one_run(tmp_path):
    """Layer 0 does not route, layer 1 has a shared expert; W2 shrinks and the learning rate rises as routing ends."""
    upper = Recipe.venom(4, 2, shared=1, clustering="coactivation", balance_rate=0.01)
    schedule = ((0, "dense"), (2, ((0, Recipe.act24()), (1, upper))), (4, "dense"))
    config = run_config(steps=6, diagnosis_every=4, eval_every=6, checkpoint_every=6, sample_tokens=0)
    rate = LearningRate(1e-2, warmup=1, rewarm=2)
    assert run_to_end(replace(config, phases=Phases(schedule, rescale=True), learning_rate=rate), tmp_path) == 0
    reports = [record["report"] for record in records(tmp_path, "phase")]
    assert [report.get("clustered_experts") for report in reports] == [None, 4, None]
    assert ["rescaled_w2" in report for report in reports] == [False, False, True]
    assert reports[2]["baked_w1"] == 1
    assert 0 < reports[2]["rescaled_w2"] < 1
    train = records(tmp_path, "train")
    assert [record.get("load_mean") for record in train] == [None] * 2 + [pytest.approx(1 / 3)] * 2 + [None] * 2
    schedule = optax.warmup_cosine_decay_schedule(0, 1e-2, 1, 6, 5e-4)
    assert [record["lr"] / schedule(step) for step, record in enumerate(train) if step] == pytest.approx(
        [1, 0.5, 1, 0.5, 1]
    )
    (diagnosis,) = records(tmp_path, "diagnosis")
    below, above = diagnosis["layers"]["kept_router"]
    assert below == 1
    assert above < 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(tmp_path, monkeypatch, capsys, number, code):
    config = run_config()
    original = loop.Logger.log

    def log_then_signal(self, step, *rest):
        original(self, step, *rest)
        if step == 3:
            signal.raise_signal(number)

    monkeypatch.setattr(loop.Logger, "log", log_then_signal)
    handler = signal.getsignal(number)
    run = loop.prepare(config, tmp_path)
    assert loop.train(run) == code
    assert signal.getsignal(number) is handler
    assert "saved step 3; run again to continue" in capsys.readouterr().out
    assert loop.prepare(config, tmp_path).checkpoints.latest == 3
    assert [record["step"] for record in records(tmp_path, "train")] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_unsaved(tmp_path):
    config = replace(
        run_config(steps=1000, checkpoint_every=1, keep_checkpoints=1000), learning_rate=LearningRate(peak=1e30)
    )
    run = loop.prepare(config, tmp_path)
    with pytest.raises(BadStepError, match=r"step \d+: .*nan.*LearningRate.peak"):
        loop.train(run)
    last_finite = records(tmp_path, "train")[-1]["step"]
    assert loop.prepare(config, tmp_path).checkpoints.latest == last_finite


def test_cutting_back_keeps_each_step_once(tmp_path):
    lines = [
        {"step": 0, "kind": "phase"},
        *({"step": step, "kind": "train"} for step in (1, 2)),
        {"step": 2, "kind": "eval"},
        {"step": 2, "kind": "phase"},
        {"step": 3, "kind": "train"},
        {"step": 3, "kind": "end"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ki'
    (tmp_path / "metrics.jsonl").write_text(text)
    cut_metrics(tmp_path, 2)
    assert read_metrics(tmp_path) == lines[:4]
    cut_metrics(tmp_path, 0)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    ("recipe", "chosen", "end"),
    [
        ("dense", None, "; the first step compiles"),
        ("venom", None, "; as dense products with masks, no sparse kernels: venom E=4 k=1; the first step compiles"),
        ("venom", "hopper", "; with sparse kernels; the first step compiles"),
    ],
)
def test_a_run_begins_by_saying_what_is_trained_and_whether_kernels_are(monkeypatch, recipe, chosen, end):
    monkeypatch.setattr(logger, "choose_kernels", lambda *_, **__: chosen)
    line = logger.opening(run_config(phases=((0, "dense"), (4, recipe))), 2)
    assert line.startswith("37,024 parameters on 2 x cpu")
    assert line.endswith(f"cpu{end}")
