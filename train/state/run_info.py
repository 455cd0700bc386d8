"""What a run was started with: command, versions, git commit, devices and configuration, in run.json of its workdir.

One entry for each start; a resume appends. `train.run_report` prints them.
"""

import datetime
import json
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from train.config.settings import RunConfig
from train.model import decoder

RUN_FILE = "run.json"
FORMAT = 1
PACKAGES = ("venom-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


def record_start(workdir: Path, config: RunConfig, step: int) -> None:
    """Appends this start, from ``step`` completed steps, to run.json."""
    train = config.train
    entry = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": command_line(),
        "git": git_state(),
        "versions": versions(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "parameters": decoder.parameter_count(config.model),
        "steps": train.steps,
        "tokens_per_step": train.batch_size * train.seq_len,
        "config": config.text,
    }
    path = workdir / RUN_FILE
    starts = [*read_starts(workdir), entry]
    rewritten = path.with_suffix(".tmp")
    rewritten.write_text(json.dumps({"format": FORMAT, "starts": starts}, indent=1) + "\n")
    rewritten.replace(path)


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none where run.json is missing, as in runs of version 0.1.

    Raises:
      ValueError: the file is damaged, or of a later format.
    """
    path = workdir / RUN_FILE
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        known, starts = found["format"] == FORMAT, found["starts"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); move it away, the run does not need it") from error
    if not known:
        raise ValueError(f"{path} has format {found['format']}, this version reads {FORMAT}; use a newer venom-jax")
    return starts


def command_line() -> str:
    """The command that started this process, as a shell takes it."""
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


def versions() -> dict[str, str]:
    """Python's and the packages' versions; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from, and whether it has changes; None outside a checkout.

    Asked for this very file, so that an installed package inside somebody else's repository does not take its commit.
    """
    here = Path(__file__).resolve()
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
        return {"commit": _git(here.parent, "rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()
