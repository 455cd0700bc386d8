"""Real processes and real signals at many moments: the same commands end with the same bits."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from tests.faults.ledger import tried
from tests.trainer import assert_same_bits, final_state, gin_bindings, records, token_folder
from train.config.settings import CONFIG_ROOT, load_config
from train.state.workdir import CHECKPOINTS

STEPS = 1600
SWITCHES = tuple(range(100, STEPS, 100))
GRACE = 30.0  # seconds that a scheduler may give between SIGTERM and SIGKILL
PATIENCE = 120.0  # seconds until a moment must have come


def bindings():
    """Switches into and out of the sparse phase, a save every 20 steps."""
    phases = [(0, "dense")] + [(step, "venom" if i % 2 == 0 else "dense") for i, step in enumerate(SWITCHES)]
    return [
        *gin_bindings(Train_steps=STEPS, Train_checkpoint_every=20, Train_eval_every=800, Train_sample_tokens=0),
        f"Phases.schedule = {phases}",
    ]


def environment():
    return os.environ | {
        "PYTHONPATH": str(CONFIG_ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(workdir, module="train.main", options=()):
    options = options or [f"--workdir={workdir}", *(f"--gin_bindings={binding}" for binding in bindings())]
    command = [sys.executable, "-m", module, *options]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def steps_done(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def unfinished(workdir: Path) -> bool:
    """Whether a checkpoint is being written, or its checksums."""
    folders = (workdir / CHECKPOINTS, workdir / "checksums")
    return any(not path.stem.isdigit() or path.suffix == ".tmp" for f in folders if f.is_dir() for path in f.iterdir())


def wait_for(process, condition) -> bool:
    """Whether the condition came while the process lived."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.002)
    return False


def moment(kind: str, workdir: Path, rng: random.Random):
    """A condition to wait for, and seconds to wait behind it."""
    done = steps_done(workdir)
    if kind == "save":
        after = done + rng.randrange(1, 60)
        return lambda: steps_done(workdir) >= after and unfinished(workdir), rng.uniform(0, 0.03)
    if kind == "switch":
        coming = next((step for step in SWITCHES if step > done), STEPS)
        return lambda: steps_done(workdir) >= coming - 1, rng.uniform(0, 0.1)
    if kind == "start":
        return lambda: True, rng.uniform(0.5, 8)
    after = done + rng.randrange(1, 90)
    return lambda: steps_done(workdir) >= after, rng.uniform(0, 0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that nobody interrupts."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    process = start(workdir)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return workdir


KINDS = ("save", "switch", "step", "start")
KILLS = 13  # in each of four chains


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chain", range(4))
def test_killed_again_and_again_the_run_ends_with_the_same_bits(tmp_path, whole, chain):
    """One workdir, SIGKILL after SIGKILL at random moments of every kind; the run ends when the kills are used up."""
    seed = random.SystemRandom().randrange(1 << 30)
    rng, workdir, kills = random.Random(seed), tmp_path / "run", dict.fromkeys(KINDS, 0)
    config, runs = load_config([], bindings()), 0

    def assert_ended_like_the_other():
        assert records(workdir) == records(whole), f"{seed=}"
        assert_same_bits(final_state(config, workdir), final_state(config, whole))

    while (count := sum(kills.values())) < KILLS:
        kind = KINDS[(chain + count) % 4]
        process = start(workdir)
        condition, delay = moment(kind, workdir, rng)
        came = wait_for(process, condition)
        time.sleep(delay if came else 0)
        process.kill()
        _, stderr = process.communicate()
        kills[kind] += process.returncode == -signal.SIGKILL
        if process.returncode == 0:  # it was through before the moment came: the other kills hit another run
            assert_ended_like_the_other()
            shutil.rmtree(workdir)
            runs += 1
        else:
            assert process.returncode == -signal.SIGKILL, f"seed {seed}: {stderr}"
        assert runs < KILLS, kills
    process = start(workdir)
    _, stderr = process.communicate()
    assert process.returncode == 0, f"seed {seed}: {stderr}"
    assert_ended_like_the_other()
    where = {"save": "while a checkpoint is written", "switch": "around a switch of phase",
             "step": "at a random step", "start": "while it starts"}  # fmt: skip
    for kind, count in kills.items():
        tried(f"SIGKILL {where[kind]}", count, "same final bits, same metrics", seed=seed)


@pytest.mark.slow
def test_sigterm_saves_within_the_grace_period(tmp_path, whole):
    """Real processes, one after another on a workdir, each stopped at a random step."""
    workdir, rng, taken = tmp_path / "run", random.Random(), []
    for _ in range(4):
        process = start(workdir)
        if not wait_for(process, moment("step", workdir, rng)[0]):
            break
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=GRACE)
        taken.append(time.monotonic() - sent)
        assert process.returncode == 0, stderr
        saved = max(int(path.name) for path in (workdir / CHECKPOINTS).iterdir() if path.name.isdigit())
        assert steps_done(workdir) == saved, "the step that was running is the last one and is saved"
    process = start(workdir)
    process.communicate()
    config = load_config([], bindings())
    assert records(workdir) == records(whole)
    assert_same_bits(final_state(config, workdir), final_state(config, whole))
    assert len(taken) >= 3
    tried("SIGTERM at a random step", len(taken), "saved, exit code 0, same final bits", seconds=round(max(taken), 1))


