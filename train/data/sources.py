"""Where a run's tokens come from: one prepared folder, several mixed by weight, or none at all (synthetic).

All three have the interface of `train.data.token_files.TokenDataset` as far as a run uses it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32, Integer

from train.config.settings import Data, RunConfig
from train.data.token_files import SPLITS, TokenDataset, open_dataset, verify_shards, window_order
from train.data.tokenizer import Tokenizer
from train.state.remote import is_remote

SYNTHETIC_WINDOWS = {"train": 1 << 40, "val": 256}


@dataclass(frozen=True)
class Mixture:
    """One split of several prepared folders, of which each gives its share of every stretch of batches.

    Windows are numbered through: those of the first folder, then those of the second, and so on.

    Attributes:
      names: last component of each folder.
      parts: the folders' splits.
      weights: share of each among the windows, up to a factor; kept to 1 %.
    """

    names: tuple[str, ...]
    parts: tuple[TokenDataset, ...]
    weights: tuple[float, ...]

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def documents(self) -> int:
        return sum(part.documents for part in self.parts)

    @property
    def vocab_size(self) -> int:
        return self.parts[0].vocab_size

    @property
    def eos_id(self) -> int:
        return self.parts[0].eos_id

    @property
    def tokenizer(self) -> Tokenizer:
        return self.parts[0].tokenizer

    @property
    def tokenizer_path(self) -> Path:
        return self.parts[0].tokenizer_path

    def num_windows(self, seq_len: int) -> int:
        """Of all folders together.  Raises ValueError where one of them is shorter than a window."""
        return sum(part.num_windows(seq_len) for part in self.parts)

    def order(self, seq_len: int, seed: int) -> grain.MapDataset:
        """Numbers of windows without end: each folder's shuffled anew in each of its epochs, taken by weight."""
        orders, first = [], 0
        for index, part in enumerate(self.parts):
            count = part.num_windows(seq_len)
            orders.append(window_order(first, count, seed + index))
            first += count
        return grain.MapDataset.mix(orders, self.weights)

    def windows(self, indices: Integer[np.ndarray, " B"], seq_len: int) -> Int32[np.ndarray, "B S+1"]:
        """The windows with these numbers, [B, S + 1]."""
        counts = [part.num_windows(seq_len) for part in self.parts]
        ends = np.cumsum(counts)
        owners = np.searchsorted(ends, indices, side="right")
        out = np.empty((len(indices), seq_len + 1), np.int32)
        for owner in np.unique(owners):
            rows = owners == owner
            out[rows] = self.parts[owner].windows(indices[rows] - (ends[owner] - counts[owner]), seq_len)
        return out


