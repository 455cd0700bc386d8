"""Token shards on disk, and the batches that training and evaluation read from them.

A prepared folder holds `train-00000.bin`, ..., `val-00000.bin`, ... (flat little-endian token ids),
`tokenizer.json` and `manifest.json`, which is written last: a folder without it is not finished.
Window i of a split is the tokens [i*S, i*S + S] of its shards laid end to end, S + 1 of them, so that every
token but the first is predicted exactly once; the rest after the last full window is not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Int32, Integer

from train.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = "venom-jax token shards"
VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "val")
EDGE_BYTES = 1 << 20
OPEN_FILES = 256  # of one split; a process may often have no more than 1,024
# As good as endless; grain's own endless repeat has a length that overflows when batch_size is 1.
ENDLESS = 1 << 62


class Windows(Protocol):
    """Numbered windows of S + 1 tokens, and the order in which training takes them."""

    def num_windows(self, seq_len: int) -> int: ...

    def order(self, seq_len: int, seed: int) -> grain.MapDataset: ...

    def windows(self, indices: Integer[np.ndarray, " B"], seq_len: int) -> Int32[np.ndarray, "B S+1"]: ...


@dataclass(frozen=True)
class TokenDataset:
    """One split of a prepared folder; made by `open_dataset`.

    Attributes:
      path: the folder.
      split: "train" or "val".
      shards: the token files, in order.
      shard_tokens: number of tokens in each.
      dtype: on-disk type of a token, "uint16" or "uint32".
      vocab_size: largest id a token may have, + 1.
      eos_id: the token that ends each document.
      documents: number of documents.
      bytes: UTF-8 bytes of their text.
      sha256: of the hashes of all token files, in order: what tells the same counts of other tokens apart.
    """

    path: Path
    split: str
    shards: tuple[Path, ...]
    shard_tokens: tuple[int, ...]
    dtype: str
    vocab_size: int
    eos_id: int
    documents: int
    bytes: int
    sha256: str = ""

    @property
    def tokens(self) -> int:
        """Number of tokens, the ends of documents included."""
        return sum(self.shard_tokens)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token: bits per byte = loss in nats / (ln 2 * bytes_per_token)."""
        return self.bytes / self.tokens

    @property
    def tokenizer_path(self) -> Path:
        """The `tokenizer.json` that wrote the shards."""
        return self.path / TOKENIZER

    @property
    def tokenizer(self) -> Tokenizer:
        """That tokenizer, loaded."""
        return load_tokenizer(self.tokenizer_path, _read_manifest(self.path)["eos_token"])

    def num_windows(self, seq_len: int) -> int:
        """Number of windows of seq_len + 1 tokens.

        Raises:
          ValueError: the split is shorter than one window.
        """
        if seq_len < 1:
            raise ValueError(f"{seq_len=}: a sequence needs at least 1 token")
        if seq_len + 1 > self.tokens:
            raise ValueError(
                f"sequence length {seq_len} needs {seq_len + 1} tokens, but the {self.split} split of "
                f"{self.path} has {self.tokens}: use a shorter sequence or prepare more text"
            )
        return (self.tokens - 1) // seq_len

    def order(self, seq_len: int, seed: int) -> grain.MapDataset:
        """Numbers of windows without end, shuffled anew for each epoch."""
        return window_order(0, self.num_windows(seq_len), seed)

    def read(self, start: int, out: Int32[np.ndarray, " n"]) -> None:
        """Fills `out` with the tokens [start, start + n) of the shards laid end to end."""
        filled = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while filled < len(out):
            offset = start + filled - (int(self._ends[shard]) - self.shard_tokens[shard])
            part = self._map(shard)[offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1

    def windows(self, indices: Integer[np.ndarray, " B"], seq_len: int) -> Int32[np.ndarray, "B S+1"]:
        """The windows with these numbers, [B, S + 1]."""
        out = np.empty((len(indices), seq_len + 1), np.int32)
        for row, index in zip(out, indices, strict=True):
            self.read(int(index) * seq_len, row)
        # A shard that is damaged inside passes the checks on opening. Its ids would index out of the
        # embedding, which an accelerator does not report.
        if out.max() >= self.vocab_size:
            raise ValueError(
                f"the {self.split} shards in {self.path} hold token {out.max()}, but the vocabulary has "
                f"{self.vocab_size}: the data is damaged, prepare it again"
            )
        return out

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.shard_tokens)

    @cached_property
    def _map(self) -> Callable[[int], np.memmap]:
        """A token file by its number; so many stay open, as each map holds a descriptor."""
        dtype = np.dtype(self.dtype).newbyteorder("<")
        return lru_cache(OPEN_FILES)(lambda shard: np.memmap(self.shards[shard], dtype, mode="r"))


