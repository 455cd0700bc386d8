"""Documents out of text files: `.jsonl.zst`, `.jsonl.zstd`, `.jsonl`, `.parquet` and `.txt`, as a stream."""

from __future__ import annotations

import glob
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.utils import CallbackIOWrapper

SUFFIXES = (".jsonl.zst", ".jsonl.zstd", ".jsonl", ".parquet", ".txt")
# A longer .txt file is cut at line ends into several documents: memory stays bounded, and a corpus that is a
# single file can still be divided into a training and a held-out part.
TXT_DOCUMENT_CHARS = 1 << 18
# A document is encoded in one piece: a longer one, most likely a file taken for a line, would take many GB.
MAX_DOCUMENT_CHARS = 1 << 26

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd", b"BZ": "bzip2", b"\xfd7": "xz"}  # first two bytes

EXAMPLES = 3  # of broken documents that are kept in words
FEW_BROKEN = 10  # so many may be broken whatever their share: one of twenty is no reason to stop
BROKEN_AT_ONCE = 1000  # so many in one group of files show that something is wrong with all of it


class BrokenDocumentError(ValueError):
    """One document that cannot be read, in a file that goes on behind it."""

    def __init__(self, text: str, reason: str = ""):
        """text: what is wrong, with file and line.  reason: the same in words that many documents share."""
        super().__init__(text)
        self.reason = reason


class Field(NamedTuple):
    """Which field (`.jsonl`) or column (`.parquet`) holds the text, and how long it may be."""

    name: str = "text"
    max_chars: int = MAX_DOCUMENT_CHARS

    def checked(self, text: object, where: str) -> str:
        """The text.  Raises BrokenDocumentError if it is none, or too long."""
        if not isinstance(text, str):
            found = type(text).__name__
            raise BrokenDocumentError(
                f"{where}: field {self.name!r} should be a string, found {found}; choose another with --text_field",
                "no string",
            )
        if len(text) > self.max_chars:
            raise BrokenDocumentError(
                f"{where}: a document of {len(text):,} characters, more than {self.max_chars:,}; divide it, or raise "
                "--max_document_chars",
                "too long",
            )
        return text


