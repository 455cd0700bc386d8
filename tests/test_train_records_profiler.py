"""Traces of a few steps: which steps, what is refused; test_train_records_run_report.py has a run that writes one."""

import jax
import pytest

from tests.trainer import gin_bindings
from train import main
from train.records.profiler import Profiler, parse_steps


def test_steps_are_read_like_a_slice():
    assert list(parse_steps("3:6", 6)) == [3, 4, 5]
    assert not parse_steps(None, 6)


@pytest.mark.parametrize("text", ["3", "3-6", ":6", "a:b", "-1:3", "6:3", "3:3", "3:7", ""])
def test_other_forms_are_refused(text):
    with pytest.raises(ValueError, match="--profile_steps="):
        parse_steps(text, 6)


@pytest.mark.parametrize(
    ("first", "stopped", "traced"),
    [(0, 10, [3, 4, 5]), (4, 10, [4, 5]), (6, 10, []), (0, 5, [3, 4])],
    ids=["whole", "resumed inside", "resumed after", "stopped inside"],
)
def test_traced_are_the_steps_of_the_range_that_run(tmp_path, monkeypatch, first, stopped, traced):
    tracing, found, ends = [], [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: tracing.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", tracing.clear)
    with Profiler(parse_steps("3:6", 10), tmp_path) as profiler:
        for step in range(first, stopped):
            profiler.before(step, ())
            found += [step] if tracing else []
            ends += [step] if profiler.after(step, ()) else []
    assert found == traced
    assert not tracing, "closed also where the run stops inside the range"
    assert ends == ([5] if 5 in traced else [])


def test_a_mistake_is_told_before_anything_starts(tmp_path, capsys):
    assert main.run([], gin_bindings(), tmp_path / "run", profile_steps="9:99") == 2
    assert "--profile_steps=9:99 must have START < STOP <= Train.steps=12" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