def open_dataset(folder: str | Path, split: str = "train") -> TokenDataset:
    """Opens one split of a folder written by `python -m train.prepare`.

    Of every shard the size and a checksum over its first and last MiB are compared with the manifest.

    Raises:
      ValueError: no manifest, one of another kind or version, no such split, or a file that is missing,
        truncated or not the one that was prepared; names the file, what was expected and what was found.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    try:
        return _open(folder, manifest, split)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged, prepare the data again: {error!r}") from error


def _open(folder: Path, manifest: dict[str, Any], split: str) -> TokenDataset:
    if split not in manifest["splits"]:
        raise ValueError(
            f"{folder} has no split {split!r}; it has {sorted(manifest['splits'])}. Held-out text comes from "
            "--validation or --validation_fraction of train.prepare"
        )
    content = manifest["splits"][split]
    itemsize = np.dtype(manifest["dtype"]).itemsize
    for entry in content["files"]:
        if Path(entry["name"]).name != entry["name"]:
            raise ValueError(f"{folder / MANIFEST} names the token file {entry['name']!r}, which is not in its folder")
        _check_shard(folder / entry["name"], entry, itemsize)
    _check_tokenizer(folder / TOKENIZER, manifest["tokenizer_sha256"])
    return TokenDataset(
        path=folder,
        split=split,
        shards=tuple(folder / entry["name"] for entry in content["files"]),
        shard_tokens=tuple(entry["tokens"] for entry in content["files"]),
        dtype=manifest["dtype"],
        vocab_size=manifest["vocab_size"],
        eos_id=manifest["eos_id"],
        documents=content["documents"],
        bytes=content["bytes"],
        sha256=hashlib.sha256("".join(entry["sha256"] for entry in content["files"]).encode()).hexdigest(),
    )


def verify_shards(folder: str | Path, split: str, known: Mapping[str, Any] | None = None) -> dict[str, list]:
    """Reads every token file of a split in full and compares it with the manifest: minutes for a large data set.

    known: what an earlier call returned; a file with the same hash, size and time of change is not read again.

    Returns:
      [SHA-256, bytes, time of change] by each file's path.

    Raises:
      ValueError: a file's SHA-256 is not the manifest's; names it.
    """
    folder, seen = Path(folder).absolute(), {}
    for entry in _read_manifest(folder)["splits"][split]["files"]:
        path = folder / entry["name"]
        status = path.stat()
        seen[str(path)] = [entry["sha256"], status.st_size, status.st_mtime_ns]
        if known and known.get(str(path)) == seen[str(path)]:
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry["sha256"]:
            raise ValueError(
                f"token file {path} was changed after it was prepared: expected SHA-256 "
                f"{entry['sha256'][:16]}, found {found[:16]}; prepare the data again"
            )
    return seen


def window_order(first: int, count: int, seed: int) -> grain.MapDataset:
    """The numbers first, ..., first + count - 1, again and again, in another order each time."""
    return grain.MapDataset.range(first, first + count).seed(seed).shuffle().repeat(ENDLESS // count)


def train_iterator(
    dataset: Windows,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless shuffled batches `dict(tokens=int32 [B / process_count, S + 1])`.

    Every window comes once per epoch, in an order that depends on `seed` and on the epoch; a batch may hold
    the end of one epoch and the start of the next. `get_state` and `set_state` of the iterator are exact. A
    process gets its rows of the global batch; that batch and the state do not depend on the number of
    processes.

    Args:
      dataset: the split to read.
      batch_size: B, number of sequences in the global batch, a multiple of process_count.
      seq_len: S, tokens predicted per sequence.
      seed: of the shuffle, >= 0.
      process_index: which rows of the batch: [i * B / process_count, (i + 1) * B / process_count).
      process_count: number of processes that share a batch.

    Raises:
      ValueError: the data is shorter than one sequence, or the batch does not divide among the processes.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"{batch_size=} must be a positive multiple of {process_count=}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"{process_index=} must be at least 0 and below {process_count=}")
    rows = batch_size // process_count

    def batch(indices: Integer[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        mine = indices[process_index * rows : (process_index + 1) * rows]
        return {"tokens": dataset.windows(mine, seq_len)}

    # Window numbers are batched, not windows: so every process cuts its rows out of the same global batch, and
    # the tokens of a batch are gathered in one call (1.4 times the rate of one element per window).
    pipeline = dataset.order(seq_len, seed).batch(batch_size).map(batch)
    return iter(pipeline.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def eval_batches(
    dataset: Windows, *, batch_size: int, seq_len: int, max_batches: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The windows in order, as `dict(tokens=int32 [B, S + 1], weight=float32 [B])`.

    The last batch is filled up with rows of zeros whose weight is 0; all other weights are 1.

    Raises:
      ValueError: the data is shorter than one sequence.
    """
    if batch_size < 1:
        raise ValueError(f"{batch_size=} must be at least 1")
    count = dataset.num_windows(seq_len)
    if max_batches is not None:
        count = min(count, max_batches * batch_size)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, count, batch_size):
            indices = np.arange(start, min(start + batch_size, count))
            missing = batch_size - len(indices)
            tokens = np.pad(dataset.windows(indices, seq_len), ((0, missing), (0, 0)))
            weight = np.pad(np.ones(len(indices), np.float32), (0, missing))
            yield {"tokens": tokens, "weight": weight}

    return batches()


