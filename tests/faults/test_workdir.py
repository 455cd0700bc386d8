"""What happens to the files of a run: held by another process, damaged, on a disk that is full or read-only."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.faults.ledger import tried
from tests.trainer import assert_same_bits, final_state, records, run_config, run_to_end, three_phases, token_folder
from train import loop
from train.config.settings import Data
from train.data import token_files
from train.records.metrics import read_metrics
from train.state.checkpoint import CheckpointError
from train.state.workdir import CHECKPOINTS, CHECKSUMS, DAMAGED, WorkdirLock, set_aside_damaged

HOLDER = """
import sys, time
from pathlib import Path
from train.state.workdir import WorkdirLock
lock = WorkdirLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def mounted(path, *options):
    """A small tmpfs at ``path``, or a skip that names what is missing."""
    path.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the capability to mount (CAP_SYS_ADMIN): {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def saved_file(workdir, step):
    """The largest file of a checkpoint."""
    files = [path for path in (workdir / CHECKPOINTS / str(step)).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [pytest.param(truncate, marks=pytest.mark.slow), flip, pytest.param(os.unlink, marks=pytest.mark.slow)]
)
def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path, capsys, damage):
    """The one before it is used, stderr names the file, and the run ends with the same bits."""
    config, uninterrupted, _ = three_phases()
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    for step in range(8, 13):
        shutil.rmtree(workdir / CHECKPOINTS / str(step))
    path = saved_file(workdir, 7)
    damage(path)
    assert run_to_end(config, workdir) == 0
    stderr = capsys.readouterr().err
    assert "warning: checkpoint of step 7 is damaged" in stderr
    assert path.name in stderr
    assert "using step 6" in stderr
    assert [path.name[:2] for path in (workdir / DAMAGED).iterdir()] == ["7-"]
    assert records(workdir) == records(uninterrupted)
    assert_same_bits(final_state(config, workdir), final_state(config, uninterrupted))
    what = {"truncate": "truncated", "flip": "with one bit flipped", "unlink": "with a file missing"}[damage.__name__]
    tried(f"newest checkpoint {what}", 1, "set aside, the one before it used, same final bits")


