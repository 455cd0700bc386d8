"""Turns text into token shards: what `python -m train.prepare` does.

The manifest is written last, so an interrupted run leaves nothing that could be mistaken for a dataset; the same call
then goes on where it was and gives the same files, byte for byte, as one without interruption.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from train.data import token_files
from train.data.documents import (
    MAX_DOCUMENT_CHARS,
    Field,
    Skipped,
    check_share,
    describe_skipped,
    file_identity,
    find_files,
    other_files,
    together,
)
from train.data.encode import Encoder, Unit, encode_units, units_of, write_atomically
from train.data.tokenizer import END_OF_DOCUMENT, MIN_VOCAB_SIZE, Tokenizer, load_tokenizer, train_bpe
from train.state.workdir import WorkdirLock

DEFAULT_VOCAB_SIZE = 16384
DEFAULT_VALIDATION_FRACTION = 0.01
SHARD_TOKENS = 1 << 27
MAX_BROKEN = 0.01
BPE_TEXT_BYTES = 1 << 28  # the tokenizer is trained on the first 256 MiB of the training text
UNFINISHED = ".unfinished"  # folder inside the output: what a later run needs to go on
SETTINGS = "settings.json"


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
    max_document_chars: int = MAX_DOCUMENT_CHARS,
    shard_tokens: int = SHARD_TOKENS,
    max_broken: float = MAX_BROKEN,
    strict: bool = False,
    processes: int = 1,
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
      max_document_chars: a longer document counts as broken.
      shard_tokens: most tokens in one file.
      max_broken: documents that cannot be read are left out, and counted in the manifest by file and reason; more
        than this share of them (and more than ten) is an error. A file that is broken as a whole always is.
      strict: the first broken document is an error.
      processes: how many encode side by side, each its own part of the input files; the result is the same.
        With more than 1, the calling script needs the usual `if __name__ == "__main__":`.
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
    if shard_tokens < 1 or max_document_chars < 1:
        raise ValueError(f"{shard_tokens=} and {max_document_chars=} must be at least 1")
    if processes < 1:
        raise ValueError(f"{processes=} must be at least 1")
    fraction = DEFAULT_VALIDATION_FRACTION if validation_fraction is None else validation_fraction
    if not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction={fraction} must be at least 0 and below 1")
    if not 0 <= max_broken <= 1:
        raise ValueError(f"{max_broken=} must be between 0 and 1")

    train_files = find_files(inputs)
    val_files = find_files(validation) if validation else []
    held = {file_identity(path) for path in val_files}
    if both := [path for path in train_files if file_identity(path) in held]:
        raise ValueError(f"{both[0]} is both training and validation input")
    for folder in (Path(entry) for entry in (*inputs, *validation)):
        if folder.is_dir() and (others := other_files(folder)):
            print(f"{folder}: {len(others):,} files of other kinds are not read, such as {others[0]}", file=sys.stderr)
    splits = token_files.SPLITS if validation or fraction > 0 else token_files.SPLITS[:1]
    files = [(path, "train") for path in train_files] + [(path, "val") for path in val_files]
    given = load_tokenizer(tokenizer, eos_token) if tokenizer is not None else None
    output = Path(output)
    settings = {
        "version": token_files.VERSION,
        "files": [[str(p.resolve()), split, p.stat().st_size, p.stat().st_mtime_ns] for p, split in files],
        "tokenizer": given.sha256 if given else vocab_size or DEFAULT_VOCAB_SIZE,
        "eos_token": eos_token,
        "held_out": 0 if validation else fraction,
        "text_field": text_field,
        "max_document_chars": max_document_chars,
        "shard_tokens": shard_tokens,
    }
    options = _Options(max_broken, strict, processes, progress, bool(validation))
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = WorkdirLock(output, "output folder", "--output")
    except OSError as error:
        raise ValueError(f"cannot write to output folder {output}: {error}") from error
    with lock:
        _claim(output, settings, overwrite)
        try:
            return _write(output, files, splits, settings, given, options)
        except _NothingHeldOutError as nothing:
            print(
                f"{output}: no document fell into the held-out split with validation_fraction={fraction}; the one "
                "nearest to it is held out",
                file=sys.stderr,
            )
            settings["held_out"] = nothing.fraction
            _claim(output, settings, overwrite)
            return _write(output, files, splits, settings, given, options)


class _Options(NamedTuple):
    """What does not change the result."""

    max_broken: float
    strict: bool
    processes: int
    progress: bool
    separate: bool
    """Whether the validation split has files of its own."""


class _NothingHeldOutError(Exception):
    def __init__(self, fraction: float):
        """fraction: the smallest at which a document is held out."""
        self.fraction = fraction


def _write(
    output: Path,
    files: list[tuple[Path, str]],
    splits: Sequence[str],
    settings: dict[str, Any],
    given: Tokenizer | None,
    options: _Options,
) -> dict[str, Any]:
    """Writes all but what an interrupted run has written, and returns the manifest."""
    tokenizer_path = output / token_files.TOKENIZER
    max_broken, strict, fraction = options.max_broken, options.strict, settings["held_out"]
    encoder = Encoder(
        folder=output / UNFINISHED,
        tokenizer=tokenizer_path,
        eos_token=given.eos_token if given else END_OF_DOCUMENT,
        field=Field(settings["text_field"], settings["max_document_chars"]),
        held_out=fraction,
        shard_tokens=settings["shard_tokens"],
        max_broken=None if strict else max_broken,
    )
    size = sum(path.stat().st_size for path, _ in files)

    def bar(description: str) -> tqdm:
        # disable=None: tqdm shows itself on a terminal only
        return tqdm(desc=description, total=size, unit="B", unit_scale=True, disable=None if options.progress else True)

    if not tokenizer_path.exists():
        if given is None:
            read = Skipped(encoder.max_broken)
            with bar("train tokenizer") as shown:
                documents = encoder.documents(files, shown.update, read)
                training_text = (text for split, text in documents if split == "train")
                first = next(training_text, None)
                if first is None:  # most likely because all that was read is broken
                    check_share(read.record(), read.documents, max_broken)
                    empty = _empty_message("train", fraction, options.separate)
                    raise ValueError(_with_left_out(empty, read.record(), read.documents))
                texts = _first_bytes(itertools.chain([first], training_text), BPE_TEXT_BYTES)
                given = train_bpe(texts, settings["tokenizer"])
        write_atomically(tokenizer_path, given.to_json())
    units = units_of(files)
    with bar("encode") as shown:
        encode_units(encoder, units, options.processes, shown.update)
    skipped = together([record["skipped"] for unit in units if (record := encoder.record(unit))])
    contents = {split: _gather(encoder, units, split) for split in splits}
    if strict and skipped["documents"]:  # of units that an earlier run without it encoded
        raise ValueError(skipped["examples"][0])
    check_share(skipped, count_documents(contents), max_broken)
    for split, content in contents.items():
        if not content["documents"]:
            least = min((record["least"] for unit in units if (record := encoder.record(unit))), default=None)
            shutil.rmtree(encoder.folder)  # nothing there is worth going on with
            if split == "val" and not options.separate and least is not None and contents["train"]["documents"] > 1:
                raise _NothingHeldOutError(math.nextafter((least + 1) / 2**64, 1))
            empty = _empty_message(split, fraction, options.separate)
            raise ValueError(_with_left_out(empty, skipped, count_documents(contents)))
    manifest = _finish(output, load_tokenizer(tokenizer_path, encoder.eos_token), contents, skipped)
    shutil.rmtree(encoder.folder)
    return manifest


def _claim(output: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Makes the output folder; removes what an earlier run left there unless it had the same settings."""
    manifest, unfinished = output / token_files.MANIFEST, output / UNFINISHED
    if manifest.exists() and not overwrite:
        raise ValueError(f"{output} already holds a finished dataset: choose another folder, or use --overwrite")
    try:
        output.mkdir(parents=True, exist_ok=True)
        manifest.unlink(missing_ok=True)  # first: from here on the folder is unfinished
        earlier = unfinished / SETTINGS
        if earlier.exists():
            if json.loads(earlier.read_text()) == settings:
                return
            print(f"{output}: other input or options than the interrupted run's, starting over", file=sys.stderr)
        shutil.rmtree(unfinished, ignore_errors=True)
        for path in output.iterdir():
            if path.name == token_files.TOKENIZER or re.fullmatch(
                rf"({'|'.join(token_files.SPLITS)})-\d{{5}}\.bin", path.name
            ):
                path.unlink()
        unfinished.mkdir()
        write_atomically(earlier, json.dumps(settings))
    except OSError as error:
        raise ValueError(f"cannot write to output folder {output}: {error}") from error


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    total = 0
    for text in texts:
        yield text
        total += len(text.encode(errors="replace"))
        if total >= limit:
            return


