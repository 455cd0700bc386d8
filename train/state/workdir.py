"""Who may write into a workdir, and whether what lies in its checkpoints is what was written."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
import weakref
from pathlib import Path
from typing import Any

from train.command import print_warning

LOCK_FILE = ".lock"
CHECKPOINTS = "checkpoints"
CHECKSUMS = "checksums"
DAMAGED = "damaged"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What flock answers where the file system, or its mount, knows no locks."""
VERIFIED = "verified.json"  # the token files that were read in full, with size and time of change


def claim_workdir(workdir: Path) -> None:
    """Creates the workdir and proves that it can be written to, before anything expensive starts."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write-test-{uuid.uuid4().hex}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"workdir {str(workdir)!r} cannot be written to ({error.strerror}); give --workdir a writable folder"
        ) from error


class WorkdirLock:
    """Holds a workdir for this process, until `release` or the end of the process.

    The kernel's lock on a file, not the file's existence: whoever dies, even by SIGKILL, holds nothing any more.

    Raises:
      ValueError: another process holds it; names that process and its host.
    """

    def __init__(self, workdir: Path, what: str = "workdir", option: str = "--workdir"):
        """what, option: how the folder is called, and who gives it, for the message."""
        path = workdir / LOCK_FILE
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
            self.release()
            raise ValueError(
                f"{what} {str(workdir)!r} is in use by another run ({holder}); wait for it, stop it, or give "
                f"another {option}"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print_warning(
                f"the file system of {str(workdir)!r} has no locks ({error.strerror}): nothing keeps a second run out "
                f"of it; on Lustre mount with -o flock, or give {option} a folder elsewhere"
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)

    def __enter__(self) -> "WorkdirLock":
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


def is_held(workdir: Path) -> bool:
    """Whether a process holds the workdir; leaves no trace."""
    try:
        descriptor = os.open(workdir / LOCK_FILE, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    finally:
        os.close(descriptor)
    return False


def forget_checksums(workdir: Path, step: int) -> None:
    """Before a step is saved again: its old checksums would condemn the new files."""
    (workdir / CHECKSUMS / f"{step}.json").unlink(missing_ok=True)


def write_checksums(workdir: Path, step: int) -> None:
    """Records size and hash of every file of a complete checkpoint; forgets those of removed checkpoints."""
    folder = workdir / CHECKSUMS
    folder.mkdir(exist_ok=True)
    target = folder / f"{step}.json"
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(_sums(workdir / CHECKPOINTS / str(step)), indent=1) + "\n")
    unfinished.replace(target)
    for path in folder.glob("*.json"):
        if not (workdir / CHECKPOINTS / path.stem).exists():
            path.unlink()


def copy_checksums(source: Path, workdir: Path, step: int) -> None:
    """For a checkpoint that is copied to another workdir; one without recorded checksums stays without."""
    recorded = source / CHECKSUMS / f"{step}.json"
    if recorded.exists():
        (workdir / CHECKSUMS).mkdir(exist_ok=True)
        shutil.copyfile(recorded, workdir / CHECKSUMS / recorded.name)


def set_aside_damaged(workdir: Path) -> list[str]:
    """Moves damaged checkpoints newer than the newest sound one to `damaged/`; returns a line about each.

    One without recorded checksums (a kill between its last byte and theirs) counts as sound: it was renamed to its
    final name, so it is complete.

    Raises:
      ValueError: there are checkpoints and all are damaged; nothing is moved.
    """
    folder = workdir / CHECKPOINTS
    if not folder.is_dir():
        return []
    steps = sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True)
    found = []
    for step in steps:
        if (what := damage(workdir, step)) is None:
            break
        found.append((step, what))
    if found and len(found) == len(steps):
        listed = "; ".join(f"step {step}: {what}" for step, what in found)
        raise ValueError(
            f"every checkpoint in {folder} is damaged ({listed}); put a good copy there, or move the workdir away to "
            "start again"
        )
    lines = []
    for step, what in found:
        aside = workdir / DAMAGED / f"{step}-{uuid.uuid4().hex[:8]}"
        aside.parent.mkdir(exist_ok=True)
        shutil.move(folder / str(step), aside)
        forget_checksums(workdir, step)
        lines.append(f"checkpoint of step {step} is damaged ({what}): moved to {aside}; using step {steps[len(found)]}")
    return lines


def _sums(folder: Path) -> dict[str, list]:
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            sums[str(path.relative_to(folder))] = [path.stat().st_size, digest]
    return sums


def damage(workdir: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, or None; one without recorded checksums is taken to be sound."""
    recorded = workdir / CHECKSUMS / f"{step}.json"
    if not recorded.exists():
        return None
    try:
        expected = json.loads(recorded.read_text())
    except ValueError:
        return f"{recorded} is no JSON"
    entries = expected.values() if isinstance(expected, dict) else [None]
    if not all(isinstance(entry, list) and len(entry) == 2 for entry in entries):
        return f"{recorded} holds no checksums"
    found = _sums(workdir / CHECKPOINTS / str(step))
    for name, (size, digest) in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes instead of {size}"
        if found[name][1] != digest:
            return f"{name} has another checksum than when it was written"
    return None
