"""Windows of tokens cut from texts, with what identifies them: rows of unlike windows do not belong in one table."""

import glob
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data.documents import SUFFIXES, Skipped, read_documents
from train.data.tokenizer import Tokenizer


class Windows(NamedTuple):
    """Tokens to predict, cut from texts.

    Attributes:
      tokens: int32 [W, S]; each row is a sequence of its own.
      bytes: how many bytes of text the predicted tokens (all but each row's first) stand for, [W].
      sha256: of the tokens and their shape.
    """

    tokens: np.ndarray
    bytes: np.ndarray
    sha256: str


def find_texts(patterns: Sequence[str]) -> list[Path]:
    """Files that the patterns name, sorted within each.

    Raises:
      ValueError: a pattern that names no file.
    """
    found: list[Path] = []
    for pattern in patterns:
        some = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not some:
            raise ValueError(f"no file {pattern}")
        found += [path for path in some if path not in found]
    return found


def cut_windows(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    length: int,
    count: int | None = None,
    skip: int = 0,
    each: int | None = None,
    begin: int | None = None,
) -> Windows:
    """Windows of ``length`` tokens without overlap, text by text; what is left at a text's end falls.

    Args:
      paths: texts; of `.jsonl` and the like every document is a text.
      tokenizer: of the model.
      length: tokens of a window.
      count: at most so many, taken evenly from all there are; None for all.
      skip: tokens left out at the beginning of each text.
      each: at most so many windows of each text.
      begin: a token to put at the beginning of each window, in place of its first.

    Raises:
      ValueError: a file that cannot be read, or too little text for one window.
    """
    rows, sizes, tokens = [], [], 0
    for text in _texts(paths):
        encoding = tokenizer.core.encode(text, add_special_tokens=False)
        tokens += len(encoding.ids)
        starts = range(skip, len(encoding.ids) - length + 1, length)
        for start in starts[: len(starts) if each is None else each]:
            rows.append(encoding.ids[start : start + length])
            first, last = encoding.offsets[start][1], encoding.offsets[start + length - 1][1]
            sizes.append(len(text[first:last].encode()))
    if not rows:
        raise ValueError(
            f"{', '.join(map(str, paths[:3]))}: {tokens:,} tokens in all, too short for a window of {length} tokens "
            f"behind the first {skip} of a text; give more text or a smaller --window"
        )
    if count is not None and count < len(rows):
        chosen = np.linspace(0, len(rows) - 1, count).round().astype(int)
        rows, sizes = [rows[i] for i in chosen], [sizes[i] for i in chosen]
    found = np.array(rows, np.int32)
    if begin is not None:
        found[:, 0] = begin
    digest = hashlib.sha256(f"{found.shape}".encode() + found.tobytes()).hexdigest()
    return Windows(found, np.array(sizes), digest)


def _texts(paths: Sequence[Path]):
    for path in paths:
        if path.name.endswith(SUFFIXES):
            yield from read_documents(path, on_broken=partial(Skipped().add_broken, path))
            continue
        try:
            yield path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from error