def token_dtype(vocab_size: int) -> str:
    """On-disk type: two bytes where the vocabulary fits, else four."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def edges_sha256(path: Path) -> str:
    """SHA-256 of the first MiB and the last MiB of a file.

    Cheap to check at every start, and it tells a foreign file of the right size from the prepared one.
    """
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(EDGE_BYTES))
        file.seek(max(0, path.stat().st_size - EDGE_BYTES))
        digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        # A run remembers the path as it was given, and may be evaluated from elsewhere.
        elsewhere = "" if folder.is_absolute() else f", or start in the folder from which {folder} leads to one"
        raise ValueError(
            f"{folder.absolute()} holds no {MANIFEST}: it is no prepared dataset, or preparing it was interrupted; "
            f"run python -m train.prepare --input=TEXT --output={folder}{elsewhere}"
        )
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, prepare the data again: {error}") from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else manifest
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path}: expected format {FORMAT!r} version {VERSION}, found {found}; prepare the data again")
    return manifest


def _check_shard(path: Path, entry: dict[str, Any], itemsize: int) -> None:
    if not path.is_file():
        raise ValueError(f"token file {path} is missing: the manifest lists it with {entry['tokens']} tokens")
    expected, found = entry["tokens"] * itemsize, path.stat().st_size
    if found != expected:
        raise ValueError(
            f"token file {path} is truncated or foreign: expected {expected} bytes ({entry['tokens']} tokens "
            f"of {itemsize} bytes), found {found}; prepare the data again"
        )
    checksum = edges_sha256(path)
    if checksum != entry["edges_sha256"]:
        raise ValueError(
            f"token file {path} is not the one that was prepared: expected checksum "
            f"{entry['edges_sha256'][:16]}, found {checksum[:16]}; prepare the data again"
        )


def _check_tokenizer(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: it is the tokenizer of the token files beside it")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} is not the tokenizer that wrote the token files: expected checksum {expected[:16]}, "
            f"found {found[:16]}; prepare the data again"
        )