def _empty_message(split: str, fraction: float, separate: bool) -> str:
    if split == "train":
        return "the input holds no training document" + (
            "" if separate else f" (validation_fraction={fraction}); it is empty or too small to divide"
        )
    if separate:
        return "the validation input holds no document"
    return (
        f"no document fell into the held-out split with validation_fraction={fraction}, which with few documents is "
        "chance: give --validation=FILE, or raise it; with --validation_fraction=0 there is no held-out split, and "
        "train.main needs one"
    )


def _with_left_out(message: str, skipped: dict[str, Any], documents: int) -> str:
    """The message, and what was left out beside so many documents, if anything was."""
    return ". ".join(part for part in (message, " ".join(describe_skipped(skipped, documents))) if part)


def _gather(encoder: Encoder, units: Sequence[Unit], split: str) -> dict[str, Any]:
    """What the units wrote for one split, in the order of the input."""
    total: dict[str, Any] = {"documents": 0, "bytes": 0, "tokens": 0, "files": []}
    for unit in units:
        record = encoder.record(unit)
        assert record is not None
        for key in total:
            total[key] += record[split][key]
    return total


def count_documents(contents: dict[str, dict[str, Any]]) -> int:
    return sum(content["documents"] for content in contents.values())


def _finish(output: Path, tokenizer: Tokenizer, contents: dict[str, Any], skipped: dict[str, Any]) -> dict[str, Any]:
    """Gives the token files their final names and writes the manifest."""
    for split, content in contents.items():
        for number, entry in enumerate(content["files"]):
            written, entry["name"] = output / UNFINISHED / entry["name"], f"{split}-{number:05d}.bin"
            if written.exists():  # else an interrupted run has come this far
                os.replace(written, output / entry["name"])
    manifest = {
        "format": token_files.FORMAT,
        "version": token_files.VERSION,
        "dtype": token_files.token_dtype(tokenizer.vocab_size),
        "vocab_size": tokenizer.vocab_size,
        "eos_token": tokenizer.eos_token,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": hashlib.sha256((output / token_files.TOKENIZER).read_bytes()).hexdigest(),
        "splits": contents,
        "skipped": skipped,
    }
    write_atomically(output / token_files.MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest
