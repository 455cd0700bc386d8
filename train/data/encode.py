"""Text files to token files, in units of work that run in any order, in parallel, and survive a kill.

A unit is a run of consecutive input files. It writes token files under its own number and, last, a record of them;
a unit with a record is finished and is never done again. Which files a unit holds follows from the input alone, so
the token files do not depend on the number of processes nor on how often the work was interrupted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

from train.data import token_files
from train.data.documents import Field, Skipped, raise_broken, read_documents
from train.data.tokenizer import load_tokenizer

UNIT_BYTES = 1 << 26  # of input: a few seconds to a minute of work
BATCH_CHARS = 1 << 22
BATCH_DOCUMENTS = 4096
POLL_SECONDS = 0.2

OnBytes = Callable[[int], object]


@dataclass(frozen=True)
class Unit:
    """Consecutive input files, each with the split it belongs to before documents are held out."""

    index: int
    files: tuple[tuple[Path, str], ...]

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(path.stat().st_size for path, _ in self.files)


def units_of(files: Iterable[tuple[Path, str]]) -> list[Unit]:
    """The files in order, grouped so that every unit but the last has at least `UNIT_BYTES` of input."""
    units: list[Unit] = []
    group, size = [], 0
    for path, split in files:
        group.append((path, split))
        size += path.stat().st_size
        if size >= UNIT_BYTES:
            units.append(Unit(len(units), tuple(group)))
            group, size = [], 0
    return [*units, Unit(len(units), tuple(group))] if group else units


@dataclass(frozen=True)
class Encoder:
    """Encodes units into `folder`; sent to every worker process.

    Attributes:
      folder: where the token files and records go.
      tokenizer: a `tokenizer.json`.
      eos_token: the token put behind each document.
      field: where the text is.
      held_out: share of the training documents that goes to "val", chosen by a hash of the text.
      shard_tokens: most tokens in one file.
      max_broken: the largest share of broken documents, which are left out and counted; None: stop at the first.
    """

    folder: Path
    tokenizer: Path
    eos_token: str
    field: Field
    held_out: float
    shard_tokens: int
    max_broken: float | None

    def record(self, unit: Unit) -> dict[str, Any] | None:
        """What a finished unit wrote, for each split, and what it skipped; None if it is not finished."""
        path = self._record_path(unit)
        return json.loads(path.read_text()) if path.exists() else None

    def encode(self, unit: Unit, on_bytes: OnBytes) -> None:
        """Writes the unit's token files, and last its record."""
        tokenizer = load_tokenizer(self.tokenizer, self.eos_token)
        dtype = token_files.token_dtype(tokenizer.vocab_size)
        writers = {
            s: _ShardWriter(self.folder, f"{unit.index:05d}-{s}", dtype, self.shard_tokens) for s in token_files.SPLITS
        }
        skipped, least = Skipped(self.max_broken), None
        try:
            for batch in _batches(self.documents(unit.files, on_bytes, skipped)):
                for (split, text), ids in zip(batch, tokenizer.encode_batch([t for _, t in batch]), strict=True):
                    writers[split].add(ids, tokenizer.eos_id, len(text.encode(errors="replace")))
                    least = min(_place(text), _ALL if least is None else least)
        finally:
            for writer in writers.values():
                writer.close()
        record = {split: writer.summary() for split, writer in writers.items()}
        record |= {"skipped": skipped.record(), "least": least}
        write_atomically(self._record_path(unit), json.dumps(record))

    def documents(
        self,
        files: Iterable[tuple[Path, str]],
        on_bytes: OnBytes,
        skipped: Skipped,
    ) -> Iterator[tuple[str, str]]:
        """(split, text) of every document; `skipped` counts those left out."""
        for path, split in files:
            on_broken = raise_broken if self.max_broken is None else functools.partial(skipped.add_broken, path)
            on_empty = functools.partial(skipped.add_empty, path)
            for text in read_documents(path, self.field, on_bytes, on_broken, on_empty):
                skipped.documents += 1
                yield ("val" if split == "train" and _is_held_out(text, self.held_out) else split), text

    def _record_path(self, unit: Unit) -> Path:
        return self.folder / f"{unit.index:05d}.json"


