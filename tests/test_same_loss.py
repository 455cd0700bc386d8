"""The comparison of kernels and reference in training, with the reference in both places."""

import json
import sys

import pytest

from tests import same_loss
from tests.trainer import MODEL, token_folder

LOSSES = [[3.0, 2.0, 1.0], [3.0, 2.25, 1.0], [3.0, 2.0, 1.5]]


def test_between_is_first_against_second_and_noise_first_against_itself():
    row = same_loss.compare("x", ["a", "b"], [*LOSSES])
    assert row["between"] == {"largest": 0.5, "mean_of_last_20": pytest.approx(-0.5 / 3, abs=1e-5), "final": -0.5}
    assert row["noise"] == {"largest": 0.25, "mean_of_last_20": pytest.approx(-0.25 / 3, abs=1e-5), "final": 0.0}


def test_a_run_that_fails_is_told():
    assert same_loss.compare("x", ["a", "b"], [LOSSES[0], "no GPU", LOSSES[1]])["failed"] == "no GPU"


def run(monkeypatch, output, *options):
    shape = {f"Model.{name}": value for name, value in vars(MODEL).items()}
    settings = shape | {"Train.batch_size": 8, "Train.seq_len": 16, "Train.dtype": "float32", "Train.eval_batches": 1}
    program = ["same_loss", f"--tokens={token_folder()}", f"--output={output}", "--size=tiny", "--recipes", "venom"]
    program += ["--parallel=1", *(f"--binding={name} = {value!r}" for name, value in settings.items()), *options]
    monkeypatch.setattr(sys, "argv", program)
    code = same_loss.main()
    return code, json.loads(output.read_text())


def test_the_reference_trains_as_itself(monkeypatch, tmp_path):
    code, [row] = run(monkeypatch, tmp_path / "x.json", "--steps=6", "--ways", "reference", "reference")
    assert "failed" not in row, row
    assert (code, row["steps"]) == (0, 6)
    assert row["between"] == row["noise"] == {"largest": 0.0, "mean_of_last_20": 0.0, "final": 0.0}


def test_without_a_hopper_gpu_it_says_so(monkeypatch, tmp_path):
    if same_loss.jax.default_backend() != "cpu":
        pytest.skip("there is a GPU")
    code, [row] = run(monkeypatch, tmp_path / "x.json", "--steps=6")
    assert code == 1
    assert "hopper" in row["failed"]
