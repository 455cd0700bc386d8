"""What a run leaves behind about itself: how it was started, and the report at its end."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from tests.trainer import records, run_config, run_to_end, three_phases
from train import loop
from train import run_report as command
from train.records import run_report
from train.records.metrics import read_metrics
from train.state import run_info


@pytest.fixture(scope="module")
def finished():
    """The workdir of a run with three phases, from start to end."""
    return three_phases()[1]


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_report_shows_the_figures_of_the_run(finished):
    text = (finished / "report.md").read_text()
    last = records(finished, "eval")[-1]
    assert f"| val_loss (step 12) | {last['val_loss']:.4f} |" in section(text, "Figures")
    assert f"| tokens trained on | {12 * 8 * 16:,} |" in section(text, "Figures")
    rows = [line for line in section(text, "Phases").splitlines() if " to " in line]
    assert [row.split("|")[2].strip() for row in rows] == ["0 to 4", "4 to 8", "8 to 12"]
    six = next(r for r in records(finished, "eval") if r["step"] == 6)
    assert f"{six['val_loss']:.4f} dense, {six['val_loss_sparse']:.4f} sparse (step 6)" in rows[1]
    assert "clustered_experts 4" in rows[1]
    assert "baked_w1 1" in rows[2]
    assert text.count("Complete: 12 of 12 steps") == 1


def test_the_report_shows_every_picture(finished):
    text = (finished / "report.md").read_text()
    shown = re.findall(r"\]\((report/\w+\.png)\)", text)
    assert shown == [f"report/{name}.png" for name in ("loss", "layers", "experts", "throughput")]
    for name in shown:
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_a_diagnosis_holds_every_layer(finished):
    for record in records(finished, "diagnosis"):
        for name, layers in record["layers"].items():
            assert len(layers) == 2
            assert record[name] == pytest.approx(np.mean(layers))


def test_the_start_is_recorded(finished):
    (start,) = run_info.read_starts(finished)
    assert start["step"] == 0
    assert start["versions"]["jax"] == __import__("jax").__version__
    assert start["versions"]["python"].startswith("3.")
    assert start["tokens_per_step"] == 8 * 16
    text = (finished / "report.md").read_text()
    assert f"jax {start['versions']['jax']}" in text
    assert start["command"] in text
    if start["git"]:
        assert start["git"]["commit"] in text


def test_a_resume_appends_and_the_asked_for_steps_are_traced(tmp_path):
    """One run of 3 steps, two of them traced; started again, when it is complete; then continued to 4 steps."""
    assert loop.train(loop.prepare(run_config(steps=3), tmp_path, profile_steps="1:3")) == 0
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"train_step" in trace.read_bytes()
    assert run_to_end(run_config(steps=3), tmp_path) == 0
    assert [start["step"] for start in run_info.read_starts(tmp_path)] == [0], "a complete run starts nothing"
    assert run_to_end(run_config(steps=4), tmp_path) == 0
    assert [(start["step"], start["steps"]) for start in run_info.read_starts(tmp_path)] == [(0, 3), (3, 4)]
    text = (tmp_path / "report.md").read_text()
    assert "in 2 starts" in text
    assert "### Start 2" in text
    assert "No phase routes." in text
    assert "set `Train.diagnosis_every`" in text


def test_a_damaged_record_stops_the_run_before_it_starts(tmp_path):
    (tmp_path / "run.json").write_text('{"format": 1, "sta')
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        run_to_end(run_config(), tmp_path)
    (tmp_path / "run.json").write_text('{"format": 2, "starts": []}')
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        run_to_end(run_config(), tmp_path)


def test_a_run_cut_short_has_a_report_too(tmp_path, finished):
    kept = [r for r in read_metrics(finished) if r["step"] <= 7]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept) + '{"step": 8, "ki')
    text = run_report.write_report(tmp_path).read_text()
    assert "Not complete: 7 steps" in text
    assert "Command, versions and commit were not recorded." in text


def test_a_figure_without_a_value_leaves_its_cell_empty(tmp_path, finished, monkeypatch):
    drawn, original = [], Axes.pcolormesh

    def pcolormesh(axes, x, y, values, **options):
        drawn.extend([values] if "shading" not in options else [])  # a colour bar's own cells are given a shading
        return original(axes, x, y, values, **options)

    monkeypatch.setattr(Axes, "pcolormesh", pcolormesh)
    assert run_report.draw_layers(records(finished), tmp_path / "layers.png")
    ends_of_phases = np.isnan(drawn[0]).all(axis=0)
    assert ends_of_phases.sum() == 2, "no cell reaches across one"
    density, _, _, kept, flips = (np.asarray(values)[:, ~ends_of_phases] for values in drawn)
    assert density.shape == (2, 4)
    assert not np.isnan(density).any()
    assert np.isnan(kept[0]).tolist() == [True, False, True, True], "routed at step 6 alone"
    assert np.isnan(flips[0]).tolist() == [True, True, True, False], "compared within a phase only"
    dense = [r for r in records(finished) if r["step"] <= 3]
    assert run_report.draw_layers(dense, tmp_path / "layers.png")
    assert len(drawn) == 5 + 3, "no router, no second diagnosis"


def test_a_text_with_fences_stays_one_block():
    assert run_report._code("a\n```\nb") == "````\na\n```\nb\n````"


def test_command_line(tmp_path, finished, capsys):
    for arguments, message in (([str(tmp_path)], "holds no training loss"), ([], "give one workdir")):
        assert command.main(["run_report", *arguments]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert message in printed
    (tmp_path / "metrics.jsonl").write_text((finished / "metrics.jsonl").read_text())
    assert command.main(["run_report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.md'}\n"


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_that_of_the_code_and_not_of_a_repository_around_it(tmp_path, monkeypatch):
    code = tmp_path / "run_info.py"
    code.write_text(Path(run_info.__file__).read_text())
    monkeypatch.setattr(run_info, "__file__", str(code))
    assert run_info.git_state() is None, "no repository"
    git(tmp_path, "init")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "other")
    assert run_info.git_state() is None, "a repository that does not hold the code"
    git(tmp_path, "add", "run_info.py")
    git(tmp_path, "commit", "-m", "code")
    state = run_info.git_state()
    assert state is not None
    assert re.fullmatch(r"[0-9a-f]{40}", state["commit"])
    assert not state["changed"]
    code.write_text("changed")
    changed = run_info.git_state()
    assert changed is not None
    assert changed["changed"]
