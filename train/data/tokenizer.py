"""Tokenizers: train a byte-level BPE, or load any Hugging Face `tokenizer.json`.

`Tokenizer` adds two things to `tokenizers.Tokenizer`: it knows the token that ends a document, and it treats
the names of special tokens that occur *inside* a text as ordinary text, so no document can forge its own end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_DOCUMENT = "<|endoftext|>"
# The names under which published tokenizers keep their end-of-document token, the most specific first.
KNOWN_END_OF_DOCUMENT = (END_OF_DOCUMENT, "<|end_of_text|>", "<|endofdocument|>", "<eos>", "</s>")
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
        return [e.ids for e in self.core.encode_batch_fast(clean, add_special_tokens=False)]

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
    (id 0). It comes out smaller than asked when the texts have too few different words.

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
            yield _without_surrogates(text)

    core.train_from_iterator(clean(), trainer=trainer)
    if not seen:
        raise ValueError("cannot train a tokenizer: the input holds no text")
    return _wrap(core, END_OF_DOCUMENT, "the trained tokenizer")


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
    if eos_token is None:
        vocab = core.get_vocab(with_added_tokens=True)
        eos_token = next((name for name in KNOWN_END_OF_DOCUMENT if name in vocab), None)
        if eos_token is None:
            raise ValueError(
                f"{path} has none of the usual end-of-document tokens {', '.join(KNOWN_END_OF_DOCUMENT)}; "
                "name one of its tokens with --eos_token"
            )
    return _wrap(core, eos_token, str(path))


def _wrap(core: tokenizers.Tokenizer, eos_token: str, source: str) -> Tokenizer:
    vocab = core.get_vocab(with_added_tokens=True)
    if eos_token not in vocab:
        raise ValueError(f"{source} has no token {eos_token!r}; name one of its {len(vocab)} tokens")
    core.encode_special_tokens = True  # "<|endoftext|>" written in a document is text, not its end
    core.no_truncation()  # a tokenizer.json may carry a length limit or padding meant for another use
    core.no_padding()
    return Tokenizer(core, eos_token, vocab[eos_token], max(vocab.values()) + 1)


def _without_surrogates(text: str) -> str:
    """JSON can spell half a UTF-16 pair, which no UTF-8 text can hold: U+FFFD takes its place."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
