"""Everything a run carries from one optimizer step to the next, as one pytree."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, UInt32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters, the method's state (beta, router bias), optimizer state, position and randomness.

    step: optimizer steps completed.  phase: index into the schedule's phases.
    rng: data of the run's key; each step folds its number in, so that it never changes.
    """

    params: dict
    method: dict
    opt_state: Any
    step: Int[Array, ""]
    phase: Int[Array, ""]
    rng: UInt32[Array, "..."]

    @classmethod
    def create(cls, params: dict, method: dict, optimizer: optax.GradientTransformation, seed: int) -> "TrainState":
        return cls(
            params=params,
            method=method,
            opt_state=optimizer.init(params),
            step=jnp.zeros((), jnp.int32),
            phase=jnp.zeros((), jnp.int32),
            rng=jax.random.key_data(jax.random.key(seed)),
        )
