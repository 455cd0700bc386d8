"""Turns text into token shards: `python -m train.prepare --input=FOLDER --output=FOLDER [--tokenizer=FILE]`.

Reads `.jsonl.zst`, `.jsonl`, `.parquet` and `.txt` as a stream, encodes in batches on all cores and writes
what `train.data.open_dataset` opens. An end-of-document token follows each document. The manifest is written
last, so an interrupted run leaves nothing that could be mistaken for a dataset; the next run starts over.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from tqdm import tqdm

from train import data
from train.documents import find_files, read_documents
from train.tokenizer import MIN_VOCAB_SIZE, Tokenizer, load_tokenizer, train_bpe

DEFAULT_VOCAB_SIZE = 16384
DEFAULT_VALIDATION_FRACTION = 0.01
SHARD_TOKENS = 1 << 27
BPE_TEXT_BYTES = 1 << 28  # the tokenizer is trained on the first 256 MiB of the training text
BATCH_CHARS = 1 << 22
BATCH_DOCUMENTS = 4096


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    eos_token: str | None = None,
    vocab_size: int | None = None,
    validation: Sequence[str | Path] = (),
    validation_fraction: float | None = None,
    text_field: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the training and the held-out split of a text corpus into `output` and returns the manifest.

    Args:
      inputs: files, glob patterns and folders.
      output: folder to write; made if needed.
      tokenizer: a Hugging Face `tokenizer.json`; without it a byte-level BPE is trained on the training text.
      eos_token: name of that tokenizer's end-of-document token, where it is not one of the usual ones.
      vocab_size: of the BPE (default 16384).
      validation: files, patterns and folders held out; everything in `inputs` is then for training.
      validation_fraction: without `validation`, the share of documents held out, chosen by a hash of the text
        (default 0.01): the same document always falls on the same side. 0 holds nothing out.
      text_field: field or column with the text.
      shard_tokens: most tokens in one file.
      overwrite: replace a finished dataset in `output`.
      progress: show progress bars, where the output is a terminal.

    Raises:
      ValueError: bad arguments, bad or empty input, an output folder that cannot be written or is in use.
    """
    if tokenizer is not None and vocab_size is not None:
        raise ValueError("give a tokenizer file or a vocabulary size for a new one, not both")
    if eos_token is not None and tokenizer is None:
        raise ValueError("eos_token names a token of a given tokenizer file; a new BPE has its own")
    if vocab_size is not None and vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"{vocab_size=} is too small: a byte-level BPE needs at least {MIN_VOCAB_SIZE}")
    if validation and validation_fraction is not None:
        raise ValueError("give validation files or a validation fraction, not both")
    if shard_tokens < 1:
        raise ValueError(f"{shard_tokens=} must be at least 1")
    fraction = DEFAULT_VALIDATION_FRACTION if validation_fraction is None else validation_fraction
    if not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction={fraction} must be at least 0 and below 1")

    train_files = find_files(inputs)
    val_files = find_files(validation) if validation else []
    if both := set(train_files) & set(val_files):
        raise ValueError(f"{min(both)} is both training and validation input")
    splits = data.SPLITS if validation or fraction > 0 else data.SPLITS[:1]
    given = load_tokenizer(tokenizer, eos_token) if tokenizer is not None else None
    output = Path(output)
    _claim(output, overwrite)

    hidden = None if progress else True  # None: tqdm shows itself on a terminal only

    def documents(description: str) -> Iterator[tuple[str, str]]:
        """(split, text) of every document."""
        files = [(p, "train") for p in train_files] + [(p, "val") for p in val_files]
        size = sum(p.stat().st_size for p, _ in files)
        with tqdm(desc=description, total=size, unit="B", unit_scale=True, disable=hidden) as bar:
            for path, split in files:
                for text in read_documents(path, text_field, bar.update):
                    held_out = not validation and fraction > 0 and _is_held_out(text, fraction)
                    yield ("val" if held_out else split), text

    if given is None:
        training_text = (text for split, text in documents("train tokenizer") if split == "train")
        given = train_bpe(_first_bytes(training_text, BPE_TEXT_BYTES), vocab_size or DEFAULT_VOCAB_SIZE)
    writers = {split: _ShardWriter(output, split, data.token_dtype(given.vocab_size), shard_tokens) for split in splits}
    try:
        for batch in _batches(documents("encode")):
            for (split, text), ids in zip(batch, given.encode_batch([text for _, text in batch]), strict=True):
                writers[split].add(ids, given.eos_id, len(text.encode(errors="replace")))
    finally:
        for writer in writers.values():
            writer.close()
    for split, writer in writers.items():
        if not writer.documents:
            raise ValueError(_empty_message(split, fraction, bool(validation)))
    return _write_manifest(output, given, {split: writer.summary() for split, writer in writers.items()})


