"""The pruned model against the dense one, token by token, and learning what makes them agree.

    nll[s] = -log p'(token s + 1),  kl[s] = sum_v p(v) (log p(v) - log p'(v)),  agree[s] = (argmax p' = argmax p)

p is the dense model's distribution of the next token, p' the pruned model's.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from venom_jax.activation.linear import Parameters
from venom_jax.activation.settings import Sparsity
from venom_jax.pretrained.architecture import Architecture
from venom_jax.pretrained.decoder import Weights, hidden, logits

AT_ONCE = 128  # positions whose logits exist together


class Compared(NamedTuple):
    """Of each predicted token: its loss, the divergence from the dense model, and whether both find the same likeliest
    one."""

    nll: Float[Array, " S-1"]
    kl: Float[Array, " S-1"]
    agree: Bool[Array, " S-1"]


@partial(jax.jit, static_argnames="arch")
def dense_states(arch: Architecture, weights: Weights, tokens: Int[Array, " S"]) -> Float[Array, "S D"]:
    """Last hidden states of the dense model."""
    return hidden(arch, weights, tokens[None])[0][0]


@partial(jax.jit, static_argnames=("arch", "sparsity"))
def compare(
    arch: Architecture,
    weights: Weights,
    tokens: Int[Array, " S"],
    dense: Float[Array, "S D"],
    sparsity: Sparsity | None,
    parameters: Mapping[str, Parameters],
) -> Compared:
    """The model with pruned inputs (None: with other weights alone) against the dense one's hidden states."""
    states = hidden(arch, weights, tokens[None], sparsity=sparsity, parameters=parameters)[0][0]
    return compare_states(arch, weights, tokens, states, dense)


@partial(jax.jit, static_argnames="arch")
def compare_states(
    arch: Architecture,
    weights: Weights,
    tokens: Int[Array, " S"],
    states: Float[Array, "S D"],
    dense: Float[Array, "S D"],
) -> Compared:
    """What `compare` gives, from hidden states of both models."""

    def position(pair):
        state, target, label = pair
        ours, theirs = (jax.nn.log_softmax(logits(arch, weights, one[None])[0]) for one in (state, target))
        kl = jnp.sum(jnp.exp(theirs) * (theirs - ours))
        return Compared(-ours[label], kl, ours.argmax() == theirs.argmax())

    return jax.lax.map(position, (states[:-1], dense[:-1], tokens[1:]), batch_size=AT_ONCE)


class Learning(NamedTuple):
    """Where learning stands: parameters by layer name, the optimizer's state, and the steps taken."""

    parameters: dict[str, Parameters]
    optimizer: Any
    step: int


def start_learning(sparsity: Sparsity, parameters: Mapping[str, Parameters]) -> Learning:
    """Before the first step.

    Raises:
      ValueError: the setting has nothing to learn.
    """
    if not sparsity.is_learned:
        raise ValueError("the setting has nothing to learn: add learned (a shift), bias or scale to its mitigations")
    return Learning(dict(parameters), _optimizer(1, 0.0).init(_learned(sparsity, parameters)), 0)


def learn(
    arch: Architecture,
    weights: Weights,
    sparsity: Sparsity,
    state: Learning,
    windows: Int[np.ndarray, "W S"],
    *,
    steps: int,
    rate: float,
    seed: int = 0,
    until: int | None = None,
    on_step: Callable[[int, float], object] = lambda step, loss: None,
) -> Learning:
    """All learned parameters at once, by AdamW on the mean divergence kl from the dense model; the weights stay.

    A step takes one window, in an order drawn from ``seed``; the rate rises over the first 3 % of the steps and falls
    to 0. Interrupted at ``until`` and continued, it gives the same bits.
    """
    order = np.random.default_rng(seed).permutation(np.arange(steps) % len(windows))
    parameters, optimizer, step = state
    values = _learned(sparsity, parameters)
    while step < min(steps, steps if until is None else until):
        tokens = jnp.asarray(windows[order[step]])
        values, optimizer, loss = _learning_step(
            arch, weights, sparsity, dict(parameters), values, optimizer, tokens, steps=steps, rate=rate
        )
        step += 1
        on_step(step, float(loss))
    return Learning(_with(parameters, values), optimizer, step)


def _optimizer(steps: int, rate: float) -> optax.GradientTransformation:
    schedule = optax.schedules.warmup_cosine_decay_schedule(0.0, rate, max(1, round(0.03 * steps)), max(2, steps))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.0))


def _learned(sparsity: Sparsity, parameters: Mapping[str, Parameters]) -> dict[str, dict[str, Array]]:
    flags = {"shift": sparsity.shift == "learned", "bias": sparsity.learn_bias, "scale": sparsity.learn_scale}
    names: Sequence[str] = [name for name, learned in flags.items() if learned]
    return {layer: {name: getattr(p, name) for name in names} for layer, p in parameters.items()}


def _with(parameters: Mapping[str, Parameters], values: Mapping[str, Mapping[str, Array]]) -> dict[str, Parameters]:
    return {layer: p._replace(**values[layer]) for layer, p in parameters.items()}


@partial(jax.jit, static_argnames=("arch", "sparsity", "steps", "rate"))
def _learning_step(
    arch: Architecture,
    weights: Weights,
    sparsity: Sparsity,
    parameters: dict[str, Parameters],
    values: dict[str, dict[str, Array]],
    optimizer: Any,
    tokens: Int[Array, " S"],
    *,
    steps: int,
    rate: float,
) -> tuple[Any, Any, Float[Array, ""]]:
    """What is learned and the optimizer's state after one window, and the divergence before it."""
    dense = hidden(arch, weights, tokens[None])[0][0]

    def divergence(values):
        found = _with(parameters, values)
        states = hidden(arch, weights, tokens[None], sparsity=sparsity, parameters=found, remat=True)[0][0]

        @jax.checkpoint
        def position(pair):
            ours, theirs = (jax.nn.log_softmax(logits(arch, weights, one[None])[0]) for one in pair)
            return jnp.sum(jnp.exp(theirs) * (theirs - ours))

        return jnp.mean(jax.lax.map(position, (states, dense), batch_size=AT_ONCE))

    loss, gradient = jax.value_and_grad(divergence)(values)
    update, optimizer = _optimizer(steps, rate).update(gradient, optimizer, values)
    return optax.apply_updates(values, update), optimizer, loss