@pytest.mark.slow
def test_killed_while_preparing_the_token_files_are_the_same(tmp_path):
    """train.prepare, two workers, killed at random moments until it is done."""
    source, rng = tmp_path / "text", random.Random()
    source.mkdir()
    words = (token_folder().parent / "text" / "train.txt").read_text()
    for i in range(6):
        (source / f"{i}.txt").write_text("\n".join([words] * 20))

    def prepare(name):
        options = [f"--input={source}", f"--output={tmp_path / name}", "--vocab_size=300", "--processes=2"]
        return start(None, "train.prepare", [*options, "--validation_fraction=0", "--shard_tokens=40000"])

    began = time.monotonic()
    process = prepare("whole")
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    taken, kills = time.monotonic() - began, 0
    for _ in range(8):
        process = prepare("killed")
        time.sleep(rng.uniform(0.3, 0.9) * taken)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if (tmp_path / "killed" / "manifest.json").exists():
            break
    if not (tmp_path / "killed" / "manifest.json").exists():
        _, stderr = (process := prepare("killed")).communicate()
        assert process.returncode == 0, stderr
    found = {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir() if path.is_file()}
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.is_file()}
    assert kills
    tried("SIGKILL while data is prepared", kills, "same token files, byte for byte")


@pytest.mark.slow
def test_killed_during_a_sweep_its_runs_end_with_the_same_bits(tmp_path):
    """The sweep and its runs die together; the same command finishes them."""
    short = [*gin_bindings(Train_steps=60, Train_checkpoint_every=5, Train_eval_every=60, Train_sample_tokens=0)]
    runs = [f"Phases.schedule = {schedule}" for schedule in ([(0, "dense")], [(0, "dense"), (20, "act24")])]
    lines = [f"gin_bindings = {short!r}", 'twin = "a"']
    lines += [f"[runs.{name}]\ngin_bindings = [{run!r}]" for name, run in zip("ab", runs, strict=True)]
    (tmp_path / "sweep.toml").write_text("\n".join(lines))

    def sweep(name):
        return start(None, "train.sweep", [str(tmp_path / "sweep.toml"), f"--output={tmp_path / name}"])

    _, stderr = (process := sweep("whole")).communicate()
    assert process.returncode == 0, stderr
    kills, rng = 0, random.Random()
    for after in sorted(rng.randrange(1, 115) for _ in range(4)):
        process = sweep("killed")
        done = lambda: sum(steps_done(tmp_path / "killed" / f"{run}-0") for run in "ab")  # noqa: E731
        if wait_for(process, lambda done=done, after=after: done() >= after):
            process.kill()
            for lock in (tmp_path / "killed").glob("*/.lock"):  # its runs have sessions of their own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    _, stderr = (process := sweep("killed")).communicate()
    assert process.returncode == 0, stderr
    for name, run in zip("ab", runs, strict=True):
        config = load_config([], [*short, run])
        killed, whole = tmp_path / "killed" / f"{name}-0", tmp_path / "whole" / f"{name}-0"
        assert records(killed) == records(whole)
        assert_same_bits(final_state(config, killed), final_state(config, whole))
    assert kills
    tried("SIGKILL of a sweep and its runs", kills, "same final bits of every run")
    shutil.rmtree(tmp_path / "whole")
