"""Figures that also go to Weights & Biases: what it is called with, and that a run asks for the library first."""

import importlib.util
import json
import sys
import types
from dataclasses import replace

import pytest

from tests.trainer import gin_bindings, run_config
from train import loop
from train.config.settings import load_config
from train.records.metrics import MetricsWriter
from train.records.wandb_run import WandbRun


class Calls:
    """Stands for the library and for its run."""

    def __init__(self):
        self.seen = []

    def init(self, **options):
        self.seen.append(("init", options))
        return self

    def log(self, numbers, step):
        self.seen.append(("log", step, numbers))

    def finish(self):
        self.seen.append(("finish",))


@pytest.fixture
def library(monkeypatch):
    calls = Calls()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=calls.init))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return calls


def test_numbers_go_there_under_the_names_they_have_in_tensorboard(library, tmp_path):
    text = load_config([], gin_bindings(Train_seed=7)).text
    writer = MetricsWriter(tmp_path, step=0, seconds=0.0, mirror=WandbRun("project", tmp_path, text))
    writer.write("train", 3, loss=1.5, phase="dense")
    writer.write("eval", 3, val_loss=2.5)
    writer.close()
    (_, options), *rest = library.seen
    assert rest == [("log", 3, {"train/loss": 1.5}), ("log", 3, {"eval/val_loss": 2.5}), ("finish",)]
    assert (options["project"], options["mode"], options["dir"]) == ("project", "offline", str(tmp_path))
    assert options["config"]["Train.seed"] == "7"
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["phase"] == "dense"


def test_a_resumed_run_keeps_its_identity(library, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    for _ in range(2):
        WandbRun("project", tmp_path, "")
    (_, first), (_, second) = library.seen
    assert first["id"] == second["id"]
    assert (first["resume"], first["mode"]) == ("allow", "online")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="the extra is installed")
def test_without_the_library_the_extra_is_named(tmp_path):
    config = run_config()
    with pytest.raises(ValueError, match=r"Train.wandb='mine' needs the library: pip install -e '.\[wandb\]'"):
        loop.prepare(replace(config, train=replace(config.train, wandb="mine")), tmp_path)
