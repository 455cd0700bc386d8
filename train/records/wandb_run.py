"""The figures of a run in Weights & Biases, if `Train.wandb` names a project.  Needs the extra `wandb`.

Offline unless $WANDB_MODE says otherwise: nothing leaves the machine, and `wandb sync WORKDIR/wandb/offline-run-*`
uploads.
"""

import importlib.util
import os
import uuid
from pathlib import Path

from train.config.settings import bindings_in

ID_FILE = "wandb_id"  # in the workdir: a resumed run goes on in the same one


def require_wandb(project: str | None) -> None:
    """Raises ValueError where a project is given and the library is missing."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"Train.wandb={project!r} needs the library: pip install -e '.[wandb]'")


class WandbRun:
    """One run of a project."""

    def __init__(self, project: str, workdir: Path, text: str):
        """text: of the configuration, whose bindings become the run's."""
        import wandb  # pyrefly: ignore[missing-import]

        identity = workdir / ID_FILE
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            name=workdir.name,
            id=identity.read_text(),
            resume="allow",
            dir=str(workdir),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=bindings_in(text),
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Numbers of one step; steps that a resumed run repeats are not taken twice."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()
