"""A sweep that is killed together with its run: the same command finishes both, and then has nothing left to do."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from tests.test_train_sweeps_sweep import bindings_file
from train.config.settings import CONFIG_ROOT
from train.records.metrics import last_record, read_metrics
from train.sweeps import sweep

TWO = """
twin = "dense"
[runs.dense]
[runs.act24]
gin_bindings = ["Phases.schedule = [(0, 'dense'), (10, 'act24')]"]
"""


@pytest.mark.slow
def test_killed_and_started_again(tmp_path, monkeypatch, capsys):
    """SIGKILL to the sweep and its run; the same call ends both runs; once more, nothing is left to do."""
    overrides = {"Train_steps": 300, "Train_checkpoint_every": 50, "Train_eval_every": 150, "Train_sample_tokens": 0}
    path, output = bindings_file(tmp_path, TWO, **overrides), tmp_path / "out"
    command = [sys.executable, "-m", "train.sweep", path, f"--output={output}", "--gpus="]
    monkeypatch.setenv("PYTHONPATH", str(CONFIG_ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    run = int(first.stdout.readline().split("process ")[1])
    deadline = time.monotonic() + 120
    while (last_record(output / "dense-0") or {"step": 0})["step"] <= 50:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    os.kill(run, signal.SIGKILL)
    first.communicate()
    stopped = last_record(output / "dense-0")
    assert stopped is not None
    assert 50 < stopped["step"] < 300

    assert sweep.run_sweep([path], output, gpus=[]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((output / "table.json").read_text())
    assert [(row["case"], row["twin"], row["sparse_share"]) for row in rows] == [
        ("dense", None, 0.0),
        ("act24", "dense", round(290 / 300, 4)),
    ]
    assert (output / "table.md").read_text() in printed
    for row in rows:
        steps = [r["step"] for r in read_metrics(output / f"{row['case']}-0") if r["kind"] == "train"]
        assert steps == list(range(1, 301)), "each step once"
    assert rows[1]["difference"] == pytest.approx(rows[1]["val_loss"] - rows[0]["val_loss"], abs=2e-5)

    assert sweep.run_sweep([path], output, gpus=[]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 runs are finished already" in printed
    assert "begins" not in printed
