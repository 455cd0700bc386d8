"""The comparison of kernels and reference in training."""

import json
import sys
from dataclasses import replace

import pytest

from tests import same_loss
from train.config.settings import load_config

LOSSES = [[3.0, 2.0, 1.0], [3.0, 2.25, 1.0], [3.0, 2.0, 1.5]]


def test_between_is_first_against_second_and_noise_first_against_itself():
    row = same_loss.compare("x", ["a", "b"], [*LOSSES])
    assert row["between"] == {"largest": 0.5, "mean_of_last_20": pytest.approx(-0.5 / 3, abs=1e-5), "final": -0.5}
    assert row["noise"] == {"largest": 0.25, "mean_of_last_20": pytest.approx(-0.25 / 3, abs=1e-5), "final": 0.0}


def test_a_run_that_fails_is_told():
    assert same_loss.compare("x", ["a", "b"], [LOSSES[0], "no GPU", LOSSES[1]])["failed"] == "no GPU"


def test_the_runs_differ_in_the_implementation_alone():
    given = same_loss.arguments(["--tokens=t", "--output=o", "--binding=Optimizer.b2 = 0.9"])
    for recipe in given.recipes:
        configs = []
        for way in given.ways:
            file, bindings = same_loss.options(given, recipe, way)
            configs.append(load_config([file], bindings))
            assert configs[-1].train.implementation == way
            assert configs[-1].optimizer.b2 == 0.9
            assert [phase.start for phase in configs[-1].schedule.phases] == [0, 20]
        first, second = (replace(config, text="") for config in configs)
        assert replace(first, train=replace(first.train, implementation="reference")) == second


@pytest.mark.parametrize(("second", "code"), [(LOSSES[1], 1), (LOSSES[0], 0), ("failed", 1)])
def test_the_exit_code_says_if_they_agree(monkeypatch, tmp_path, second, code):
    runs = {"hopper": LOSSES[0], "reference": second}
    monkeypatch.setattr(same_loss, "train", lambda workdir, given, recipe, way: runs[way])
    output = tmp_path / "x.json"
    monkeypatch.setattr(sys, "argv", ["same_loss", "--tokens=t", f"--output={output}", "--recipes", "venom"])
    assert same_loss.main() == code
    assert len(json.loads(output.read_text())) == 1
