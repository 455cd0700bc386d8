"""Text from a trained model.

A new token is computed from the cached keys and values of those before it. Once the text is as long as the model's
sequences, the oldest token falls out for each new one, and with it what it gave to the others: the last S tokens are
then computed again for each token, so that a text never depends on anything older.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from train.config.settings import RunConfig
from train.data.tokenizer import Tokenizer
from train.model import cache
from train.model.decoder import assemble

TEMPERATURE = 0.8
TOP_P = 0.95
REPORT_EVERY = 16  # tokens drawn in one call to the device


class LanguageModel(NamedTuple):
    """A causal model as sampling uses it: two functions, both giving float32 logits [V] of the next token and a cache.

    Attributes:
      start: (params, tokens int32 [S], position) -> (logits of the token after `position`, cache); what stands in
        `tokens` beyond `position` must not matter.
      extend: (params, cache, token, position) -> the same, for one more token, which stands at `position` < S.
    """

    start: Callable[[Any, Int[Array, " S"], Int[Array, ""]], tuple[Float[Array, " V"], Any]]
    extend: Callable[[Any, Any, Int[Array, ""], Int[Array, ""]], tuple[Float[Array, " V"], Any]]


def top_p_logits(logits: Float[Array, " V"], top_p: float) -> Float[Array, " V"]:
    """logits where the most probable tokens that together hold `top_p` of the probability keep theirs, else -inf.

    The most probable token always stays, and so does the one that takes the sum to `top_p` or beyond.
    """
    order = jnp.argsort(logits, descending=True)
    probability = jax.nn.softmax(logits[order])
    kept = jnp.cumsum(probability) - probability < top_p
    kept = jnp.zeros_like(kept).at[order].set(kept.at[0].set(True), unique_indices=True)
    return jnp.where(kept, logits, -jnp.inf)


def sample(
    language_model: LanguageModel,
    params: Any,
    prompt: Sequence[int],
    *,
    seq_len: int,
    new_tokens: int,
    vocab_size: int,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    seed: int = 0,
    stop_id: int | None = None,
    on_tokens: Callable[[int], object] = lambda count: None,
    ended: Callable[[list[int]], bool] = lambda drawn: False,
) -> list[int]:
    """Tokens that follow `prompt`, drawn one at a time from softmax(logits / temperature) cut at `top_p`.

    Args:
      language_model: the model.
      params: passed on to it.
      prompt: at least one token id; only the last `seq_len` count, as only the last `seq_len` tokens ever do.
      seq_len: S, the length the model is called with.
      new_tokens: how many to draw.
      vocab_size: ids from here on are never drawn (an embedding may be larger than the tokenizer).
      temperature: 0 takes the most probable token.
      top_p: in (0, 1]; 1 cuts nothing.
      seed: the same seed gives the same tokens.
      stop_id: ends the text early; it is not part of the result.
      on_tokens: called now and then with the number of tokens drawn since the last call.
      ended: asked now and then, with the tokens drawn so far, whether to stop.

    Raises:
      ValueError: an empty prompt or an option out of range.
    """
    if not prompt:
        raise ValueError("the prompt holds no token: give at least one")
    if new_tokens < 1:
        raise ValueError(f"{new_tokens=} must be at least 1")
    if temperature < 0:
        raise ValueError(f"{temperature=} must be 0 (most probable token) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} must lie in (0, 1]")
    kept = list(prompt)[-seq_len:]
    buffer = np.zeros(seq_len, np.int32)
    buffer[: len(kept)] = kept
    length = jnp.int32(len(kept))
    logits, cached = _start(params, jnp.asarray(buffer), length - 1, language_model=language_model)
    carry = _Text(jnp.asarray(buffer), length, logits, cached, jnp.zeros(new_tokens, jnp.int32), jnp.int32(0), False)
    count = 0
    while count < new_tokens and not carry.stopped:
        carry = _draw(
            params,
            carry,
            min(count + REPORT_EVERY, new_tokens),
            jax.random.key(seed),
            language_model=language_model,
            vocab_size=vocab_size,
            temperature=temperature,
            top_p=top_p,
            stop_id=-1 if stop_id is None else stop_id,
        )
        on_tokens(int(carry.count) - count)
        count = int(carry.count)
        if ended(np.asarray(carry.drawn)[:count].tolist()):
            break
    return np.asarray(carry.drawn)[:count].tolist()


class _Text(NamedTuple):
    """What sampling carries from token to token."""

    buffer: Int[Array, " S"]  # the last tokens of the text
    length: Int[Array, ""]  # how many of them there are
    logits: Float[Array, " V"]  # of the token that comes next
    cached: Any
    drawn: Int[Array, " new"]
    count: Int[Array, ""]  # how many of `drawn` count
    stopped: Any


@partial(jax.jit, static_argnames=("language_model",))
def _start(
    params: Any, buffer: Int[Array, " S"], position: Int[Array, ""], *, language_model: LanguageModel
) -> tuple[Float[Array, " V"], Any]:
    return language_model.start(params, buffer, position)


@partial(jax.jit, static_argnames=("language_model", "vocab_size", "temperature", "top_p", "stop_id"))
def _draw(
    params: Any,
    text: _Text,
    until: Int[Array, ""],
    key: PRNGKeyArray,
    *,
    language_model: LanguageModel,
    vocab_size: int,
    temperature: float,
    top_p: float,
    stop_id: int,
) -> _Text:
    """The text with tokens drawn until there are `until` of them, or the stop token came."""
    size = text.buffer.shape[0]

    def step(text: _Text) -> _Text:
        logits = jnp.where(jnp.arange(text.logits.shape[0]) < vocab_size, text.logits, -jnp.inf)
        if temperature == 0:
            token = jnp.argmax(logits)
        else:
            allowed = top_p_logits(logits / temperature, top_p)
            token = jax.random.categorical(jax.random.fold_in(key, text.count), allowed)
        token = token.astype(jnp.int32)
        stopped = token == stop_id
        full = text.length == size
        buffer = jnp.where(full, jnp.roll(text.buffer, -1), text.buffer)  # the oldest token falls out
        position = jnp.where(full, size - 1, text.length)
        buffer = buffer.at[position].set(token)
        logits, cached = jax.lax.cond(
            full,
            lambda: language_model.start(params, buffer, position),
            lambda: language_model.extend(params, text.cached, token, position),
        )
        drawn = text.drawn.at[text.count].set(token)
        return _Text(buffer, position + 1, logits, cached, drawn, text.count + ~stopped, stopped)

    return jax.lax.while_loop(lambda text: (text.count < until) & ~text.stopped, step, text)


@lru_cache(maxsize=1)
def cached_model(graphdef: nnx.GraphDef, dtype: Any) -> LanguageModel:
    """The dense model of this structure; its `params` are (parameters, method's state).

    The same object each time, so that a run's next sample compiles nothing anew.
    """

    def logits_at(decoder, hidden, position):
        return decoder.logits(jax.lax.dynamic_slice_in_dim(hidden, position, 1, axis=1))[0, 0]

    def start(arrays, tokens, position):
        decoder = assemble(graphdef, *arrays)
        hidden, cached = cache.extend(decoder, tokens[None], cache.empty(decoder, 1, len(tokens), dtype), 0)
        return logits_at(decoder, hidden, position), cached

    def extend(arrays, cached, token, position):
        decoder = assemble(graphdef, *arrays)
        hidden, cached = cache.extend(decoder, token[None, None], cached, position)
        return logits_at(decoder, hidden, 0), cached

    return LanguageModel(start, extend)


def sample_text(
    graphdef: nnx.GraphDef,
    config: RunConfig,
    params: dict,
    method: dict,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    new_tokens: int,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    seed: int = 0,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> str:
    """`prompt` and its continuation by the dense model with these parameters; options as in `sample`.

    An empty prompt starts a new document.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]

    drawn = sample(
        cached_model(graphdef, jnp.dtype(config.train.dtype)),
        (params, method),
        ids,
        seq_len=config.train.seq_len,
        new_tokens=new_tokens,
        vocab_size=tokenizer.vocab_size,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_id=tokenizer.eos_id,
        on_tokens=on_tokens,
    )
    return tokenizer.decode([*ids, *drawn])