def test_without_a_sound_checkpoint_nothing_is_moved(tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(three_phases()[1], workdir)
    for step in range(1, 13):
        truncate(saved_file(workdir, step))
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged \(step 12: .* bytes instead of"):
        set_aside_damaged(workdir)
    assert len(list((workdir / CHECKPOINTS).iterdir())) == 12
    tried("all checkpoints truncated", 1, "refused, nothing moved")


def test_checksums_are_those_of_the_checkpoints_there(tmp_path):
    config = run_config(steps=12, checkpoint_every=2, keep_checkpoints=2, sample_tokens=0)
    assert run_to_end(config, tmp_path) == 0
    kept = sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir())
    assert kept == ["10", "12"]
    assert sorted(path.stem for path in (tmp_path / CHECKSUMS).iterdir()) == kept


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    """SIGKILL leaves the lock file behind, and nobody who holds it."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"in use by another run \(pid {holder.pid} on host .*--workdir"):
        loop.prepare(run_config(), tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with WorkdirLock(tmp_path):
        assert f"pid {os.getpid()} " in (tmp_path / ".lock").read_text()
    tried("second process on a workdir", 1, "refused with the name of the first")


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(tmp_path):
    config, uninterrupted, _ = three_phases()
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=24m", "tmpfs") as disk:
        workdir = disk / "run"
        workdir.mkdir()
        shutil.copytree(uninterrupted / CHECKPOINTS / "5", workdir / CHECKPOINTS / "5")
        shutil.copytree(uninterrupted / CHECKSUMS, workdir / CHECKSUMS)
        run = loop.prepare(config, workdir)
        room = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(bytes(room - 200_000))
        with pytest.raises((CheckpointError, OSError), match=r"(?i)no space left"):
            loop.train(run)
        (disk / "ballast").unlink()
        assert set_aside_damaged(workdir) == []
        assert run_to_end(config, workdir) == 0
        assert_same_bits(final_state(config, workdir), final_state(config, uninterrupted))
    tried("disk full during a save", 1, "stopped with a message; with room again the same final bits")


def test_a_read_only_workdir_is_refused(tmp_path):
    with (
        mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs") as disk,
        pytest.raises(ValueError, match=r"cannot be written to \(Read-only file system\)"),
    ):
        loop.prepare(run_config(), disk / "run")
    tried("read-only file system under the workdir", 1, "refused before anything is computed")


def test_a_workdir_mounted_read_only_is_refused_to_root_too(tmp_path):
    """A bind mount: the folder's own permissions would let root write."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    with mounted(workdir, "--bind", str(workdir)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(workdir)], check=True)
        with pytest.raises(ValueError, match=r"cannot be written to \(Read-only file system\); give --workdir"):
            loop.prepare(run_config(), workdir)
    tried("workdir bind-mounted read-only, as root", 1, "refused before anything is computed")


def prepare_only(config, workdir):
    """All checks of a start, and nothing else."""
    lock = loop.prepare(config, workdir).lock
    assert lock is not None
    lock.release()


def begun(tmp_path, monkeypatch):
    """A run at step 7, with token files of its own whose checked edges are short."""
    monkeypatch.setattr(token_files, "EDGE_BYTES", 64)
    folder, workdir = tmp_path / "tokens", tmp_path / "run"
    shutil.copytree(token_folder(), folder)
    manifest = json.loads((folder / token_files.MANIFEST).read_text())
    for content in manifest["splits"].values():
        for entry in content["files"]:
            entry["edges_sha256"] = token_files.edges_sha256(folder / entry["name"])
    (folder / token_files.MANIFEST).write_text(json.dumps(manifest))
    shutil.copytree(three_phases()[1], workdir)
    for step in range(8, 13):
        shutil.rmtree(workdir / CHECKPOINTS / str(step))
    config = replace(three_phases()[0], data=Data(str(folder)))
    prepare_only(config, workdir)  # reads all and takes note
    return config, workdir, folder / "train-00000.bin"


@pytest.mark.parametrize(
    ("change", "message"),
    [(os.unlink, "train-00000.bin is missing"), (truncate, "train-00000.bin is truncated"),
     (flip, "train-00000.bin was changed after it was prepared")],
    ids=["deleted", "truncated", "changed inside"],
)  # fmt: skip
def test_token_files_that_changed_between_two_starts_are_refused(tmp_path, monkeypatch, change, message):
    config, workdir, shard = begun(tmp_path, monkeypatch)
    change(shard)
    with pytest.raises(ValueError, match=message):
        loop.prepare(config, workdir)
    tried(f"token file {message.split('.bin ')[1]}, between two starts", 1, "refused with its name")


def test_token_files_are_read_in_full_once(tmp_path, monkeypatch):
    """Later starts compare size and time of change; a copy with other times is read again, and taken."""
    config, workdir, shard = begun(tmp_path, monkeypatch)
    read, original = [], hashlib.file_digest
    monkeypatch.setattr(
        token_files.hashlib, "file_digest", lambda file, kind: read.append(file.name) or original(file, kind)
    )
    prepare_only(config, workdir)
    assert not any(name.endswith(".bin") for name in read)
    os.utime(shard)
    prepare_only(config, workdir)
    assert [name for name in read if name.endswith(".bin")] == [str(shard)]


@pytest.mark.slow
def test_a_clock_set_back_changes_nothing(tmp_path, monkeypatch):
    """The run goes on a day before its files were written."""
    config, uninterrupted, _ = three_phases()
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    for step in range(8, 13):
        shutil.rmtree(workdir / CHECKPOINTS / str(step))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 86400)
    assert run_to_end(config, workdir) == 0
    assert records(workdir) == records(uninterrupted)
    assert_same_bits(final_state(config, workdir), final_state(config, uninterrupted))
    times = [record["time"] for record in read_metrics(workdir)]
    assert times == sorted(times)
    tried("clock set back by a day between two starts", 1, "same metrics, same final bits, times still increase")
