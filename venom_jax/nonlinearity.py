"""The activations of a feed-forward layer: all are zero where the gate is closed, so all leave the same zeros.

    relu            a                       a = relu(y)
    relu2           a^2
    relu2_clamped   c^2, c = s tanh(a / s)

The clamp bounds what the next product reads by s^2 and is the square of relu for small a. Its derivative
2 c (1 - (c / s)^2) is that of the square times a factor, so all of them run on the kernels of the square.

Source of the clamp: Megatron-LM's `activation_func_tanh_clamp_scale`, (s tanh(relu(x) / s))^2, and the pull request
NVIDIA/Megatron-LM#7496, whose example has s = 16.
"""

from typing import Literal, get_args

import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float, accumulator

Activation = Literal["relu2", "relu", "relu2_clamped"]
CLAMP = 16.0
"""The scale s that a layer takes if none is given."""


def check(activation: str, clamp: float) -> None:
    """Raise ValueError for a name that is none, or a scale that clamps nothing."""
    if activation not in get_args(Activation):
        raise ValueError(f"activation = {activation!r}; use one of {', '.join(map(repr, get_args(Activation)))}.")
    if not 0 < clamp < float("inf"):
        raise ValueError(f"clamp = {clamp}: the scale of the tanh must be a finite number > 0.")


def squashed(a: Float[Array, "..."], activation: Activation, clamp: float) -> Float[Array, "..."]:
    """a, or c of the clamped activation, rounded to a's dtype."""
    if activation != "relu2_clamped":
        return a
    wide = a.astype(accumulator(a.dtype))
    return (clamp * jnp.tanh(wide / clamp)).astype(a.dtype)


def value(c: Float[Array, "..."], activation: Activation) -> Float[Array, "..."]:
    """The activation, of what `squashed` gives."""
    return c if activation == "relu" else c * c


def half_slope(c: Float[Array, "..."], activation: Activation) -> Float[Array, "..."]:
    """Half of the derivative by c: what the kernels, which compute 2 dh c, take in place of c."""
    return (c != 0).astype(c.dtype) * 0.5 if activation == "relu" else c


def clamp_factor(c: Float[Array, "..."], activation: Activation, clamp: float) -> Float[Array, "..."] | None:
    """The derivative of c by a, 1 - (c / s)^2, rounded to c's dtype; None is 1."""
    if activation != "relu2_clamped":
        return None
    ratio = c.astype(accumulator(c.dtype)) / clamp
    return (1 - ratio * ratio).astype(c.dtype)
