"""Text from a trained model: `python -m train.generate --workdir=runs/a --prompt="The state of"`.

The whole sequence is computed again for each new token (there is no key-value cache): simple, of one fixed
shape, and fast enough to look at what a run has learned; not meant for serving.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from train import evaluate, model
from train.command import program
from train.config import RunConfig
from train.data import open_dataset
from train.tokenizer import Tokenizer
from venom_jax import Recipe

TEMPERATURE = 0.8
TOP_P = 0.95

# (params, tokens int32 [S], position) -> logits float32 [V] of the token after `position`; what stands in `tokens`
# beyond `position` must not matter, which holds for any causal model.
NextLogits = Callable[[Any, Int[Array, " S"], Int[Array, ""]], Float[Array, " V"]]


def top_p_logits(logits: Float[Array, " V"], top_p: float) -> Float[Array, " V"]:
    """logits where the most probable tokens that together hold `top_p` of the probability keep theirs, else -inf.

    The most probable token always stays, and so does the one that takes the sum to `top_p` or beyond.
    """
    order = jnp.argsort(logits, descending=True)
    probability = jax.nn.softmax(logits[order])
    kept = jnp.cumsum(probability) - probability < top_p
    return jnp.where(jnp.zeros_like(kept).at[order].set(kept.at[0].set(True)), logits, -jnp.inf)


def sample(
    next_logits: NextLogits,
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
) -> list[int]:
    """Tokens that follow `prompt`, drawn one at a time from softmax(logits / temperature) cut at `top_p`.

    Args:
      next_logits: the model; see `NextLogits`.
      params: passed on to it.
      prompt: at least one token id; only the last `seq_len` count, as only the last `seq_len` tokens ever do.
      seq_len: S, the length the model is called with.
      new_tokens: how many to draw.
      vocab_size: ids from here on are never drawn (an embedding may be larger than the tokenizer).
      temperature: 0 takes the most probable token.
      top_p: in (0, 1]; 1 cuts nothing.
      seed: the same seed gives the same tokens.
      stop_id: ends the text early; it is not part of the result.

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
    drawn, count = _draw(
        params,
        buffer,
        len(kept) - 1,
        jax.random.key(seed),
        next_logits=next_logits,
        new_tokens=new_tokens,
        vocab_size=vocab_size,
        temperature=temperature,
        top_p=top_p,
        stop_id=-1 if stop_id is None else stop_id,
    )
    return np.asarray(drawn)[: int(count)].tolist()


@partial(jax.jit, static_argnames=("next_logits", "new_tokens", "vocab_size", "temperature", "top_p", "stop_id"))
def _draw(
    params: Any,
    buffer: Int[Array, " S"],
    position: Int[Array, ""],
    key: PRNGKeyArray,
    *,
    next_logits: NextLogits,
    new_tokens: int,
    vocab_size: int,
    temperature: float,
    top_p: float,
    stop_id: int,
) -> tuple[Int[Array, " new"], Int[Array, ""]]:
    """(drawn tokens, how many of them count)."""

    def going_on(carry):
        _, _, _, count, stopped = carry
        return (count < new_tokens) & ~stopped

    def step(carry):
        buffer, position, drawn, count, _ = carry
        logits = next_logits(params, buffer, position)
        logits = jnp.where(jnp.arange(logits.shape[0]) < vocab_size, logits, -jnp.inf)
        if temperature == 0:
            token = jnp.argmax(logits)
        else:
            allowed = top_p_logits(logits / temperature, top_p)
            token = jax.random.categorical(jax.random.fold_in(key, count), allowed)
        token = token.astype(jnp.int32)
        stopped = token == stop_id
        full = position == buffer.shape[0] - 1
        buffer = jnp.where(full, jnp.roll(buffer, -1), buffer)  # the oldest token falls out
        position = jnp.where(full, position, position + 1)
        return (
            buffer.at[position].set(token),
            position,
            drawn.at[count].set(token),
            count + ~stopped,
            stopped,
        )

    carry = (buffer, jnp.asarray(position), jnp.zeros(new_tokens, jnp.int32), jnp.int32(0), jnp.bool_(False))
    _, _, drawn, count, _ = jax.lax.while_loop(going_on, step, carry)
    return drawn, count


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
) -> str:
    """`prompt` and its continuation by the dense model with these parameters; options as in `sample`.

    An empty prompt starts a new document.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]

    def next_logits(arrays, tokens, position):
        decoder = model.assemble(graphdef, *arrays)
        hidden, *_ = decoder.hidden(tokens[None], recipe=Recipe.dense(), dtype=jnp.dtype(config.train.dtype))
        return decoder.logits(jax.lax.dynamic_slice_in_dim(hidden, position, 1, axis=1))[0, 0]

    drawn = sample(
        next_logits,
        (params, method),
        ids,
        seq_len=config.train.seq_len,
        new_tokens=new_tokens,
        vocab_size=tokenizer.vocab_size,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_id=tokenizer.eos_id,
    )
    return tokenizer.decode([*ids, *drawn])


@program
def main(values: flags.FlagValues) -> None:
    """The command."""
    run = evaluate.restore(values.workdir)
    tokenizer = open_dataset(run.config.data.folder, "train").tokenizer
    text = sample_text(
        run.graphdef,
        run.config,
        run.dense_params(),
        run.state.method,
        tokenizer,
        values.prompt,
        new_tokens=values.new_tokens,
        temperature=values.temperature,
        top_p=values.top_p,
        seed=values.seed,
    )
    print(f"step {run.step}:\n{text}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of a run of train.main; FOLDER@STEP for an older step", required=True)
    flags.DEFINE_string("prompt", "The ", "the text to continue; empty starts a new document")
    flags.DEFINE_integer("new_tokens", 200, "how many tokens to draw at most")
    flags.DEFINE_float("temperature", TEMPERATURE, "0 takes the most probable token")
    flags.DEFINE_float("top_p", TOP_P, "share of the probability to draw from")
    flags.DEFINE_integer("seed", 0, "of the drawing")
    app.run(main)
