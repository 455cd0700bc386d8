"""The queue that makes all results again, with jobs that only pretend."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from tests import results
from tests.programs import source_of
from tests.results import Job
from train.config.settings import CONFIG_ROOT

WRITE = "pathlib.Path(sys.argv[1]).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Runs the program with jobs of (name, seconds, place, Python code); gives its exit code and what it told."""
    monkeypatch.setattr(results, "LEAST", 0.0)
    monkeypatch.setattr(results, "ROOT", tmp_path)

    def run(jobs, *options):
        made = []
        for name, seconds, place, code in jobs:
            (tmp_path / f"{name}.py").write_text(f"import os, pathlib, sys, time\n{code}\n")
            made.append(Job(name, seconds, place, (name, "{output}/" + name)))
        monkeypatch.setattr(results, "JOBS", made)
        monkeypatch.setattr(sys, "argv", ["results", "--tokens=t", f"--output={tmp_path / 'out'}", *options])
        code = results.main()
        lines = (tmp_path / "out" / "jobs.jsonl").read_text().splitlines()
        return code, {record["job"]: record for record in map(json.loads, lines)}

    return run


def test_what_is_timed_has_the_first_gpu_to_itself(program, monkeypatch):
    monkeypatch.setattr(results, "gpus", lambda: ["0", "1"])
    code, told = program([("a", 30, "alone", WRITE), ("b", 30, "shared", WRITE), ("c", 30, "alone", WRITE)])
    assert code == 0
    assert {name: record["gpu"] for name, record in told.items()} == {"a": "0", "b": "1", "c": "0"}


def test_what_needs_all_gpus_comes_first_and_is_left_out_on_one(program, monkeypatch):
    jobs = [("a", 30, "alone", WRITE), ("both", 30, "all", WRITE)]
    monkeypatch.setattr(results, "gpus", lambda: [""])
    code, told = program(jobs)
    assert (code, list(told)) == (0, ["a"])
    monkeypatch.setattr(results, "gpus", lambda: ["0", "1"])
    code, told = program([("b", 30, "alone", WRITE), *jobs])
    assert (code, list(told), told["both"]["gpu"]) == (0, ["a", "both", "b"], "0,1")


def test_again_it_does_what_is_missing(program, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "gpus", lambda: [""])
    jobs = [("good", 30, "alone", WRITE), ("bad", 30, "shared", "print('why'); sys.exit(3)")]
    code, told = program(jobs)
    assert (code, told["good"]["state"], told["bad"]["state"]) == (1, "done", "exit code 3")
    assert "why" in (tmp_path / "out" / "bad.log").read_text()
    (tmp_path / "out" / "good").unlink()
    code, told = program([jobs[0], ("bad", 30, "shared", WRITE)])
    assert (code, told["bad"]["state"]) == (0, "done")
    assert not (tmp_path / "out" / "good").exists()


def test_a_late_job_is_killed_and_told(program, monkeypatch):
    monkeypatch.setattr(results, "gpus", lambda: [""])
    code, told = program([("slow", 1, "alone", "time.sleep(60)"), ("next", 30, "alone", WRITE)])
    assert (code, told["slow"]["state"], told["next"]["state"]) == (1, "late", "done")


def test_what_has_no_time_left_is_not_begun(program, monkeypatch):
    monkeypatch.setattr(results, "gpus", lambda: [""])
    code, told = program([("job", 30, "alone", WRITE)], "--seconds=0")
    assert (code, told["job"]["state"]) == (1, "not begun")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_nothing_running(program, monkeypatch, tmp_path, sent):
    monkeypatch.setattr(results, "gpus", lambda: [""])
    before = signal.getsignal(signal.SIGTERM)
    # Started in the background by a shell, a process ignores SIGINT.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    written = tmp_path / "pid"
    code = f"pathlib.Path({str(written)!r}).write_text(str(os.getpid())); time.sleep(60)"

    def stop():
        while not (written.exists() and written.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), sent)

    threading.Thread(target=stop).start()
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            program([("slow", 60, "alone", code), ("next", 60, "alone", WRITE)])
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(written.read_text()), 0)
    assert not (tmp_path / "out" / "next").exists()


@pytest.mark.parametrize("job", results.JOBS, ids=lambda job: job.name)
def test_every_job_is_a_program_that_takes_these_options(job, tmp_path):
    """Names of options and files that exist: a job that can't be parsed would be found only on the GPU."""
    command = job.command(tmp_path, tmp_path, 100.0)
    assert not any("{" in argument for argument in command)
    if command[2] != "pytest":
        source = source_of(command[2])
        for option in (argument.split("=")[0].strip("-") for argument in command[3:] if argument.startswith("--")):
            assert f'"{option}"' in source or f'"--{option}"' in source, option
    for file in (argument.split("=")[1] for argument in command if argument.startswith("--gin_file")):
        assert (CONFIG_ROOT / file).exists()
