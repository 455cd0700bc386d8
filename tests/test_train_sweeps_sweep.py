"""Sweeps: what a file means, runs over devices, a kill and what comes after it, the table."""

import json
import math
import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.trainer import gin_bindings, run_config
from train.config.settings import CONFIG_ROOT
from train.records.step_times import StepTimes
from train.state.workdir import WorkdirLock
from train.sweeps import sweep
from train.sweeps import table as sweep_table
from train.sweeps.table import Member
from venom_jax import Recipe

SWEEPS = sorted((CONFIG_ROOT / "configs" / "sweeps").glob("*.toml"))


def bindings_file(tmp_path, text, **overrides):
    """A sweep of the small run; text holds the rest of the file."""
    lines = ",\n".join(json.dumps(binding) for binding in gin_bindings(**overrides))
    path = tmp_path / "small.toml"
    path.write_text(f"gin_bindings = [{lines}]\n{text}")
    return str(path)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_bundled_sweep_says_its_command_and_can_be_read(path, tmp_path):
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    name = f"configs/sweeps/{path.name}"
    assert f"python -m train.sweep {name}" in header
    runs = sweep.load_sweep(name, tmp_path, ["Data.folder='data'"])
    assert len({run.name for run in runs}) == len(runs) > 1


def test_files_and_bindings_add_up_and_later_ones_win(tmp_path):
    text = """
seeds = [3, 4]
[runs.a]
seeds = [3]
[runs.b]
gin_files = ["configs/options/debug.gin"]
gin_bindings = ["Train.steps = 50", "Train.eval_every = 5"]
twin = "a"
"""
    path = bindings_file(tmp_path, text)
    runs = sweep.load_sweep(path, tmp_path / "out", ["Train.eval_every = 7"])
    assert [run.name for run in runs] == ["a-3", "b-3", "b-4"]
    trains = [run.member.config.train for run in runs]
    assert [(train.steps, train.seed, train.eval_every) for train in trains] == [(12, 3, 7), (50, 3, 7), (50, 4, 7)]
    assert [run.member.twin for run in runs] == [None, "a", "a"]
    assert [run.name for run in sweep.load_sweep(path, tmp_path, only=["b"])] == ["a-3", "b-3", "b-4"]
    assert [run.name for run in sweep.load_sweep(path, tmp_path, only=["a"])] == ["a-3"]
    command = runs[2].command()
    assert command[1:3] == ["-m", "train.main"]
    assert command[-2:] == ["--gin_bindings=Train.seed=4", f"--workdir={tmp_path / 'out' / 'b-4'}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs = 1", "names no runs"),
        ("[runs.a", "is no TOML"),
        ("twins = 'a'\n[runs.a]", "the top has 'twins'; it may have gin_files, gin_bindings, seeds, twin"),
        ("[runs.a]\nseeds = 3", r"\[runs.a\] has seeds = 3, which must be a list"),
        ("[runs.a]\ntwin = 'b'", "twin 'b' of 'a' is no run; there are a"),
        ("[runs.'a/b']", "run 'a/b' gives its folder its name"),
        ("[runs.a]\ngin_bindings = ['Train.stepz = 3']", "run 'a': .*stepz"),
        ("[runs.a]\ngin_files = ['no.gin']", "run 'a': there is no file 'no.gin' in"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        sweep.load_sweep(str(path), tmp_path)


@dataclass(frozen=True)
class Fake(sweep.SweepRun):
    """A run that notes its environment and ends, or fails."""

    def command(self):
        names = "{n: os.environ.get(n) for n in ('CUDA_VISIBLE_DEVICES', 'XLA_PYTHON_CLIENT_MEM_FRACTION')}"
        workdir = str(self.member.workdir)
        record = json.dumps({"kind": "end", "step": 12})
        script = [
            "import json, os, time",
            f"os.mkdir({workdir!r})",
            f"open({workdir!r} + '/env', 'w').write(json.dumps({names}))",
            "time.sleep(0.3)",
            f"open({workdir!r} + '/metrics.jsonl', 'w').write({record!r})",
        ]
        if self.member.name == "broken":
            script = ["print('out of luck')", "raise SystemExit(1)"]
        return [sys.executable, "-c", "; ".join(script)]


def fakes(tmp_path, *names):
    config = run_config()
    return tuple(Fake(Member(name, 0, None, tmp_path / f"{name}-0", config, ()), (), ()) for name in names)


def test_each_gpu_gets_its_runs_and_a_failure_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep.Sheet, "collect", lambda self, clock: "")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    runs = fakes(tmp_path, "a", "broken", "b", "c", "d")
    found = sweep.Sweep([sweep.Sheet("s", runs, tmp_path)], ["2", "5"], per_device=2)
    assert found.run()
    assert found.failed == {"broken-0": 1}
    assert "broken-0 failed with exit code 1: out of luck" in capsys.readouterr().out
    seen = [json.loads((tmp_path / f"{name}-0" / "env").read_text()) for name in "abcd"]
    assert {env["CUDA_VISIBLE_DEVICES"] for env in seen} == {"2", "5"}
    assert {env["XLA_PYTHON_CLIENT_MEM_FRACTION"] for env in seen} == {"0.45"}


