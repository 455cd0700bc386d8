"""Log-likelihoods of tokens under a model, in batches of a few fixed shapes so that few programs are compiled."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import batched
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from train.config.settings import RunConfig
from train.data.documents import SUFFIXES, Field, Skipped, read_documents
from train.data.tokenizer import Tokenizer
from train.model.decoder import assemble
from venom_jax import StackRecipe

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a context and of its continuation
SHORTENINGS = 4  # batches are as long as a training sequence, half, a quarter or an eighth of it
WINDOWS_AT_ONCE = 4096


class BatchScorer:
    """log p(continuation | context) of one model, batch by batch.

    Args:
      score: tokens [B, S+1] -> (log p, whether most probable) of tokens[:, 1:], both [B, S].
      max_length: the longest S.
      tokens: of a batch; short sequences, more rows.
    """

    def __init__(self, score: Callable[[np.ndarray], tuple[Array, Array]], *, max_length: int, tokens: int):
        self.max_length = max_length
        self._tokens = tokens
        shortenings = [2**i for i in range(SHORTENINGS) if max_length % 2**i == 0]
        self._lengths = sorted(max_length // by for by in shortenings)
        self._score = score

    def __call__(self, pairs: Sequence[Pair], *, progress: bool = False) -> list[tuple[float, bool]]:
        """(sum of log p in nats, whether each token of the continuation was the most probable) of each pair.

        What does not fit into the model is cut from the beginning of the context.

        Raises:
          ValueError: an empty context, or a continuation longer than the model's sequences.
        """
        rows = [self._row(*pair) for pair in pairs]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        waiting: dict[int, list[int]] = {length: [] for length in self._lengths}
        for i, row in enumerate(rows):
            if pairs[i][1]:
                waiting[next(length for length in self._lengths if len(row) <= length + 1)].append(i)
        with tqdm(total=sum(map(len, waiting.values())), unit="sequences", disable=not progress) as bar:
            for length, indices in waiting.items():
                for batch in batched(indices, self._tokens // length):
                    tokens = np.zeros((self._tokens // length, length + 1), np.int32)
                    for place, i in enumerate(batch):
                        tokens[place, : len(rows[i])] = rows[i]
                    logp, best = jax.device_get(self._score(tokens))
                    for place, i in enumerate(batch):
                        end = len(rows[i]) - 1  # position s predicts token s + 1
                        span = slice(end - len(pairs[i][1]), end)
                        results[i] = math.fsum(map(float, logp[place, span])), bool(best[place, span].all())
                    bar.update(len(batch))
        return results

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        if not context:
            raise ValueError("a context needs at least one token; the end-of-document token begins a text")
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens is longer than the model's {self.max_length} "
                "(Train.seq_len); leave that item out"
            )
        return [*context, *continuation][-(self.max_length + 1) :]


class Scorer(BatchScorer):
    """The scorer of a run's model; a batch has as many tokens as a microbatch of the training."""

    def __init__(self, graphdef: nnx.GraphDef, config: RunConfig, params: dict, method: dict, recipe: StackRecipe):
        train = config.train
        score = partial(_make_score(graphdef, config), params, method, recipe=recipe)
        tokens = train.batch_size // train.accumulation * train.seq_len
        super().__init__(score, max_length=train.seq_len, tokens=tokens)


def _make_score(graphdef: nnx.GraphDef, config: RunConfig):
    """score(params, method, tokens, recipe=...) -> (log p, whether most probable) of tokens[:, 1:], jitted."""
    train = config.train

    @partial(jax.jit, static_argnames="recipe")
    def score(
        params: dict, method: dict, tokens: Int[Array, "B S+1"], *, recipe: StackRecipe
    ) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
        decoder = assemble(graphdef, params, method)
        # A fixed key: the score must not depend on when it is asked for, also with the random router.
        hidden, *_ = decoder.hidden(
            tokens[:, :-1],
            recipe=recipe.forward,
            dtype=jnp.dtype(train.dtype),
            key=jax.random.key(0),
            implementation=train.implementation,
        )

        def row(pair):
            hidden, labels = pair
            logits = decoder.logits(hidden[None])[0]
            logp = -optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return logp, logits.argmax(axis=-1) == labels

        # Logits of one training sequence's worth of tokens at a time: those of a batch may not fit.
        return jax.lax.map(row, (hidden, tokens[:, 1:]), batch_size=train.seq_len // hidden.shape[1])

    return score


def windows(ids: Sequence[int], prefix: Sequence[int], length: int) -> Iterator[Pair]:
    """Stretches of a text that hold each token once, with as much of what stands before as fits into the model.

    The first is predicted from ``prefix``; each of the next has one token of context, the last, shorter one more.
    """
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        context = ids[end - length - 1 : start] if start else prefix
        yield context, ids[start:end]


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text."""

    nats: float
    documents: int
    tokens: int
    bytes: int
    skipped: Skipped

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens


def score_text(
    scorer: BatchScorer, tokenizer: Tokenizer, path: Path, *, text_field: str = "text", progress: bool = False
) -> TextScore:
    """-log p of a file's documents, each begun by the end-of-document token, which is not counted itself.

    Files are read as ``train.prepare`` reads them, broken documents left out and counted; one of another suffix is one
    document of UTF-8 text.

    Raises:
      ValueError: no such file, no text in it, or a file that is broken as a whole.
    """
    nats, tokens, size = [], 0, 0
    skipped = Skipped()

    def pieces() -> Iterator[Pair]:
        nonlocal tokens, size
        for text in _documents(path, Field(text_field), skipped):
            ids = tokenizer.encode(text)
            skipped.documents += 1
            tokens, size = tokens + len(ids), size + len(text.encode(errors="replace"))
            yield from windows(ids, [tokenizer.eos_id], scorer.max_length)

    for some in batched(pieces(), WINDOWS_AT_ONCE):
        nats += [-logp for logp, _ in scorer(some, progress=progress)]
    if not tokens:
        raise ValueError(". ".join([f"{path} holds no text", *skipped.examples]))
    return TextScore(math.fsum(nats), skipped.documents, tokens, size, skipped)


def _documents(path: Path, field: Field, skipped: Skipped) -> Iterable[str]:
    if not path.is_file():
        raise ValueError(f"no file {path}")
    if path.name.endswith(SUFFIXES):
        on_broken, on_empty = partial(skipped.add_broken, path), partial(skipped.add_empty, path)
        return read_documents(path, field, on_broken=on_broken, on_empty=on_empty)
    try:
        return [path.read_text(encoding="utf-8-sig")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
