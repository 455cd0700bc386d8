"""A run that goes on from another run's checkpoint with all of its state: `--init_from=WORKDIR@STEP --init_state`."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from train.evaluation.validation import split_source
from train.records.metrics import METRICS_FILE, read_metrics
from train.state.checkpoint import Checkpoints
from train.state.processes import first_alone
from train.state.workdir import CHECKPOINTS, copy_checksums, damage


def branch(source: str, workdir: Path, wanted: dict[str, Any]) -> None:
    """Makes ``workdir`` what it would be if the run in ``source`` had happened there up to its newest or given step.

    The checkpoint comes last and in one piece, so that a branch that was interrupted is made again.

    Args:
      source: `WORKDIR` or `WORKDIR@STEP`.
      workdir: holds no checkpoint.
      wanted: fingerprint of the run that goes on; it may differ in what is still to come.

    Raises:
      ValueError: no such checkpoint, a damaged one, or another run's.
    """
    folder, step = split_source(source)
    if not (folder / CHECKPOINTS).is_dir():
        raise ValueError(f"--init_from={source} with --init_state needs a workdir of train.main; {folder} is none")
    with Checkpoints(folder, 1, writer=False) as checkpoints:
        step = checkpoints.latest if step is None else step
        if step not in checkpoints.steps:
            raise ValueError(f"{folder} holds no checkpoint of step {step}; it has {checkpoints.steps}")
        chosen = step
        first_alone(lambda: check_sound(folder, chosen))
        checkpoints.check(wanted, chosen)
    first_alone(lambda: copy(folder, workdir, chosen))


def check_sound(folder: Path, step: int) -> None:
    """Raises ValueError if a checkpoint is not what was written."""
    if (what := damage(folder, step)) is not None:
        raise ValueError(f"the checkpoint of step {step} in {folder} is damaged ({what}); take another step")


def copy(folder: Path, workdir: Path, step: int) -> None:
    """Copies metrics, checksums and checkpoint, in this order."""
    kept = [record for record in read_metrics(folder) if record["step"] <= step]
    (workdir / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in kept))
    copy_checksums(folder, workdir, step)
    unfinished = workdir / ".branch"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(folder / CHECKPOINTS / str(step), unfinished)
    (workdir / CHECKPOINTS).mkdir(exist_ok=True)
    os.replace(unfinished, workdir / CHECKPOINTS / str(step))