class Skipped:
    """What was left out of some files: broken documents by file and reason, empty ones by file.

    Attributes:
      documents: how many were read, the left out ones not among them.
      broken: by file, how many for each reason.
      empty: by file.
      examples: what was wrong with the first broken ones, with file and line.
    """

    def __init__(self, limit: float | None = None):
        """limit: the largest share of broken documents, looked at once there are ``BROKEN_AT_ONCE``."""
        self.documents = 0
        self.broken: dict[str, Counter[str]] = {}
        self.empty: Counter[str] = Counter()
        self.examples: list[str] = []
        self._limit = limit
        self._count = 0

    def add_broken(self, path: Path, error: BrokenDocumentError) -> None:
        """Counts a broken document of a file.

        Raises:
          ValueError: too many were broken for the rest to be worth reading.
        """
        self._count += 1
        self.broken.setdefault(str(path), Counter())[error.reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(str(error))
        share = self._count / (self._count + self.documents)
        if self._limit is not None and self._count >= BROKEN_AT_ONCE and share > self._limit:
            check_share(self.record(), self.documents, self._limit)

    def add_empty(self, path: Path) -> None:
        """Counts an empty document of a file."""
        self.empty[str(path)] += 1

    def record(self) -> dict[str, Any]:
        """As a manifest keeps it."""
        names = sorted(self.broken.keys() | self.empty.keys())
        files = [
            {"name": name, "broken": dict(sorted(self.broken.get(name, {}).items())), "empty": self.empty[name]}
            for name in names
        ]
        return {"documents": self._count, "empty": self.empty.total(), "examples": self.examples, "files": files}


def together(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Records of several groups of files as one."""
    examples = [example for record in records for example in record["examples"]]
    return {
        "documents": sum(record["documents"] for record in records),
        "empty": sum(record["empty"] for record in records),
        "examples": examples[:EXAMPLES],
        "files": [file for record in records for file in record["files"]],
    }


def describe_skipped(record: dict[str, Any], documents: int) -> list[str]:
    """Lines about what was left out beside so many documents that were read; none if nothing was."""
    lines = []
    if record["documents"]:
        total: Counter[str] = Counter()
        for file in record["files"]:
            total.update(file["broken"])
        share = record["documents"] / (record["documents"] + documents)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in total.most_common())
        files = sum(bool(file["broken"]) for file in record["files"])
        count = f"broken documents left out: {record['documents']:,} ({share:.2%}; in files: {files:,})"
        lines.append(f"{count}, {reasons}; the first:")
        lines += [f"  {example}" for example in record["examples"]]
    if record["empty"]:
        lines.append(f"empty documents left out: {record['empty']:,}")
    return lines


def check_share(record: dict[str, Any], documents: int, limit: float) -> None:
    """Raises ValueError if more than ``FEW_BROKEN`` documents and more than a share ``limit`` of all are broken."""
    count = record["documents"]
    if count > FEW_BROKEN and count > limit * (count + documents):
        worst = max(record["files"], key=lambda file: sum(file["broken"].values()))["name"]
        raise ValueError(
            f"{count:,} of {count + documents:,} documents are broken, more than the share max_broken={limit:g}, most "
            f"in {worst}; the first: {record['examples'][0]}. Mend the input, leave bad files out, or raise "
            "--max_broken"
        )


def raise_broken(error: BrokenDocumentError) -> None:
    """What to do with a broken document, if nothing else is said."""
    raise error


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The files behind paths, glob patterns and folders, in sorted order, each once.

    Folders are searched in depth, linked ones too; what is hidden (`.name`) is passed over. A file that is named in
    several ways, by links or by `..`, is one file.

    Raises:
      ValueError: a pattern without match, a folder without readable file, an unknown suffix.
    """
    found: set[Path] = set()
    for entry in inputs:
        path = Path(entry)
        if path.is_dir():
            inside = {p for p in _inside(path) if p.name.endswith(SUFFIXES)}
            if not inside:
                raise ValueError(f"folder {path} holds no file with a suffix among {', '.join(SUFFIXES)}")
            found |= inside
            continue
        matches = [path] if path.is_file() else [Path(p) for p in glob.glob(str(entry), recursive=True)]
        matches = [p for p in matches if p.is_file()]
        if not matches:
            raise ValueError(f"input {entry} is no file, no folder, and as a pattern matches nothing")
        for match in matches:
            if not match.name.endswith(SUFFIXES):
                raise ValueError(f"{match}: unknown kind of file; the suffix must be one of {', '.join(SUFFIXES)}")
        found.update(matches)
    if not found:
        raise ValueError("no input files given")
    first: dict[tuple[int, int], Path] = {}
    for path in sorted(found):
        first.setdefault(file_identity(path), path)
    return list(first.values())


def file_identity(path: Path) -> tuple[int, int]:
    """What a file is, however it is named."""
    status = path.stat()
    return status.st_dev, status.st_ino


def other_files(folder: Path) -> list[Path]:
    """What `find_files` passes over in a folder: files of other suffixes, hidden ones aside, in sorted order."""
    return sorted(path for path in _inside(folder) if not path.name.endswith(SUFFIXES))


def _inside(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those in it, each folder once, without what is hidden."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        identity = file_identity(Path(place))
        if identity in seen:  # a link to a folder further up, or a second one to the same
            folders.clear()
            continue
        seen.add(identity)
        yield from (path for name in names if not name.startswith(".") and (path := Path(place) / name).is_file())


def read_documents(
    path: str | Path,
    field: Field = Field(),  # noqa: B008 (it is immutable)
    on_bytes: Callable[[int], object] = lambda n: None,
    on_broken: Callable[[BrokenDocumentError], object] = raise_broken,
    on_empty: Callable[[], object] = lambda: None,
) -> Iterator[str]:
    """The documents of one file, in order; those without a visible character are left out.

    Args:
      path: the file; its suffix says how to read it.
      field: where `.jsonl` and `.parquet` hold the text.
      on_bytes: called with the number of bytes of the file consumed since the last call, for a progress bar.
      on_broken: called with what is wrong with a line or row (no JSON, no text field, no string, too long); if it
        returns, the document is left out. A file that cannot be read on, or is no UTF-8 text as a whole, is an error in
        any case.
      on_empty: called for each document that is left out because there is nothing to see in it.

    Raises:
      ValueError: anything wrong with the content, naming the file and the line or row.
    """
    path = Path(path)
    if path.name.endswith(".parquet"):
        documents = _parquet(path, field, on_bytes, on_broken)
    elif path.name.endswith(".txt"):
        documents = _txt(path, on_bytes)
    else:
        documents = _jsonl(path, field, on_bytes, on_broken)
    for text in documents:
        if text and not text.isspace():
            yield text
        else:
            on_empty()


def _jsonl(
    path: Path,
    field: Field,
    on_bytes: Callable[[int], object],
    on_broken: Callable[[BrokenDocumentError], object],
) -> Iterator[str]:
    number = 0
    with path.open("rb") as file:
        if path.name.endswith(".jsonl") and (kind := _COMPRESSED.get(file.read(2))):
            raise ValueError(f"{path}, line 1: compressed by {kind}, not text; give it as .jsonl.zst, packed by zstd")
        file.seek(0)
        raw: BinaryIO = CallbackIOWrapper(on_bytes, file, "read")  # pyrefly: ignore
        stream: pa.NativeFile = pa.PythonFile(raw, mode="r")
        if not path.name.endswith(".jsonl"):
            if path.stat().st_size == 0:  # no compressor writes that, and pyarrow takes it for no documents
                raise ValueError(
                    f"{path}: broken compressed data after line 0: it is empty; fetch the file again, or leave it out"
                )
            # pyarrow's reader goes through all frames and, unlike zstandard's, reports one that is cut off.
            stream = pa.CompressedInputStream(stream, "zstd")
        try:
            for number, line in enumerate(io.BufferedReader(stream, 1 << 20), 1):  # pyrefly: ignore
                if line.isspace():
                    continue
                try:
                    text = _text_of(line, field, f"{path}, line {number}")
                except BrokenDocumentError as error:
                    on_broken(error)
                    continue
                yield text
        except OSError as error:
            raise ValueError(
                f"{path}: broken compressed data after line {number}: {error}; fetch the file again, or leave it out"
            ) from error


def _text_of(line: bytes, field: Field, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, brackets nested as deep
        raise BrokenDocumentError(
            f"{where}: not valid JSON: {error}; mend or remove the line", "not valid JSON"
        ) from error
    if not isinstance(record, dict):
        raise BrokenDocumentError(
            f"{where}: expected a JSON object, found {type(record).__name__}; mend or remove the line", "no JSON object"
        )
    if field.name not in record:
        raise BrokenDocumentError(
            f"{where}: no field {field.name!r}; the fields are {sorted(record)}, choose one with --text_field",
            f"without field {field.name!r}",
        )
    return field.checked(record[field.name], where)


def _parquet(
    path: Path,
    field: Field,
    on_bytes: Callable[[int], object],
    on_broken: Callable[[BrokenDocumentError], object],
) -> Iterator[str]:
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            if field.name not in file.schema_arrow.names:
                raise ValueError(
                    f"{path}: no column {field.name!r}; the columns are {file.schema_arrow.names}, choose "
                    "one with --text_field"
                )
            groups = file.metadata.num_row_groups
            for group in range(groups):
                for batch in file.iter_batches(1024, row_groups=[group], columns=[field.name]):
                    for value in batch.column(0):
                        row += 1
                        try:
                            text = field.checked(_value_of(value, f"{path}, row {row}"), f"{path}, row {row}")
                        except BrokenDocumentError as error:
                            on_broken(error)
                            continue
                        yield text
                on_bytes(path.stat().st_size // groups)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: broken parquet file after row {row}: {error}; fetch the file again, or leave it out"
        ) from error


def _value_of(value: pa.Scalar, where: str) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise BrokenDocumentError(f"{where}: not UTF-8 text: {error}; mend or remove the row", "not UTF-8") from error


def _txt(path: Path, on_bytes: Callable[[int], object]) -> Iterator[str]:
    lines = 0
    if path.stat().st_size == 0:  # the file is a document, so an empty one counts as such
        yield ""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            while text := file.read(TXT_DOCUMENT_CHARS):
                text += file.readline(TXT_DOCUMENT_CHARS)
                lines += text.count("\n")
                yield text
                on_bytes(len(text.encode()))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, after line {lines}: not UTF-8 text: {error}; convert it (iconv -t UTF-8), or leave it out"
            ) from error
