"""Everything a run carries from one optimizer step to the next, as one pytree."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, UInt32

from train.config.settings import RunConfig
from train.model import decoder
from train.model.mesh import ONE_DEVICE, Layout
from train.state.optimizer import for_run


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters, the method's state (beta, router bias), optimizer state, position and randomness.

    ema: moving average of the parameters, or None.
    step: optimizer steps completed.  phase: index into the schedule's phases.
    rng: data of the run's key; each step folds its number in, so that it never changes.
    """

    params: dict
    method: dict
    opt_state: Any
    step: Int[Array, ""]
    phase: Int[Array, ""]
    rng: UInt32[Array, "..."]
    ema: dict | None = None


def initial_state(config: RunConfig, layout: Layout = ONE_DEVICE) -> TrainState:
    """The state before the first step, a function of the configuration and its seed.

    Committed to its place, as one that was restored is: else each change would compile the step again.
    """
    if layout.mesh is None:
        return layout.place(jax.jit(_create, static_argnums=0)(config))
    # Made in parts: no device may have room for the whole.
    return jax.jit(lambda: _create(config), out_shardings=layout.shardings(abstract_state(config)))()


def abstract_state(config: RunConfig, layout: Layout | None = None) -> TrainState:
    """Its shapes and dtypes, without computing it; with ``layout`` also the places."""
    shapes = jax.eval_shape(lambda: _create(config))
    return shapes if layout is None else layout.abstract(shapes)


def _create(config: RunConfig) -> TrainState:
    seed = config.train.seed
    key, room = jax.random.key(seed), config.learned_router
    params, method = decoder.initial(config.model, config.max_experts, key, learned_router=room)
    return TrainState(
        params=params,
        method=method,
        opt_state=for_run(config)[0].init(params),
        step=jnp.zeros((), jnp.int32),
        phase=jnp.zeros((), jnp.int32),
        rng=jax.random.key_data(jax.random.key(seed)),
        ema=first_average(config, params),
    )


def run_structure(config: RunConfig) -> nnx.GraphDef:
    """The run's model without its arrays."""
    return decoder.structure(config.model, config.max_experts, learned_router=config.learned_router)


def first_average(config: RunConfig, params: dict) -> dict | None:
    """The moving average before the first step: the parameters, in buffers of its own; None without one."""
    return None if config.optimizer.ema is None else jax.tree.map(jnp.copy, params)