def encode_units(encoder: Encoder, units: Sequence[Unit], processes: int, on_bytes: OnBytes) -> None:
    """Encodes the units that are not finished; `on_bytes` hears of the input consumed, also for finished ones.

    Raises:
      ValueError: anything wrong with the input.
      OSError: a file cannot be written, or a worker process died.
    """
    remaining = []
    for unit in units:
        if encoder.record(unit) is None:
            remaining.append(unit)
        else:
            on_bytes(unit.size)
    processes = min(processes, len(remaining))
    if processes <= 1:
        for unit in remaining:
            encoder.encode(unit, on_bytes)
        return
    # Spawned, not forked: the tokenizer's threads in this process do not survive a fork.
    context = multiprocessing.get_context("spawn")
    consumed = context.Value("q", 0)
    threads = max(1, (os.cpu_count() or 1) // processes)
    reported = 0
    with ProcessPoolExecutor(processes, context, _start_worker, (encoder, consumed, threads)) as pool:
        running: set[Future[None]] = {pool.submit(_encode_in_worker, unit) for unit in remaining}
        try:
            while running:
                done, running = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                on_bytes(consumed.value - reported)
                reported = consumed.value
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process died (out of memory?): run the same command again to go on, with fewer --processes"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(encoder: Encoder, consumed: Any, threads: int) -> None:
    global _worker
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by the tokenizer when it first encodes

    def on_bytes(count: int) -> None:
        with consumed.get_lock():
            consumed.value += count

    _worker = (encoder, on_bytes)
    threading.Thread(target=_end_with_parent, daemon=True).start()


_worker: tuple[Encoder, OnBytes]


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever, and write beside the run that resumes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(unit: Unit) -> None:
    encoder, on_bytes = _worker
    encoder.encode(unit, on_bytes)


def write_atomically(path: Path, text: str) -> None:
    """The file is there in full or not at all."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text)
    os.replace(unfinished, path)


_ALL = 2**64


def _place(text: str) -> int:
    """Where a document stands among the 2^64 places of which the first ones are held out: a hash of its text."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big")


def _is_held_out(text: str, fraction: float) -> bool:
    return _place(text) < fraction * _ALL


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Lists of documents large enough to keep all cores busy and small enough to bound memory."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_CHARS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """Appends documents to `NAME-00000.bin`, `NAME-00001.bin`, ..., of at most `shard_tokens` tokens."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int):
        self._folder, self._name, self._shard_tokens = folder, name, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._files: list[dict[str, Any]] = []
        self._file = None
        self._digest = hashlib.sha256()
        self._room = 0
        self._documents = 0
        self._bytes = 0

    def add(self, ids: list[int], eos_id: int, text_bytes: int) -> None:
        tokens = np.array([*ids, eos_id], self._dtype)
        while len(tokens):
            if self._room == 0:
                self._next()
            part, tokens = tokens[: self._room], tokens[self._room :]
            content = part.tobytes()
            assert self._file is not None
            self._file.write(content)
            self._digest.update(content)
            self._room -= len(part)
            self._files[-1]["tokens"] += len(part)
        self._documents += 1
        self._bytes += text_bytes

    def _next(self) -> None:
        self.close()
        name = f"{self._name}-{len(self._files):05d}.bin"
        self._file = (self._folder / name).open("wb")
        self._digest = hashlib.sha256()
        self._room = self._shard_tokens
        self._files.append({"name": name, "tokens": 0})

    def close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())  # the record that follows must not outlive the tokens in a power cut
            self._file.close()
            self._file = None
            self._files[-1]["sha256"] = self._digest.hexdigest()
            self._files[-1]["edges_sha256"] = token_files.edges_sha256(self._folder / self._files[-1]["name"])

    def summary(self) -> dict[str, Any]:
        tokens = sum(entry["tokens"] for entry in self._files)
        return {"documents": self._documents, "bytes": self._bytes, "tokens": tokens, "files": self._files}