@dataclass(frozen=True)
class Synthetic:
    """Tokens drawn by frequencies as in text (token i about 1 / (i + 1)) and nothing else: to try and to time a run.

    Window i is a function of i and the split.  There is no text behind the tokens: one counts as one byte.
    """

    split: str
    vocab_size: int
    eos_id: int = 0

    @property
    def tokens(self) -> int:
        return SYNTHETIC_WINDOWS[self.split]

    @property
    def bytes(self) -> int:
        return self.tokens

    @property
    def bytes_per_token(self) -> float:
        return 1.0

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ValueError: there is none."""
        raise ValueError("Data.synthetic=True has no tokenizer: texts, tasks and exports need a prepared Data.folder")

    @property
    def tokenizer_path(self) -> Path:
        raise ValueError("Data.synthetic=True has no tokenizer: texts, tasks and exports need a prepared Data.folder")

    def num_windows(self, seq_len: int) -> int:
        return SYNTHETIC_WINDOWS[self.split]

    def order(self, seq_len: int, seed: int) -> grain.MapDataset:
        """The same windows in the same shuffled order for the same seed."""
        return window_order(0, self.num_windows(seq_len), seed)

    def windows(self, indices: Integer[np.ndarray, " B"], seq_len: int) -> Int32[np.ndarray, "B S+1"]:
        """The windows with these numbers, [B, S + 1]."""
        split = SPLITS.index(self.split)
        uniform = np.stack([np.random.default_rng((split, int(i))).random(seq_len + 1) for i in indices])
        return np.minimum(self.vocab_size**uniform, self.vocab_size).astype(np.int32) - 1


Dataset = TokenDataset | Mixture | Synthetic


def open_split(config: RunConfig, split: str) -> Dataset:
    """One split of a run's data.

    Raises:
      ValueError: a folder that cannot be used, or folders written by different tokenizers.
    """
    data = config.data
    for folder in folders(data):
        if is_remote(folder):
            raise ValueError(
                f"Data: {folder!r} is no path: token files are mapped into memory; copy the folder, or mount it"
            )
    if data.synthetic:
        return Synthetic(split, config.model.vocab_size)
    if data.folder is not None:
        return open_dataset(data.folder, split)
    names = source_names(data)
    parts = [open_dataset(folder, split) for folder, _ in data.sources]
    for part in parts[1:]:
        if part.tokenizer.sha256 != parts[0].tokenizer.sha256 or part.eos_id != parts[0].eos_id:
            raise ValueError(
                f"Data.sources: {part.path} and {parts[0].path} were written by different tokenizers; prepare one "
                f"again with --tokenizer={parts[0].tokenizer_path}"
            )
    return Mixture(names, tuple(parts), tuple(float(weight) for _, weight in data.sources))


def open_fitting(config: RunConfig, split: str) -> Dataset:
    """One split.  Raises ValueError where it does not fit the model or the sequence length."""
    dataset = open_split(config, split)
    if dataset.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer of {describe(config.data)} has {dataset.vocab_size} tokens but "
            f"Model.vocab_size={config.model.vocab_size}: raise it (a smaller tokenizer is fine)"
        )
    if config.model.document_start not in (None, dataset.eos_id):
        raise ValueError(
            f"Model.document_start={config.model.document_start}, but documents of {describe(config.data)} are "
            f"divided by the token {dataset.eos_id}: bind that"
        )
    dataset.num_windows(config.train.seq_len)
    return dataset


def open_data(config: RunConfig) -> tuple[Dataset, Dataset]:
    """Both splits.  Raises ValueError where they do not fit the model or the sequence length."""
    return open_fitting(config, "train"), open_fitting(config, "val")


def verify(config: RunConfig, record: Path) -> None:
    """Reads every token file in full and compares it with its manifest.  Raises ValueError for one that changed.

    record: where to note size and time of what was read; a file that still has both is not read again.
    """
    noted = read_record(record)
    known = dict(noted)
    for folder in folders(config.data):
        for split in SPLITS:
            known |= verify_shards(folder, split, known)
    if known != noted:
        record.write_text(json.dumps(known, indent=1) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """What `verify` noted; nothing, so that all is read again, where the record is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def identity(dataset: Dataset) -> dict[str, Any]:
    """What tells these data from others, and mixtures of the same data apart."""
    found: dict[str, Any] = {"tokens": dataset.tokens, "bytes": dataset.bytes, "vocab_size": dataset.vocab_size}
    if isinstance(dataset, Mixture):
        sources = zip(dataset.names, dataset.parts, dataset.weights, strict=True)
        found["sources"] = [[name, part.tokens, weight] for name, part, weight in sources]
        found["sha256"] = [part.sha256 for part in dataset.parts]
    if isinstance(dataset, TokenDataset):
        found["sha256"] = dataset.sha256
    if isinstance(dataset, Synthetic):
        found["synthetic"] = True
    return found


def parts(dataset: Dataset) -> Sequence[tuple[str, float, TokenDataset | Synthetic]]:
    """(name, share, data) of each source; the shares sum to 1."""
    if not isinstance(dataset, Mixture):
        return [("", 1.0, dataset)]
    total = sum(dataset.weights)
    return [(n, w / total, d) for n, w, d in zip(dataset.names, dataset.weights, dataset.parts, strict=True)]


def folders(data: Data) -> list[str]:
    """The prepared folders."""
    return [data.folder] if data.folder is not None else [folder for folder, _ in data.sources]


def describe(data: Data) -> str:
    return ", ".join(folders(data)) or "the synthetic data"


def source_names(data: Data) -> tuple[str, ...]:
    """What the sources are called in the log.

    Raises:
      ValueError: two folders of one name.
    """
    names = [Path(folder).name for folder, _ in data.sources]
    if len(set(names)) < len(names):
        raise ValueError(f"Data.sources has folders with the same last component: {names}; rename one of them")
    return tuple(names)