class Endless(Fake):
    """A run that ends by a signal only."""

    def command(self):
        return [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.mark.parametrize("when", [1, 2])
def test_sigterm_stops_the_runs_and_starts_no_more(tmp_path, monkeypatch, when):
    """Also those that it found half started: the signal comes while the first or the second process begins."""
    runs = tuple(Endless(run.member, (), ()) for run in fakes(tmp_path, "a", "b", "c"))
    started = []
    original = sweep.subprocess.Popen

    def start_then_stop(*args, **options):
        started.append(original(*args, **options))
        if len(started) == when:
            signal.raise_signal(signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(sweep.subprocess, "Popen", start_then_stop)
    handler = signal.getsignal(signal.SIGTERM)
    found = sweep.Sweep([sweep.Sheet("s", runs, tmp_path)], [], per_device=3)
    assert not found.run()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [process.returncode for process in started] == [-signal.SIGTERM] * when
    assert not found.failed


def test_a_run_that_outlived_its_sweep_keeps_its_gpu_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.Sheet, "collect", lambda self, clock: "")
    runs = fakes(tmp_path, "a", "b")
    workdir = runs[0].member.workdir
    workdir.mkdir()
    lock = WorkdirLock(workdir)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a-0.gpu").write_text("1")
    started = []

    def end_of_a_then_start(self, run, gpu, claim, progress):
        started.append((run.name, gpu))
        self._free.append(gpu)
        os.close(claim)
        (workdir / "metrics.jsonl").write_text('{"kind": "end", "step": 12}')
        lock.release()

    monkeypatch.setattr(sweep.Sweep, "_start", end_of_a_then_start)
    assert sweep.Sweep([sweep.Sheet("s", runs, tmp_path)], ["1", "2"], per_device=1).run()
    assert started == [("b-0", "2")]


def test_two_sweeps_on_one_folder_share_its_runs_and_their_gpus(tmp_path, monkeypatch):
    """Each has a GPU of its own; the other's first run has not got as far as to hold its workdir."""
    monkeypatch.setattr(sweep.Sheet, "collect", lambda self, clock: "")
    runs = fakes(tmp_path, "a", "b", "c")
    (tmp_path / "logs").mkdir()
    note = tmp_path / "logs" / "a-0.gpu"
    claim = sweep._claim(note)
    assert claim is not None
    os.pwrite(claim, b"1", 0)
    original, started = sweep.Sweep._end, []

    def end_then_release(self, run, code, progress):
        started.append(run.name)
        if run.name == "c-0":
            runs[0].member.workdir.mkdir()
            (runs[0].member.workdir / "metrics.jsonl").write_text('{"kind": "end", "step": 12}')
            os.close(claim)
        return original(self, run, code, progress)

    monkeypatch.setattr(sweep.Sweep, "_end", end_then_release)
    found = sweep.Sweep([sweep.Sheet("s", runs, tmp_path)], ["2"], per_device=1)
    assert found.run()
    assert started == ["b-0", "c-0"], "its GPU was free for them, and the first run was the other sweep's"
    assert not found.failed
    assert note.read_text() == "1"
    assert sweep._claim(note) is not None, "nothing is claimed any more"


def test_a_sweep_sees_what_another_took_since_its_last_start(tmp_path, monkeypatch, capsys):
    """While it starts a on GPU 1, the other sweep takes b for GPU 2: c waits for one of the two."""
    monkeypatch.setattr(sweep.Sheet, "collect", lambda self, clock: "")
    runs, order, claims = fakes(tmp_path, "a", "b", "c"), [], []
    original_start, original_end = sweep.Sweep._start, sweep.Sweep._end

    def start(self, run, gpu, claim, progress):
        order.append(f"{run.name} on {gpu}")
        if run.name == "a-0":
            claims.append(sweep._claim(tmp_path / "logs" / "b-0.gpu"))
            os.pwrite(claims[0], b"2", 0)
        original_start(self, run, gpu, claim, progress)

    def end(self, run, code, progress):
        order.append(f"{run.name} ends")
        if run.name == "c-0":
            assert "in other processes: b-0 0; 1 waiting" in self._status([runs[1]])
            runs[1].member.workdir.mkdir()
            (runs[1].member.workdir / "metrics.jsonl").write_text('{"kind": "end", "step": 12}')
            os.close(claims[0])
        return original_end(self, run, code, progress)

    monkeypatch.setattr(sweep.Sweep, "_start", start)
    monkeypatch.setattr(sweep.Sweep, "_end", end)
    assert sweep.Sweep([sweep.Sheet("s", runs, tmp_path)], ["1", "2"], per_device=1).run()
    assert order == ["a-0 on 1", "a-0 ends", "c-0 on 1", "c-0 ends"]
    printed = capsys.readouterr().out
    assert "b-0 has ended in another process" in printed
    assert "step 36/36" in printed.replace(",", ""), "the end of each run is counted"


def test_a_run_that_another_process_took_is_waited_for(tmp_path, monkeypatch):
    """It is free when this sweep looks, held when its own process has failed and at the next look, then finished."""
    monkeypatch.setattr(sweep.Sheet, "collect", lambda self, clock: "")
    (run,) = fakes(tmp_path, "broken")
    run.member.workdir.mkdir()
    held = [False, True, True]

    def is_held(workdir):
        if not held:
            (workdir / "metrics.jsonl").write_text('{"kind": "end", "step": 12}')
        return held.pop(0) if held else False

    monkeypatch.setattr(sweep, "is_held", is_held)
    found = sweep.Sweep([sweep.Sheet("s", (run,), tmp_path)], [], per_device=1)
    assert found.run()
    assert not found.failed
    assert not held


def test_several_sweeps_take_turns_and_keep_their_folders(tmp_path, monkeypatch):
    collected = []
    monkeypatch.setattr(sweep.Sheet, "collect", lambda self, clock: collected.append((self.name, clock.shared)) or "")
    sheets = []
    for name, runs in (("long", ("a", "b", "c")), ("short", ("a",))):
        (tmp_path / name).mkdir()
        sheets.append(sweep.Sheet(name, fakes(tmp_path / name, *runs), tmp_path / name))
    started = []
    original = sweep.Sweep._start

    def note(self, run, gpu, claim, progress):
        started.append(f"{run.member.workdir.parent.name}/{run.name}")
        original(self, run, gpu, claim, progress)

    monkeypatch.setattr(sweep.Sweep, "_start", note)
    assert sweep.Sweep(sheets, [], 1, sweep_table.Clock(shared=True)).run()
    assert started == ["long/a-0", "short/a-0", "long/b-0", "long/c-0"]
    assert collected == [("long", True), ("short", True), ("long", True), ("long", True)]
    assert (tmp_path / "short" / "logs" / "a-0.txt").exists()
    path = bindings_file(tmp_path, "[runs.a]")
    with pytest.raises(ValueError, match="share a name"):
        sweep.run_sweep([path, path], tmp_path, gpus=[])
    other = tmp_path / "other.toml"
    other.write_text((tmp_path / "small.toml").read_text())
    with pytest.raises(ValueError, match="--only=a names runs of one sweep"):
        sweep.run_sweep([path, str(other)], tmp_path, gpus=[], only=["a"])


def test_gpus_are_those_visible(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 1")
    assert sweep.visible_gpus() == ["3", "1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sweep.visible_gpus() == []
    (tmp_path / "nvidia-smi").write_text(f"#!{sys.executable}\nprint('0\\n1')\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert sweep.visible_gpus() == ["0", "1"]


def test_a_foreign_run_in_the_folder_is_refused(tmp_path):
    path = bindings_file(tmp_path, "[runs.a]")
    (tmp_path / "out" / "a-0").mkdir(parents=True)
    (run,) = sweep.load_sweep(path, tmp_path / "out")
    text = run.member.config.text.replace("Train.steps = 12", "Train.steps = 13")
    (tmp_path / "out" / "a-0" / "config.gin").write_text(text)
    with pytest.raises(
        ValueError, match=r"other settings \(Train.steps = 13 there; Train.steps = 12 here\); give another --output"
    ):
        sweep.run_sweep([path], tmp_path / "out", gpus=[])


def write_run(workdir, config, loss):
    """metrics.jsonl and run.json as a run of 12 steps leaves them."""
    records = []
    for step in range(1, 13):
        index = config.schedule.index_at(step - 1)
        if step - 1 == config.schedule.phases[index].start:
            records.append({"kind": "phase", "step": step - 1, "phase": config.schedule.phases[index].label})
        record = {"kind": "train", "step": step, "loss": loss, "tokens_per_second": 128.0, "phase_index": index}
        loads = {"load_max": 0.5, "load_mean": 0.25, "load_min": 0.05} if index == 1 else {}
        records.append(record | {"density": 0.1 * step, **loads})
        if step % 4 == 0:
            kept = 0.4 if index == 1 else 1.0
            records.append({"kind": "diagnosis", "step": step, "kept_router": kept, "dropped_tokens": 0.01 * step})
            fallen = {"val_loss": loss + (12 - step) / 10, "val_bits_per_byte": loss / 2}
            records.append({"kind": "eval", "step": step, **fallen})
    records.append({"kind": "end", "step": 12})
    workdir.mkdir()
    lines = (json.dumps(record | {"time": float(record["step"])}) + "\n" for record in records)
    (workdir / "metrics.jsonl").write_text("".join(lines))
    start = {"time": "2026-01-02T03", "devices": "1 x cpu", "versions": {"jax": "1"}, "git": None}
    (workdir / "run.json").write_text(json.dumps({"format": 1, "starts": [start]}))


def test_a_row_tells_what_the_run_wrote(tmp_path):
    dense, config = run_config(), run_config(phases=((0, "dense"), (4, "venom"), (8, "act24")))
    members = [
        Member("dense", 0, None, tmp_path / "dense-0", dense, ()),
        Member("venom", 0, "dense", tmp_path / "venom-0", config, ("x.gin",)),
        Member("not yet", 0, "dense", tmp_path / "new-0", config, ()),
    ]
    write_run(tmp_path / "venom-0", config, loss=3.0)
    (alone,) = sweep_table.make_rows(members, "small")
    assert (alone["twin"], alone["difference"], alone["time_to_twin"]) == (None, None, None), "the twin has not run"
    write_run(tmp_path / "dense-0", dense, loss=3.4)
    reference, row = sweep_table.make_rows(members, "small")
    assert row | {"bench": "sweep small", "case": "venom", "seed": 0, "twin": "dense", "options": ["x.gin"]} == row
    assert (row["val_loss"], row["difference"], row["difference_train"]) == (3.0, -0.4, -0.4)
    assert row["time_to_twin"] == pytest.approx(8 / 12, abs=1e-3), "3.4 is reached after 8 of 12 equal steps"
    assert row["sparse_share"] == pytest.approx(8 / 12, abs=1e-4)
    assert 0 < 1 - 1.5 * (1 - row["operations"]) < 1, "two thirds of the steps are sparse"
    assert (row["kept_router"], row["dropped_tokens"], row["density"]) == (0.4, 0.08, 0.65), (
        "of steps 5 to 8, the routed ones"
    )
    assert (row["load_max"], row["load_min"], row["load_bar"], row["starved"]) == (2.0, 0.2, 1.5, 0.0)
    assert (reference["kept_router"], reference["sparse_share"], reference["operations"]) == (None, 0, 1)
    assert row["phases"] == [[0, "dense"], [4, "venom E=4 k=1"], [8, "act24"]]


def test_runs_that_share_a_gpu_tell_no_seconds_and_take_those_of_the_benchmark(tmp_path):
    """The recipe reaches its twin between 12 and 16 steps: 3.1 and 2.9 against 3.0, so after 14."""
    times = StepTimes("f", "1b", "gpu", {"dense": 1.0, "act24": 0.8})
    half = StepTimes("f", "7b", "gpu", {"dense": 1.0})
    longer = run_config(phases=((0, "dense"), (0.5, "act24")), steps=16)
    options = ("size.gin", "Train.steps = 12", "act24.gin")
    members = [
        Member("dense", 0, None, tmp_path / "dense-0", run_config(), ()),
        Member("act24", 0, "dense", tmp_path / "a-0", run_config(phases=((0, "dense"), (0.5, "act24"))), options),
        Member("act24-16", 0, "dense", tmp_path / "b-0", longer, (*options, "Train.steps = 16")),
        Member("other", 0, "dense", tmp_path / "c-0", longer, ("other.gin",)),
    ]
    for member, loss in zip(members, (3.0, 3.1, 2.9, 3.2), strict=True):
        write_run(member.workdir, member.config, loss)
    rows = sweep_table.make_rows(members, "s", sweep_table.Clock((times, half), shared=True))
    assert [row["steps_to_twin"] for row in rows] == [None, 14, 14, None]
    assert rows[1]["step_times"] == [
        {
            "of": "1b on gpu",
            "step_time": 0.9,
            "time_to_twin": pytest.approx(0.9 * 14 / 12, abs=1e-4),
            "time_for_loss": None,
        },
        {"of": "7b on gpu", "step_time": None, "time_to_twin": None, "time_for_loss": None},
    ]
    assert {rows[1][name] for name in ("tokens_per_second", "seconds", "step_seconds", "time_to_twin")} == {None}
    text = sweep_table.markdown(rows)
    assert "tokens/s" not in text
    assert "| act24 | 0 | 12 | +0.1000 | 14 | 0.900 | 1.050 |" in text
    unshared = sweep_table.make_rows(members, "s")
    assert unshared[1]["tokens_per_second"] == 128
    assert sweep_table.crossing([(12, -0.1), (16, -0.2)]) == 12, "the shortest run reaches it already"


def test_a_loss_is_worth_the_steps_in_which_the_twin_gets_it(tmp_path):
    """Dense reaches 3.0 in 12 steps and 2.9 in 16, so 2.9 in 12 steps is worth 16, and 3.1 is worth 9."""
    times = StepTimes("f", "1b", "gpu", {"dense": 1.0, "act24": 0.8})
    sparse, longer = run_config(phases=((0, "dense"), (0.5, "act24"))), run_config(steps=16)
    members = [
        Member("dense", 0, None, tmp_path / "dense-0", run_config(), ("size.gin", "Train.steps = 12")),
        Member(
            "dense-16", 0, "dense", tmp_path / "b-0", longer, ("size.gin", "Train.steps = 16", "Train.eval_every = 4")
        ),
        Member("better", 0, "dense", tmp_path / "c-0", sparse, ("size.gin", "act24.gin")),
        Member("worse", 0, "dense", tmp_path / "d-0", sparse, ("size.gin", "other.gin")),
        Member("alone", 1, "dense", tmp_path / "e-1", sparse, ("size.gin", "act24.gin")),
    ]
    for member, loss in zip(members, (3.0, 2.9, 2.9, 3.1, 2.9), strict=True):
        write_run(member.workdir, member.config, loss)
    rows = sweep_table.make_rows(members, "s", sweep_table.Clock((times,), shared=True))
    assert [row["twin_steps"] for row in rows] == [None, None, 16, 9, None]
    assert [row["twin_steps_train"] for row in rows] == [None, None, 16, 9, None]
    found = [row["step_times"][0]["time_for_loss"] for row in rows]
    assert found == [None, None, pytest.approx(0.9 * 12 / 16), pytest.approx(0.9 * 12 / 9), None]
    assert "| better | 0 | 12 | -0.1000 | 12 | 16 | 16 | 0.900 | 0.900 | 0.675 |" in sweep_table.markdown(rows)
    assert sweep_table.slope(rows, rows[0]) == pytest.approx(0.1 / math.log(16 / 12))
    assert sweep_table.slope([rows[0], rows[1] | {"seed": 1}], rows[0]) is None, "of two seeds"
    assert sweep_table.slope([rows[0], rows[1] | {"val_loss": 3.1}], rows[0]) is None, "longer is no better"


def test_runs_that_finished_elsewhere_are_in_the_table_and_not_run_again(tmp_path, capsys):
    text = """
twin = "dense"
[runs.dense]
[runs.act24]
gin_bindings = ["Train.steps = 12"]
[runs.later]
gin_bindings = ["Train.steps = 12", "Train.eval_every = 4"]
"""
    path = bindings_file(tmp_path, text)
    for name, bindings, losses in (("all", "a", (3.4, 3.0, 2.9)), ("first", "a", (3.4, 3.0)), ("second", "b", ())):
        (tmp_path / name).mkdir()
        runs = sweep.load_sweep(path, tmp_path / name, [f"Data.folder='{bindings}'"])
        for run, loss in zip(runs, losses, strict=False):
            write_run(run.member.workdir, run.member.config, loss)

    def collect(name, folder, *earlier):
        bindings = [f"Data.folder='{folder}'"]
        tables = [str(tmp_path / table / "table.json") for table in earlier]
        assert not sweep.run_sweep(
            [path], tmp_path / name, gin_bindings=bindings, gpus=[], collect=True, earlier=tables
        )
        return json.loads((tmp_path / name / "table.json").read_text())

    rows, first = collect("all", "a"), collect("first", "a")
    assert [row["case"] for row in first] == ["dense", "act24"]
    write_run(tmp_path / "second" / "later-0", sweep.load_sweep(path, tmp_path)[2].member.config, 2.9)
    both = collect("second", "b", "first")
    folders = {"Data.folder='a'": "Data.folder='b'"}
    expected = [row | {"options": [folders.get(option, option) for option in row["options"]]} for row in rows]
    assert both == expected, "as if all had run here"
    changed = tmp_path / "first" / "table.json"
    changed.write_text(json.dumps([first[0], first[1] | {"seed": 1}]))
    assert [row["case"] for row in collect("second", "b", "first")] == ["dense", "later"], "another seed"
    changed.write_text(json.dumps([first[0] | {"bench": "sweep other"}, first[1]]))
    assert [row["twin"] for row in collect("second", "b", "first")] == [None, None], "another sweep's dense run"

    capsys.readouterr()
    sheet = sweep.Sheet("small", tuple(sweep.load_sweep(path, tmp_path / "new"))[:1], tmp_path / "new", tuple(first))
    assert sweep.Sweep([sheet], [], per_device=1).run()
    assert "1 of 1 runs are finished already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"there is no file .*gone\.json"):
        sweep.run_sweep([path], tmp_path / "new", gpus=[], earlier=[str(tmp_path / "gone.json")])
    for wrong in ("[1]", "[{}]", "{", "3"):
        changed.write_text(wrong)
        with pytest.raises(ValueError, match=r"is no table\.json of"):
            sweep.run_sweep([path], tmp_path / "new", gpus=[], earlier=[str(changed)])


def test_an_expert_without_tokens_is_counted_and_the_bar_goes_by_the_experts():
    records: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "density": 0.1, "load_max": 1.0, "load_mean": 0.25, "load_min": float(step > 2)}
        for step in range(1, 9)
    ]
    assert sweep_table._sparse_figures(records, (0, 8))["starved"] == 0.25
    assert sweep_table.load_bar([Recipe.venom(16, 4), Recipe.venom(4, 1)]) == 1.5
    assert sweep_table.load_bar([Recipe.venom(16, 4)]) == 2.0
    assert sweep_table.load_bar([]) is None


def test_seconds_of_the_steps_and_the_jump_at_a_switch():
    config = run_config(phases=((0, "dense"), (4, "act24")), steps=12)  # 8 x 16 tokens a step
    records: list[dict[str, Any]] = [{"kind": "phase", "step": 0}]
    for step in range(1, 13):
        if step == 5:
            records.append({"kind": "phase", "step": 4})
        rate = {1: 9e9, 7: 1.0}.get(step, 128.0 if step <= 4 else 256.0)  # a dispatch, a stall: not the speed
        loss = 9.0 if step == 6 else 5.0
        index = int(step > 4)
        records.append({"kind": "train", "step": step, "loss": loss, "tokens_per_second": rate, "phase_index": index})
    member = Member("a", 0, None, CONFIG_ROOT, config, ())
    assert sweep_table.step_seconds(member, records) == pytest.approx(4 * 1 + 8 * 0.5)
    assert sweep_table.step_seconds(member, records, 6) == pytest.approx(4 * 1 + 2 * 0.5)
    assert sweep_table.jump(records) == 4.0
    assert sweep_table.jump(records[:4]) is None


def test_the_tables_have_means_over_seeds():
    tables = (sweep_table._LOSSES, sweep_table._DIAGNOSES, sweep_table._CLOCK)
    row = dict.fromkeys([key for table in tables for key, _ in table.values()]) | {"step_times": []}
    rows = [row | {"case": "a", "seed": seed, "val_loss": 3.0 + seed, "difference": 0.1} for seed in (0, 1)]
    text = sweep_table.markdown(rows)
    assert "| a | 2 | 3.5000 (3.0000 to 4.0000) | +0.1000 (+0.1000 to +0.1000) |  |  |" in text
    assert "seeds" not in sweep_table.markdown(rows[:1])
    assert "deviation" not in text, "one recipe with two seeds: nothing is left over"
    assert "| a | 1 |" in text


def test_a_part_of_a_sweep_keeps_the_table_whole(tmp_path, capsys):
    text = 'twin = "dense"\n[runs.dense]\n[runs.act24]\ngin_bindings = ["Train.eval_every = 4"]\n'
    path, output = bindings_file(tmp_path, text), tmp_path / "out"
    output.mkdir()
    for run in sweep.load_sweep(path, output):
        write_run(run.member.workdir, run.member.config, 3.0)
    table = output / "table.json"

    def cases(*options, **more):
        assert not sweep.run_sweep([path], output, gpus=[], collect=True, **more)
        return [row["case"] for row in json.loads(table.read_text())]

    assert cases(only=["dense"]) == ["dense", "act24"], "--only says what runs, not what is in the table"
    for run in sweep.load_sweep(path, output):
        (run.member.workdir / "metrics.jsonl").unlink()
    assert cases(only=["dense"], earlier=[str(table)]) == ["dense", "act24"]
    other = tmp_path / "other" / "small.toml"
    other.parent.mkdir()
    other.write_text((tmp_path / "small.toml").read_text().replace("act24", "act25"))
    with pytest.raises(ValueError, match=r"would lose its rows of act24-0, .* give another --output"):
        sweep.run_sweep([str(other)], output, gpus=[], collect=True, earlier=[str(table)])
    capsys.readouterr()
    with pytest.raises(ValueError, match="holds no finished run"):
        sweep.run_sweep(
            [path],
            tmp_path / "new",
            gin_bindings=["Train.log_every = 2"],
            gpus=[],
            collect=True,
            earlier=[str(table)],
        )
    assert "the earlier dense-0 is not taken: Train.log_every = 2 here" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--only= names no run; there are dense, act24"):
        sweep.run_sweep([path], output, gpus=[], only=[])


def test_two_runs_of_one_length_are_one_point_of_the_slope():
    row = {"options": ["a"], "seed": 0, "steps": 100, "val_loss": 3.0}
    rows = [row, row | {"val_loss": 3.2}, row | {"steps": 50, "val_loss": 3.5}]
    assert sweep_table.slope(rows, row) == pytest.approx(0.4 / math.log(2))
    assert sweep_table.slope(rows[:2], row) is None


def test_what_a_run_differs_by_from_itself():
    """Two by two: what is left is a quarter of the interaction in each run, with one degree of freedom."""
    losses = {("a", 0): 3.0, ("a", 1): 3.5, ("b", 0): 4.0, ("b", 1): 4.54, ("once", 0): 9.0}
    rows = [{"case": case, "seed": seed, "val_loss": loss} for (case, seed), loss in losses.items()]
    assert sweep_table.scatter(rows) == (pytest.approx(0.04 / 2), 1)
    rng = np.random.default_rng(0)
    rows = [
        {"case": f"{recipe}", "seed": seed, "val_loss": recipe + 10 * seed + 0.01 * rng.normal()}
        for recipe in range(200)
        for seed in range(3)
        if (recipe + seed) % 5
    ]
    assert sweep_table.scatter(rows) == (pytest.approx(0.01, rel=0.15), len(rows) - 202)
    assert sweep_table.scatter(rows[:1]) is None
    assert sweep_table.scatter([]) is None
