"""A run that was interrupted ends as one that was not, bit for bit."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest

from tests.trainer import assert_same_bits, final_state, gin_bindings, records, run_config, run_to_end, three_phases
from train import loop
from train.config.settings import CONFIG_ROOT
from train.data.sources import open_split
from train.evaluation import validation


@pytest.mark.parametrize("step", [10, 12])
def test_resuming_equals_never_stopping(tmp_path, step):
    """Step 10 has masks; 12 is the end. The switches, saved before and switched after, are in the next test."""
    config, uninterrupted, _ = three_phases()
    workdir = tmp_path / "resumed"
    shutil.copytree(uninterrupted, workdir)
    for saved in (workdir / "checkpoints").iterdir():
        if int(saved.name) > step:
            shutil.rmtree(saved)
    assert run_to_end(config, workdir) == 0
    assert records(workdir) == records(uninterrupted)
    assert_same_bits(final_state(config, workdir), final_state(config, uninterrupted))


def test_stopped_again_and_again_bakes_once(tmp_path, monkeypatch):
    """SIGTERM at both switches: each start saves and exits with 0."""
    config, uninterrupted, _ = three_phases()
    original = loop.Logger.log

    def log_then_stop(self, step, *rest):
        original(self, step, *rest)
        if step in (4, 8):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.Logger, "log", log_then_stop)
    for _ in range(3):
        assert run_to_end(config, tmp_path) == 0
    baked = [record["step"] for record in records(tmp_path, "phase") if "baked_w1" in record["report"]]
    assert baked == [8]
    assert records(tmp_path) == records(uninterrupted)
    assert_same_bits(final_state(config, tmp_path), final_state(config, uninterrupted))


def test_looking_changes_nothing(tmp_path):
    """Evaluation (on a baked copy), diagnosis and saving leave no trace in the state."""
    config, uninterrupted, _ = three_phases()
    blind = run_config(phases=config.phases.schedule, checkpoint_every=12, eval_every=12)
    assert run_to_end(blind, tmp_path) == 0
    assert_same_bits(final_state(blind, tmp_path), final_state(config, uninterrupted))
    losses = [record["loss"] for record in records(tmp_path, "train")]
    assert losses == [record["loss"] for record in records(uninterrupted, "train")]


def test_killed_at_a_random_moment_the_command_ends_the_same(tmp_path):
    """The real program, SIGKILL, the same command again; and train.evaluate finds the loss that the run reported."""
    bindings = gin_bindings(Train_steps=100, Train_checkpoint_every=10, Train_eval_every=50, Train_sample_tokens=0)
    bindings += ["Phases.schedule = [(0, 'dense'), (20, 'venom'), (60, 'dense')]"]
    program = [sys.executable, "-m", "train.main", *(f"--gin_bindings={binding}" for binding in bindings)]
    environment = os.environ | {
        "PYTHONPATH": str(CONFIG_ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(workdir):
        command = [*program, f"--workdir={workdir}"]
        return subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(process):
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr
        return stdout

    finish(start("whole"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    moment = random.Random().randrange(15, 85)
    process = start("killed")
    metrics, saved = killed / "metrics.jsonl", killed / "checkpoints"

    def has_come():
        enough = metrics.exists() and metrics.read_text().count('"train"') >= moment
        return enough and any(path.name.isdigit() for path in saved.iterdir())  # other names are still being written

    while process.poll() is None and not has_come():
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"finished before step {moment}"

    assert "continuing" in finish(start("killed"))
    ends = [records(run, "end")[0] for run in (whole, killed)]
    assert ends[1]["val_loss"] == ends[0]["val_loss"], f"killed at step {moment}"
    assert records(killed) == records(whole), f"killed at step {moment}"

    graphdef, config, state, step = validation.restore(whole)
    assert step == 100
    again = validation.Evaluator(graphdef, config, open_split(config, "val"))(state, int(state.phase))
    assert again["val_loss"] == ends[0]["val_loss"]
