"""The driver of compute-sanitizer, with a tool that only pretends: what counts as checked."""

import json
import sys

import pytest

from tests import sanitize, sanitizer

TOOL = """#!/bin/sh
case "$*" in
  *racecheck*slow*) sleep 60;;
  *memcheck*wrong*) echo "========= Invalid write"; echo "========= ERROR SUMMARY: 1 error"; exit 9;;
  *memcheck*dies*) echo "Traceback"; exit 1;;
  *racecheck*) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)";;
  *) echo "========= ERROR SUMMARY: 0 errors";;
esac
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    path = tmp_path / "compute-sanitizer"
    path.write_text(TOOL)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sanitize, "cases", lambda: [(name, True, None) for name in ("a", "b", "slow", "wrong", "dies")])
    return tmp_path


def test_a_case_counts_when_its_process_ended_with_a_summary(tool, monkeypatch, capsys):
    output = tool / "out.json"
    options = [f"--output={output}", "--size=3", "--seconds=9", "--tools", "racecheck", "memcheck"]
    monkeypatch.setattr(sys, "argv", ["sanitizer", *options])
    monkeypatch.setattr(sanitizer, "LEAST", 0.5)
    assert sanitizer.main() == 1
    told = json.loads(output.read_text())
    # Those that shared a process with one that is too slow, wrong or broken are clean all the same.
    assert told["racecheck"] == {"cases": 5, "clean": 4, "found": 0, "late": 1, "failed": 0}
    assert told["memcheck"] == {"cases": 5, "clean": 3, "found": 1, "late": 0, "failed": 1}
    found = {name: part["state"] for part in told["processes"] if part["tool"] == "memcheck" for name in part["cases"]}
    assert (found["wrong"], found["dies"]) == ("found", "failed")
    assert "Invalid write" in "".join(part["output"] for part in told["processes"])
    assert '"late": 1' in capsys.readouterr().out


def test_every_case_has_a_name_of_its_own_and_is_in_one_slice():
    names = [case[0] for case in sanitize.cases()]
    assert len(names) == len(set(names)) > 60
    dealt = [name for part in sanitizer.slices(names, 6) for name in part]
    assert sorted(dealt) == sorted(names)
    assert [case[0] for case in sanitize.choose_cases(names[:2])] == names[:2]
    assert {case[0].split()[0] for case in sanitize.choose_cases(["gather", "vnm"])} == {"gather", "vnm"}
