"""Runs lists of runs over the GPUs present and collects a table of each: what `python -m train.sweep` does."""

import contextlib
import fcntl
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.command import print_error
from train.config.settings import RunConfig, find_config, load_config
from train.evaluation.validation import CONFIG_FILE
from train.records.metrics import Progress, last_record
from train.records.step_times import read_step_times
from train.state.workdir import is_held
from train.sweeps.table import OWN_CLOCK, Clock, Member, Row, other_options, read_table, row_of, write_table

LOGS = "logs"
TURN = ".turn"  # in there: locked by the sweep that looks for a run to start
_COMMON = {"gin_files": list, "gin_bindings": list, "seeds": list, "twin": str}


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: what `train.main` is told, and what that means."""

    member: Member
    gin_files: tuple[str, ...]
    gin_bindings: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder: NAME-SEED."""
        return self.member.workdir.name

    def command(self) -> list[str]:
        """The command line that runs it."""
        return [
            *(sys.executable, "-m", "train.main"),
            *(f"--gin_file={name}" for name in self.gin_files),
            *(f"--gin_bindings={binding}" for binding in self.gin_bindings),
            f"--workdir={self.member.workdir}",
        ]

    def steps_done(self) -> int:
        """Optimizer steps in its metrics."""
        record = last_record(self.member.workdir)
        return 0 if record is None else record["step"]

    def has_these_settings(self) -> bool:
        """Whether its folder, if there is one, holds a run of this configuration."""
        saved = self.member.workdir / CONFIG_FILE
        return not saved.exists() or saved.read_text() == self.member.config.text

    def is_finished(self) -> bool:
        """Whether it ran to its end.

        Raises:
          ValueError: the folder holds a run with another configuration.
        """
        workdir, config = self.member.workdir, self.member.config
        saved = workdir / CONFIG_FILE
        if saved.exists() and (text := saved.read_text()) != config.text:
            there, here = text.splitlines(), config.text.splitlines()
            sides = {
                "there": [one for one in there if one not in here],
                "here": [one for one in here if one not in there],
            }
            shown = "; ".join(f"{one} {side}" for side, own in sides.items() for one in own[:2])
            raise ValueError(
                f"{workdir} holds a run with other settings ({shown}); give another --output, or move it away"
            )
        record = last_record(workdir)
        return record is not None and record["kind"] == "end"


def load_sweep(
    path: str, output: Path, gin_bindings: Sequence[str] = (), only: Sequence[str] | None = None
) -> list[SweepRun]:
    """The runs of a sweep file in its order, each seed of one after the other, all checked.

    Args:
      path: tried from the working directory, then from the package.
      output: the folder that holds the runs' workdirs.
      gin_bindings: of every run, after those of the file.
      only: names of the runs to keep; their twins stay too.

    Raises:
      ValueError: a file that is no sweep, an unknown name, a run whose configuration is wrong.
    """
    with open(find_config(path), "rb") as file:
        try:
            content = tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is no TOML: {error}") from error
    common, runs = {name: value for name, value in content.items() if name != "runs"}, content.get("runs")
    if not isinstance(runs, dict) or not runs:
        raise ValueError(f"{path} names no runs; a run is a table such as [runs.dense]")
    _check_keys(path, "the top", common)
    entries: dict[str, dict[str, Any]] = {}
    for name, own in runs.items():
        _check_keys(path, f"[runs.{name}]", own)
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{path}: run {name!r} gives its folder its name; use letters, digits and . _ -")
        entry = {"seeds": [0], "twin": None} | common | own
        for key in ("gin_files", "gin_bindings"):
            entry[key] = [*common.get(key, []), *own.get(key, [])]
        entries[name] = entry
    for name, entry in entries.items():
        if entry["twin"] is not None and entry["twin"] not in entries:
            raise ValueError(f"{path}: twin {entry['twin']!r} of {name!r} is no run; there are {', '.join(entries)}")
    if only is not None:
        if not only:
            raise ValueError(f"--only= names no run; there are {', '.join(entries)}")
        if unknown := set(only) - set(entries):
            raise ValueError(f"{path} has no run {', '.join(sorted(unknown))}; there are {', '.join(entries)}")
        kept = {*only, *(entries[name]["twin"] for name in only)}
        entries = {name: entry for name, entry in entries.items() if name in kept}
    return [
        _make_run(path, name, seed, entry, output, gin_bindings)
        for name, entry in entries.items()
        for seed in entry["seeds"]
    ]


