"""A workdir in object storage, `--workdir=gs://bucket/run`: the run works in a local copy, whole checkpoints travel.

A run locks files, appends to them and checks their hashes, which object storage does not do. So it has a folder on
this machine, and everything of it is sent when a checkpoint is complete and at the end. The address decides: a start
takes what is there, on whatever machine, and what had not arrived there is computed again. A checkpoint has arrived
once its checksums have, which are sent last. Any protocol of fsspec will do; `gs://` needs gcsfs, `s3://` s3fs.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import jax
from fsspec.core import url_to_fs

from train.state.workdir import CHECKPOINTS, CHECKSUMS, DAMAGED, LOCK_FILE, damage

_STAYS = (CHECKPOINTS, CHECKSUMS, DAMAGED, LOCK_FILE)  # all else in the workdir are records


def is_remote(text: str | Path) -> bool:
    """Whether it is an address such as gs://bucket/run, not a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", str(text)) is not None


class Remote:
    """The workdir at an address, and its local copy.

    Attributes:
      url: the address.
      local: the folder on this machine, `$XDG_CACHE_HOME/venom-jax/workdirs/...` (~/.cache).
    """

    def __init__(self, url: str, *, use: str = "run"):
        """use: who reads beside a run that is just writing has a local copy of its own.

        Raises:
          ValueError: an unknown protocol, or its package is not installed.
        """
        self.url = url.rstrip("/")
        try:
            self._files, self._root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{url}: {error}; gs:// needs the package gcsfs, s3:// needs s3fs, or give a folder"
            ) from error
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        self.local = cache / "venom-jax" / "workdirs" / f"{PurePosixPath(self.url).name}-{digest}" / use

    def steps(self) -> list[int]:
        """Steps of the checkpoints that have arrived, in order.

        Raises:
          ValueError: the address cannot be read.
        """
        names = [name.split("/")[1] for name in self._names() if name.startswith(f"{CHECKSUMS}/")]
        return sorted(int(stem) for name in names if (stem := name.removesuffix(".json")).isdigit())

    def bring(self, step: int | None = None) -> None:
        """Makes the local copy what is at the address: its records and the checkpoint of ``step`` or the newest.

        Raises:
          ValueError: the address cannot be read, or the checkpoint is not there.
        """
        if jax.process_count() > 1:
            raise ValueError(
                f"{self.url}: a run of several processes needs a folder that all hosts share; mount the store"
            )
        steps = self.steps()
        if step is not None and step not in steps:
            raise ValueError(f"{self.url} holds no checkpoint of step {step}; it has {steps}")
        chosen = steps[-1] if step is None and steps else step
        for path in self.local.iterdir() if self.local.is_dir() else ():
            if path.name not in (CHECKPOINTS, LOCK_FILE):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        wanted = [name for name in self._names() if name.split("/")[0] not in _STAYS]
        for name in [*wanted, *([] if chosen is None else [f"{CHECKSUMS}/{chosen}.json"])]:
            self._get(name)
        folder = self.local / CHECKPOINTS
        for path in folder.iterdir() if folder.is_dir() else ():
            if chosen is None or path.name != str(chosen) or damage(self.local, chosen) is not None:
                shutil.rmtree(path)
        if chosen is not None and not (folder / str(chosen)).exists():
            for name in self._names(f"{CHECKPOINTS}/{chosen}"):
                self._get(name, self.local / ".arriving")
            folder.mkdir(exist_ok=True)
            os.replace(self.local / ".arriving" / CHECKPOINTS / str(chosen), folder / str(chosen))

    def send(self, step: int) -> None:
        """Sends a complete checkpoint and the records; removes those there that are no longer here.

        Raises:
          OSError: it could not be sent.
        """
        for path in sorted((self.local / CHECKPOINTS / str(step)).rglob("*")):
            if path.is_file():
                self._put(path)
        self.send_records()
        self._put(self.local / CHECKSUMS / f"{step}.json")
        for old in self.steps():
            if not (self.local / CHECKPOINTS / str(old)).exists():
                self._files.rm_file(f"{self._root}/{CHECKSUMS}/{old}.json")
                self._files.rm(f"{self._root}/{CHECKPOINTS}/{old}", recursive=True)

    def send_records(self) -> None:
        """Sends everything but checkpoints.

        Raises:
          OSError: it could not be sent.
        """
        for path in self._records():
            self._put(path)

    def _records(self) -> Iterator[Path]:
        for path in sorted(self.local.rglob("*")):
            first = path.relative_to(self.local).parts[0]
            if path.is_file() and first not in _STAYS and not first.startswith("."):
                yield path

    def _names(self, below: str = "") -> list[str]:
        """Files at the address, relative to it."""
        root = f"{self._root}/{below}" if below else self._root
        try:
            self._files.invalidate_cache()
            found = self._files.find(root)
        except FileNotFoundError:
            return []
        except Exception as error:  # each store has its own
            raise ValueError(f"{self.url} cannot be read: {error}") from error
        names = sorted(str(name)[len(self._root) :].lstrip("/") for name in found)
        if outside := [name for name in names if ".." in PurePosixPath(name).parts]:
            raise ValueError(f"{self.url} holds {outside[0]!r}, which leads out of the folder; remove it there")
        return names

    def _get(self, name: str, folder: Path | None = None) -> None:
        target = (folder or self.local) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self._files.get_file(f"{self._root}/{name}", str(target))

    def _put(self, path: Path) -> None:
        target = f"{self._root}/{path.relative_to(self.local).as_posix()}"
        try:
            self._files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._files.put_file(str(path), target)
        except Exception as error:
            raise OSError(f"{path.name} could not be sent to {self.url}: {error}") from error
