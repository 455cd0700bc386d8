"""A model with saved sparsity at work: scores of texts and tasks, and text from it.

Prefill and decode follow the setting's stage; the masks are computed in plain JAX, so nothing here is faster than the
dense model: it tells what a text or a task loses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jaxtyping import Array, Bool, Float, Int

from train.evaluation import harness
from train.evaluation.likelihood import BatchScorer, score_text
from train.evaluation.sampling import LanguageModel, sample
from train.sparsity import saved
from train.sparsity.subject import Subject, load_subject
from venom_jax.activation.linear import Parameters
from venom_jax.activation.settings import Sparsity, describe
from venom_jax.pretrained import empty_cache, hidden, logits
from venom_jax.pretrained.architecture import Architecture

MAX_LENGTH = 2048  # of the sequences that are scored, where the model's context is longer
BATCH_TOKENS = 2048
_LENGTHS = 64  # texts are written in caches of a multiple of this many tokens: few programs are compiled


@dataclass(frozen=True)
class Model:
    """A model, and how its activations are pruned: None for not at all."""

    subject: Subject
    sparsity: Sparsity | None = None
    parameters: dict[str, Parameters] = field(default_factory=dict)

    @property
    def forward(self) -> str:
        """What tables call it."""
        return "dense" if self.sparsity is None else describe(self.sparsity)


def load_model(
    source: str,
    sparsity: str | None,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    other_weights: bool = False,
) -> Model:
    """The model, with the sparsity that `train.sparsify` saved in a folder.

    Raises:
      ValueError: as `load_subject` and `saved.read`.
    """
    subject = load_subject(source, dtype=dtype, tokenizer=tokenizer)
    if sparsity is None:
        return Model(subject)
    found = saved.read(Path(sparsity), subject.architecture, subject.hashes, other_weights=other_weights)
    return Model(subject, found.sparsity, found.parameters)


def from_flags(values: flags.FlagValues) -> Model:
    """The model that the commands' flags --model (or --workdir) and --sparsity name."""
    return load_model(
        values.model or values.workdir,
        values.sparsity,
        tokenizer=values.tokenizer,
        other_weights=values.allow_other_weights,
    )


def scorer(model: Model) -> BatchScorer:
    """Its scores of continuations; a sequence of one batch does not see the others or their padding."""
    arch = model.subject.architecture
    sparsity = model.sparsity if model.sparsity is not None and model.sparsity.at_prefill else None

    def score(tokens):
        return _score(arch, sparsity, model.subject.weights, model.parameters, jnp.asarray(tokens))

    return BatchScorer(score, max_length=min(arch.context, MAX_LENGTH), tokens=BATCH_TOKENS)


@partial(jax.jit, static_argnames=("arch", "sparsity"))
def _score(
    arch: Architecture, sparsity: Sparsity | None, weights: Any, parameters: dict, tokens: Int[Array, "B S+1"]
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    # Rows end in zeros where a sequence is shorter; only the criterion clact asks.
    valid = jnp.cumsum((tokens != 0)[:, ::-1], axis=1)[:, ::-1][:, :-1] > 0
    states, _ = hidden(arch, weights, inputs, sparsity=sparsity, parameters=parameters, valid=valid)

    def position(pair):
        state, label = pair
        logp = jax.nn.log_softmax(logits(arch, weights, state[None])[0])
        return logp[label], logp.argmax() == label

    flat = states.reshape(-1, states.shape[-1]), labels.reshape(-1)
    found = jax.lax.map(position, flat, batch_size=min(256, labels.size))
    return found[0].reshape(labels.shape), found[1].reshape(labels.shape)


@lru_cache(maxsize=4)
def language_model(arch: Architecture, sparsity: Sparsity | None, dtype: Any) -> LanguageModel:
    """For `sample`; its `params` are (weights, parameters)."""
    at_prefill = sparsity if sparsity is not None and sparsity.at_prefill else None
    at_decode = sparsity if sparsity is not None and sparsity.at_decode else None

    def start(params, tokens, position):
        weights, parameters = params
        cache = empty_cache(arch, 1, len(tokens), dtype, sparsity)
        valid = (jnp.arange(len(tokens)) <= position)[None]
        states, cache = hidden(
            arch, weights, tokens[None], cache=cache, sparsity=at_prefill, parameters=parameters, valid=valid
        )
        last = jax.lax.dynamic_index_in_dim(states[0], position, keepdims=False)
        return logits(arch, weights, last[None])[0], cache

    def extend(params, cache, token, position):
        weights, parameters = params
        states, cache = hidden(
            arch, weights, token[None, None], cache=cache, position=position, sparsity=at_decode, parameters=parameters
        )
        return logits(arch, weights, states[0])[0], cache

    return LanguageModel(start, extend)


def generate(model: Model, prompt: Sequence[int], *, new_tokens: int, **options: Any) -> list[int]:
    """Tokens behind a prompt; options as in `train.evaluation.sampling.sample`."""
    subject = model.subject
    arch = subject.architecture
    room = -(-(len(prompt) + new_tokens) // _LENGTHS) * _LENGTHS
    return sample(
        language_model(arch, model.sparsity, subject.weights["embedding"].dtype),
        (subject.weights, model.parameters),
        prompt,
        seq_len=min(arch.context, room),
        new_tokens=new_tokens,
        vocab_size=min(subject.tokenizer.vocab_size, arch.vocab_size),
        stop_id=subject.tokenizer.eos_id,
        **options,
    )


def generate_text(model: Model, prompt: str, *, new_tokens: int, **options: Any) -> str:
    """`prompt` and its continuation; an empty one starts with the end-of-document token."""
    tokenizer = model.subject.tokenizer
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    return tokenizer.decode([*ids, *generate(model, ids, new_tokens=new_tokens, **options)])


def run_tasks(model: Model, tasks: Sequence[str], **options: Any) -> tuple[str, str]:
    """lm-eval's JSON and table, as `train.evaluation.harness.run_tasks`."""
    args = {"model": model.subject.name, "forward": model.forward}
    writer = partial(generate, model)
    return harness.run_tasks(scorer(model), model.subject.tokenizer, tasks, model_args=args, generate=writer, **options)


def report_text(model: Model, path: Path, *, text_field: str = "text") -> None:
    """Prints bits per byte of a file."""
    score = score_text(scorer(model), model.subject.tokenizer, path, text_field=text_field)
    print(
        f"{model.subject.name}, {model.forward}: {score.bits_per_byte:.4f} bits per byte (loss {score.loss:.4f}) of "
        f"{path}: {score.documents:,} documents, {score.tokens:,} tokens, {score.bytes:,} bytes"
    )