def _check_keys(path: str, where: str, table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if key not in _COMMON:
            raise ValueError(f"{path}: {where} has {key!r}; it may have {', '.join(_COMMON)}")
        if not isinstance(value, _COMMON[key]):
            raise ValueError(f"{path}: {where} has {key} = {value!r}, which must be a {_COMMON[key].__name__}")


def _make_run(
    path: str, name: str, seed: int, entry: Mapping[str, Any], output: Path, gin_bindings: Sequence[str]
) -> SweepRun:
    bindings = [*entry["gin_bindings"], *gin_bindings, f"Train.seed={seed}"]
    try:
        config: RunConfig = load_config(entry["gin_files"], bindings)
    except ValueError as error:
        raise ValueError(f"{path}: run {name!r}: {error}") from error
    options = [*entry["gin_files"], *entry["gin_bindings"], *gin_bindings]
    twin = entry["twin"] if entry["twin"] != name else None
    member = Member(name, seed, twin, output / f"{name}-{seed}", config, tuple(options))
    return SweepRun(member, tuple(entry["gin_files"]), tuple(bindings))


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES: those in it, or all that nvidia-smi lists; none without a GPU."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    try:
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.split()


@dataclass(frozen=True)
class Sheet:
    """What one file asks for: its runs, the folder that holds them, and the table it gets."""

    name: str
    runs: tuple[SweepRun, ...]
    output: Path
    earlier: tuple[Row, ...] = ()  # rows of runs that finished elsewhere
    beside: tuple[SweepRun, ...] = ()  # runs of the file that are not asked for, and are in its table if they are there

    def collect(self, clock: Clock) -> str:
        """Writes the table of the runs that have ended."""
        members = [run.member for run in (*self.runs, *self.beside)]
        return write_table(members, self.name, self.output, clock, self.earlier)

    def is_finished(self, run: SweepRun) -> bool:
        """Whether it ran to its end, here or elsewhere."""
        return run.is_finished() or row_of(run.member, self.earlier) is not None


class Sweep:
    """The processes: one for each run, `per_device` at a time on each GPU (or, without GPUs, on the CPU)."""

    def __init__(self, sheets: Sequence[Sheet], gpus: Sequence[str], per_device: int, clock: Clock = OWN_CLOCK):
        self._sheets, self._clock = sheets, clock
        self._home = {run.member.workdir: sheet for sheet in sheets for run in sheet.runs}
        # Taking turns: the first run of each sheet, the second one of each ...
        turns = itertools.zip_longest(*(sheet.runs for sheet in sheets))
        self._runs = [run for turn in turns for run in turn if run is not None]
        self._free = [gpu for _ in range(per_device) for gpu in (gpus or [""])]
        self._memory = str(round(0.9 / per_device, 3)) if gpus and per_device > 1 else None
        self._active: dict[subprocess.Popen, tuple[SweepRun, str, int]] = {}  # its run, GPU and claim
        self._elsewhere: list[SweepRun] = []  # runs of other processes
        self._stopping = False
        self.failed: dict[str, int] = {}  # exit codes

    def run(self) -> bool:
        """Runs what is not finished.  Returns False if it was stopped by SIGTERM or SIGINT before the end."""
        for sheet in self._sheets:
            (sheet.output / LOGS).mkdir(parents=True, exist_ok=True)
        waiting = [run for run in self._runs if not self._is_finished(run)]
        done = {run.member.workdir: run.steps_done() for run in self._runs}
        elsewhere = [run for run in self._runs if run not in waiting and not done[run.member.workdir]]
        done |= {run.member.workdir: run.member.config.train.steps for run in elsewhere}
        total = sum(run.member.config.train.steps for run in self._runs)
        progress, looked = Progress(total, sum(done.values()), interval=30.0), 0.0
        if len(waiting) < len(self._runs):
            progress.say(f"{len(self._runs) - len(waiting)} of {len(self._runs)} runs are finished already")
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._active or (waiting and not self._stopping):
                self._start_what_fits(waiting, progress)
                for process in [process for process in self._active if process.poll() is not None]:
                    run, gpu, claim = self._active.pop(process)
                    os.close(claim)
                    self._free.append(gpu)
                    if self._end(run, process.returncode, progress):
                        waiting.insert(0, run)
                if time.monotonic() - looked > 5:
                    looked = time.monotonic()
                    done |= {run.member.workdir: run.steps_done() for run in self._runs if run not in elsewhere}
                    progress.update(sum(done.values()), self._status(waiting))
                time.sleep(0.2)
            done |= {run.member.workdir: run.steps_done() for run in self._runs if run not in elsewhere}
            progress.update(sum(done.values()), self._status(waiting))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            progress.close()
        return not self._stopping

    def _is_finished(self, run: SweepRun) -> bool:
        return self._home[run.member.workdir].is_finished(run)

    def _name(self, run: SweepRun) -> str:
        return run.name if len(self._sheets) == 1 else f"{self._home[run.member.workdir].name}/{run.name}"

    def _file(self, run: SweepRun, ending: str) -> Path:
        return self._home[run.member.workdir].output / LOGS / f"{run.name}{ending}"

    def _start_what_fits(self, waiting: list[SweepRun], progress: Progress) -> None:
        while not self._stopping and (found := self._take(waiting, progress)) is not None:
            self._start(*found, progress)

    def _take(self, waiting: list[SweepRun], progress: Progress) -> tuple[SweepRun, str, int] | None:
        """The next run that is free, a GPU that is free for it, and the claim to it; None if either is missing.

        Of several sweeps on a folder one looks at a time, so that each sees what the others have taken.
        """
        with contextlib.ExitStack() as stack:
            for folder in sorted({sheet.output / LOGS for sheet in self._sheets}):
                turn = os.open(folder / TURN, os.O_RDWR | os.O_CREAT, 0o644)
                stack.callback(os.close, turn)
                fcntl.flock(turn, fcntl.LOCK_EX)
            # A run that is held goes on in another process, of another sweep or of one that was killed.  It keeps its
            # GPU.  Claims come first: a workdir is not looked at while the process that is to hold it begins.
            held = [run for run in waiting if _is_claimed(self._file(run, ".gpu")) or is_held(run.member.workdir)]
            free = list(self._free)
            for run in held:
                note = self._file(run, ".gpu")
                if note.exists() and (gpu := note.read_text()) in free:
                    free.remove(gpu)
            self._elsewhere = held
            for run in [run for run in waiting if run not in held]:
                if run.is_finished():  # by another process, since the last look
                    waiting.remove(run)
                    self._home[run.member.workdir].collect(self._clock)
                    progress.say(f"{self._name(run)} has ended in another process")
                elif free and (claim := _claim(self._file(run, ".gpu"))) is not None:
                    waiting.remove(run)
                    self._free.remove(free[0])
                    os.ftruncate(claim, 0)
                    os.pwrite(claim, free[0].encode(), 0)
                    return run, free[0], claim
        return None

    def _start(self, run: SweepRun, gpu: str, claim: int, progress: Progress) -> None:
        environment = dict(os.environ)
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        if self._memory is not None:
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = self._memory
        with self._file(run, ".txt").open("ab") as log:
            # A session of its own, so that Ctrl-C reaches it once, through this process.
            process = subprocess.Popen(
                run.command(),
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._active[process] = (run, gpu, claim)
        if self._stopping:  # the signal came while it was started, too early to reach it
            process.send_signal(signal.SIGTERM)
        progress.say(f"{self._name(run)} begins{f' on GPU {gpu}' if gpu else ''}, process {process.pid}")

    def _end(self, run: SweepRun, code: int, progress: Progress) -> bool:
        """Whether it is to be waited for: a process that outlived its sweep has taken the workdir in the meantime."""
        log = self._file(run, ".txt")
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        if run.is_finished():
            self._home[run.member.workdir].collect(self._clock)
            progress.say(f"{self._name(run)}: {last}")
        elif is_held(run.member.workdir):
            return True
        elif not self._stopping:
            self.failed[self._name(run)] = code
            progress.say(f"{self._name(run)} failed with exit code {code}: {last} ({log})")
        return False

    def _status(self, waiting: Sequence[SweepRun]) -> str:
        running = ", ".join(f"{self._name(run)} {run.steps_done()}" for run, *_ in self._active.values())
        held = ", ".join(f"{self._name(run)} {run.steps_done()}" for run in self._elsewhere if run in waiting)
        others = f"; in other processes: {held}" if held else ""
        return f"running: {running or 'none'}{others}; {len(waiting)} waiting"

    def _stop(self, *_: Any) -> None:
        if not self._stopping:  # a second signal to a run would interrupt its saving
            self._stopping = True
            for process in self._active:
                process.send_signal(signal.SIGTERM)


def _claim(note: Path) -> int | None:
    """A descriptor that holds the right to start a run until it is closed or this process ends; None if another has it.

    It bridges the seconds until the run's own process holds its workdir.
    """
    descriptor = os.open(note, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _is_claimed(note: Path) -> bool:
    """Whether another sweep has a run that it started."""
    if not note.exists():
        return False
    claim = _claim(note)
    if claim is not None:
        os.close(claim)
    return claim is None


def run_sweep(
    paths: Sequence[str],
    output: Path,
    *,
    gin_bindings: Sequence[str] = (),
    only: Sequence[str] | None = None,
    gpus: Sequence[str] | None = None,
    per_device: int = 1,
    collect: bool = False,
    step_times: Sequence[str] = (),
    earlier: Sequence[str] = (),
) -> int:
    """Runs and collects.  Returns 0 (all finished), 1 (some failed), 130 (stopped; type the command again).

    Args:
      paths: sweep files; several have their folders in `output`, one has it for its own.
      output, gin_bindings, only: as `load_sweep` takes them.
      gpus: names for CUDA_VISIBLE_DEVICES; None is all that are visible, none runs on the CPU.
      per_device: runs at a time on each GPU, or on the CPU.
      collect: only write the tables of what has finished.
      step_times: FILE or FILE@SIZE each, results of `train.bench`, for the times of steps.
      earlier: files table.json with runs that finished elsewhere.

    Raises:
      ValueError: a mistake in the input; nothing was started.
    """
    if per_device < 1:
        raise ValueError(f"--per_device={per_device} must be at least 1")
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"the sweeps {', '.join(paths)} share a name, and so would their folders; rename one")
    if only is not None and len(paths) > 1:
        raise ValueError(f"--only={','.join(only)} names runs of one sweep; give one file")
    clock = Clock(tuple(map(read_step_times, step_times)), shared=per_device > 1)
    sheets, known = [], tuple(row for path in earlier for row in read_table(path))
    for path, name in zip(paths, names, strict=True):
        folder = output if len(paths) == 1 else output / name
        rows = tuple(row for row in known if row["bench"] == f"sweep {name}")
        runs = tuple(load_sweep(path, folder, gin_bindings, only))
        _tell_what_is_not_taken(runs, rows)
        kept = {run.name for run in runs}
        others = [run for run in load_sweep(path, folder, gin_bindings) if run.name not in kept]
        beside = tuple(run for run in others if run.has_these_settings())
        _check_rows_stay(folder, earlier, (*runs, *beside), rows)
        sheets.append(Sheet(name, runs, folder, rows, beside))
    # Refuses foreign runs before anything starts.
    finished = [sheet.is_finished(run) for sheet in sheets for run in sheet.runs]
    sweep = Sweep(sheets, visible_gpus() if gpus is None else gpus, per_device, clock)
    if collect and not any(finished):
        raise ValueError(f"{output} holds no finished run of {', '.join(paths)}")
    complete = collect or sweep.run()
    for sheet in sheets:
        if any(sheet.is_finished(run) for run in sheet.runs):
            print(sheet.collect(clock))
    if not complete:
        finished = [sheet.is_finished(run) for sheet in sheets for run in sheet.runs]
        print(f"stopped; {sum(finished)} of {len(finished)} runs are finished, the others saved")
        return 130
    if sweep.failed:
        print_error(f"failed: {', '.join(f'{name} ({code})' for name, code in sweep.failed.items())}")
    return 1 if sweep.failed else 0


def _tell_what_is_not_taken(runs: Sequence[SweepRun], rows: Sequence[Row]) -> None:
    for run in runs:
        for row in rows:
            same = (row["case"], row["seed"]) == (run.member.name, run.member.seed)
            if same and (differing := other_options(run.member, row)):
                print(f"note: the earlier {run.name} is not taken: {differing}", flush=True)


def _check_rows_stay(folder: Path, earlier: Sequence[str], runs: Sequence[SweepRun], rows: Sequence[Row]) -> None:
    """Raise ValueError if a table given as an earlier one would be replaced by one without some of its rows."""
    table = folder / "table.json"
    if not any(table.exists() and table.samefile(path) for path in earlier):
        return
    kept = {(run.member.name, run.member.seed) for run in runs if row_of(run.member, rows) or run.is_finished()}
    if lost := [f"{row['case']}-{row['seed']}" for row in rows if (row["case"], row["seed"]) not in kept]:
        raise ValueError(
            f"{table} would lose its rows of {', '.join(lost)}, which this sweep does not have with these options; "
            "give another --output, or a copy of the table as --earlier"
        )