def _claim(output: Path, overwrite: bool) -> None:
    """Makes the output folder and removes what an earlier run of this program left in it."""
    manifest = output / data.MANIFEST
    if manifest.exists() and not overwrite:
        raise ValueError(f"{output} already holds a finished dataset: choose another folder, or use --overwrite")
    try:
        output.mkdir(parents=True, exist_ok=True)
        manifest.unlink(missing_ok=True)  # first: from here on the folder is unfinished
        for path in output.iterdir():
            if re.fullmatch(rf"({'|'.join(data.SPLITS)})-\d{{5}}\.bin", path.name):
                path.unlink()
        probe = output / f".{data.MANIFEST}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to output folder {output}: {error}") from error


def _is_held_out(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    total = 0
    for text in texts:
        yield text
        total += len(text.encode(errors="replace"))
        if total >= limit:
            return


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


def _empty_message(split: str, fraction: float, separate: bool) -> str:
    if split == "train":
        return "the input holds no training document" + (
            "" if separate else f" (validation_fraction={fraction}); it is empty or too small to divide"
        )
    if separate:
        return "the validation input holds no document"
    return (
        f"no document fell into the held-out split with validation_fraction={fraction}: raise it, give "
        "--validation=FILE, or use --validation_fraction=0 to go without"
    )


class _ShardWriter:
    """Appends documents to `SPLIT-00000.bin`, `SPLIT-00001.bin`, ..., of at most `shard_tokens` tokens."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int):
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._files: list[dict[str, Any]] = []
        self._file = None
        self._digest = hashlib.sha256()
        self._room = 0
        self.documents = 0
        self.bytes = 0

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
        self.documents += 1
        self.bytes += text_bytes

    def _next(self) -> None:
        self.close()
        name = f"{self._split}-{len(self._files):05d}.bin"
        self._file = (self._folder / name).open("wb")
        self._digest = hashlib.sha256()
        self._room = self._shard_tokens
        self._files.append({"name": name, "tokens": 0})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._files[-1]["sha256"] = self._digest.hexdigest()
            self._files[-1]["edges_sha256"] = data.edges_sha256(self._folder / self._files[-1]["name"])

    def summary(self) -> dict[str, Any]:
        tokens = sum(entry["tokens"] for entry in self._files)
        return {"documents": self.documents, "bytes": self.bytes, "tokens": tokens, "files": self._files}


def _write_manifest(output: Path, tokenizer: Tokenizer, splits: dict[str, Any]) -> dict[str, Any]:
    (output / data.TOKENIZER).write_text(tokenizer.to_json())
    manifest = {
        "format": data.FORMAT,
        "version": data.VERSION,
        "dtype": data.token_dtype(tokenizer.vocab_size),
        "vocab_size": tokenizer.vocab_size,
        "eos_token": tokenizer.eos_token,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.sha256,
        "splits": splits,
    }
    unfinished = output / f".{data.MANIFEST}"
    unfinished.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(unfinished, output / data.MANIFEST)  # atomic: the manifest is there in full or not at all
    return manifest


def main(argv: Sequence[str]) -> int:
    """The command."""
    values = flags.FLAGS
    try:
        manifest = prepare(
            [*values.input, *argv[1:]],
            values.output,
            tokenizer=values.tokenizer,
            eos_token=values.eos_token,
            vocab_size=values.vocab_size,
            validation=values.validation,
            validation_fraction=values.validation_fraction,
            text_field=values.text_field,
            shard_tokens=values.shard_tokens,
            overwrite=values.overwrite,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for split, content in manifest["splits"].items():
        print(
            f"{split}: {content['documents']:,} documents, {content['bytes']:,} bytes, "
            f"{content['tokens']:,} tokens ({content['bytes'] / content['tokens']:.2f} bytes per token)"
        )
    print(f"{values.output}: vocabulary {manifest['vocab_size']:,}, {manifest['dtype']}")
    return 0


def define_flags() -> None:
    """The command line of this program."""
    flags.DEFINE_multi_string("input", [], "file, glob pattern or folder; may be repeated, or given as plain arguments")
    flags.DEFINE_string("output", None, "folder to write", required=True)
    flags.DEFINE_string("tokenizer", None, "a Hugging Face tokenizer.json; without it a BPE is trained")
    flags.DEFINE_string("eos_token", None, "end-of-document token of that tokenizer, if it has an unusual name")
    flags.DEFINE_integer("vocab_size", None, f"size of the new BPE (default {DEFAULT_VOCAB_SIZE})")
    flags.DEFINE_multi_string("validation", [], "file, glob pattern or folder held out; may be repeated")
    flags.DEFINE_float(
        "validation_fraction", None, f"share of documents held out (default {DEFAULT_VALIDATION_FRACTION})"
    )
    flags.DEFINE_string("text_field", "text", "field (.jsonl) or column (.parquet) with the text")
    flags.DEFINE_integer("shard_tokens", SHARD_TOKENS, "most tokens in one file")
    flags.DEFINE_boolean("overwrite", False, "replace a finished dataset in the output folder")


if __name__ == "__main__":
    define_flags()
    app.run(main)
