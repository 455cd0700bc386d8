"""Tokenizers: train a byte-level BPE, or load any Hugging Face `tokenizer.json`.

`Tokenizer` adds two things to `tokenizers.Tokenizer`: it knows the token that ends a document, and it treats
the names of special tokens that occur *inside* a text as ordinary text, so no document can forge its own end.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_DOCUMENT = "<|endoftext|>"
# The names under which published tokenizers keep their end-of-document token, the most specific first.
KNOWN_END_OF_DOCUMENT = (END_OF_DOCUMENT, "<|end_of_text|>", "<|endofdocument|>", "<eos>", "</s>")
LONGEST_RUN = 256  # characters
_LONG_RUN = re.compile(rf"\S{{{LONGEST_RUN}}}(?=\S)|\s{{{LONGEST_RUN}}}(?=\s)")
PROBE = "Zürich 東京 naïve \U0001f600 ½ q"  # what texts hold sooner or later
MIN_VOCAB_SIZE = 256 + 1  # every byte, and the end of a document


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with its end-of-document token.

    Attributes:
      core: the underlying tokenizer.
      eos_token: name of the end-of-document token.
      eos_id: its id.
      vocab_size: largest id + 1, which is what an embedding table needs (ids may have gaps).
    """

    core: tokenizers.Tokenizer
    eos_token: str
    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without any special token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens; all cores work on the batch."""
        clean = [_without_surrogates(text) for text in texts]
        found = [e.ids for e in self.core.encode_batch_fast(clean, add_special_tokens=False)]
        return [self._unforged(text) if self.eos_id in ids else ids for text, ids in zip(clean, found, strict=True)]

    def _unforged(self, text: str) -> list[int]:
        """Ids of a text in which the model itself finds the end token's name: cut behind the name's first letter.

        Raises:
          ValueError: even so there is an end in the text; `load_tokenizer` refuses such a tokenizer.
        """
        first, rest = self.eos_token[:1], self.eos_token[1:]
        pieces = [f"{rest}{piece}{first}" for piece in text.split(self.eos_token)]
        pieces = [pieces[0].removeprefix(rest), *pieces[1:]]
        pieces[-1] = pieces[-1].removesuffix(first)
        ids = [i for e in self.core.encode_batch_fast(pieces, add_special_tokens=False) for i in e.ids]
        if self.eos_id in ids:
            raise ValueError(f"the tokenizer gives the end-of-document token {self.eos_token!r} inside a text")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens leave no trace, bytes that are not UTF-8 become U+FFFD."""
        return self.core.decode(list(ids), skip_special_tokens=True)

    def to_json(self) -> str:
        """The content of a `tokenizer.json` file."""
        return self.core.to_str(pretty=True)

    @property
    def sha256(self) -> str:
        """SHA-256 of `to_json()`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens, the same for the same texts in the same order.

    The vocabulary holds the 256 bytes, so any text can be encoded and decodes to itself, and `<|endoftext|>`
    (id 0). It comes out smaller than asked when the texts have too few different words. A run of more than
    `LONGEST_RUN` letters, digits, blanks or other signs counts as several words: merges inside one long word take
    time that grows with its square.

    Args:
      texts: documents; read once, never held together.
      vocab_size: 257 or more.

    Raises:
      ValueError: vocab_size is below 257, or there is no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for a byte-level BPE: it needs at least {MIN_VOCAB_SIZE} "
            "(256 bytes and the end-of-document token)"
        )
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyrefly: ignore
    core.decoder = decoders.ByteLevel()  # pyrefly: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = False

    def clean() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen = seen or bool(text)
            yield from _cut_long_runs(_without_surrogates(text))

    core.train_from_iterator(clean(), trainer=trainer)
    if not seen:
        raise ValueError("cannot train a tokenizer: the input holds no text")
    return wrap_tokenizer(core, END_OF_DOCUMENT, "the trained tokenizer")


def load_tokenizer(path: str | Path, eos_token: str | None = None) -> Tokenizer:
    """Loads a Hugging Face `tokenizer.json`.

    Args:
      path: the file.
      eos_token: name of the token that ends a document; by default the first of `KNOWN_END_OF_DOCUMENT` that
        the vocabulary holds.

    Raises:
      ValueError: no such file, not a tokenizer, or no end-of-document token in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no tokenizer file at {path}; give the path of a tokenizer.json")
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for anything it cannot parse
        raise ValueError(f"{path} is not a tokenizer.json that the tokenizers library can read: {error}") from error
    return wrap_tokenizer(core, eos_token, str(path))


def wrap_tokenizer(core: tokenizers.Tokenizer, eos_token: str | None, source: str) -> Tokenizer:
    """A tokenizer of the library as ours; arguments and errors as in `load_tokenizer`."""
    vocab = core.get_vocab(with_added_tokens=True)
    if eos_token is None:
        eos_token = next((name for name in KNOWN_END_OF_DOCUMENT if name in vocab), None)
        if eos_token is None:
            raise ValueError(
                f"{source} has none of the usual end-of-document tokens {', '.join(KNOWN_END_OF_DOCUMENT)}; "
                "name one of its tokens with --eos_token"
            )
    if eos_token not in vocab:
        raise ValueError(f"{source} has no token {eos_token!r}; name one of its {len(vocab)} tokens")
    core.encode_special_tokens = True  # "<|endoftext|>" written in a document is text, not its end
    core.no_truncation()  # a tokenizer.json may carry a length limit or padding meant for another use
    core.no_padding()
    tokenizer = Tokenizer(core, eos_token, vocab[eos_token], max(vocab.values()) + 1)
    _check_any_text(tokenizer, source)
    return tokenizer


def _check_any_text(tokenizer: Tokenizer, source: str) -> None:
    """Raise ValueError where some text would stop the encoding, get lost in it, or hold an end of document."""
    try:
        for word in PROBE.split(" "):
            if not tokenizer.encode(f"a {word} b")[len(tokenizer.encode("a b")) :]:
                raise ValueError(f"{word!r} becomes nothing")
    except Exception as error:  # the library raises bare Exception where a model has no unknown token
        raise ValueError(
            f"{source} cannot encode every text: {error}. A character that its vocabulary lacks stops it or is lost; "
            "give the model an unknown token, or bytes to fall back to"
        ) from error
    name = tokenizer.eos_token
    try:
        for text in (name, f"a {name} b", f"a{name}b", name * 2, f" {name} {name} "):
            tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(
            f"{source}: a document that holds the text {name!r} would end there; name another end-of-document token "
            "with --eos_token"
        ) from error


def _cut_long_runs(text: str) -> Iterator[str]:
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _without_surrogates(text: str) -> str:
    """JSON can spell half a UTF-16 pair, which no UTF-8 text can hold: U+FFFD takes its place."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
