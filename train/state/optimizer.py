"""AdamW or Muon with clipping, the two schedules of the learning rate, and the moving average of the parameters."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from train.config.schedule import resolve_step
from train.config.settings import LearningRate, Optimizer, RunConfig
from train.model.mesh import ONE_DEVICE, Layout
from train.state.muon import scale_by_muon


def learning_rate(config: LearningRate, steps: int) -> optax.Schedule:
    """Learning rate of optimizer step i (from 0).

    Linear from 0 to ``peak`` over ``warmup`` steps, then
    cosine: peak * (f + (1 - f) (1 + cos(pi t)) / 2), t from 0 to 1 over the remaining steps, f = final_fraction;
    wsd (warm-up, stable, decay): ``peak``, and over the last ``decay`` steps linear to f * peak.
    """
    warmup = resolve_step(config.warmup, steps, "LearningRate.warmup")
    final = config.peak * config.final_fraction
    if config.kind == "cosine":
        if warmup >= steps:
            raise ValueError(f"LearningRate.warmup={warmup} leaves no step of Train.steps={steps} for the decay")
        return optax.warmup_cosine_decay_schedule(0.0, config.peak, warmup, steps, final)
    decay = resolve_step(config.decay, steps, "LearningRate.decay")
    if warmup + decay > steps:
        raise ValueError(
            f"LearningRate.warmup={warmup} and decay={decay} exceed Train.steps={steps}; shorten one of them"
        )
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.peak, warmup),
            optax.constant_schedule(config.peak),
            optax.linear_schedule(config.peak, final, decay),
        ],
        [warmup, steps - decay],
    )


def decay_mask(config: Optimizer, params: Any) -> Any:
    """True for each parameter that is decayed: its path, such as blocks/ffn/w1, matches no pattern of ``no_decay``.

    Raises:
      ValueError: a pattern that matches no parameter.
    """
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in config.no_decay:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"Optimizer.no_decay has {pattern!r}, which matches none of the parameters {', '.join(names)}"
            )
    return _decayed(config, params)


def _decayed(config: Optimizer, params: Any) -> Any:
    """`decay_mask` of some of the parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(fnmatchcase(_name(path), pattern) for pattern in config.no_decay), params
    )


def optimizer(
    config: Optimizer, schedule: optax.Schedule, dtype: Any = jnp.float32, layout: Layout = ONE_DEVICE
) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW, or Muon for the layers' matrices and AdamW for all else.

    dtype, layout: of Muon's products, and of the run, whose devices share the matrices among them.
    """
    mu_dtype = None if config.first_moment_dtype == "float32" else config.first_moment_dtype
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda params: _decayed(config, params),
        mu_dtype=mu_dtype,
    )
    chosen = adamw
    if config.kind == "muon":
        matrices = optax.chain(
            scale_by_muon(
                config.momentum, dtype, mu_dtype=mu_dtype, multiple=layout.devices, place=layout.over_devices
            ),
            optax.add_decayed_weights(config.weight_decay, lambda params: _decayed(config, params)),
            optax.scale_by_learning_rate(schedule),
        )
        chosen = optax.partition({"muon": matrices, "adamw": adamw}, kinds)
    return chosen if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), chosen)


def kinds(params: Any) -> Any:
    """'muon' for matrices of layers, each parameter of which has the layers' axis in front, 'adamw' for all else."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: "muon" if _name(path).startswith("blocks/") and leaf.ndim == 3 else "adamw", params
    )


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def rewarmed(schedule: optax.Schedule, starts: Sequence[int], steps: int) -> optax.Schedule:
    """The schedule with a linear rise from 0 to its own value over so many steps from each of the starts on."""
    if not steps or not starts:
        return schedule

    def rising(count):
        since = jnp.stack([jnp.where(count >= start, count - start, steps) for start in starts]).min(axis=0)
        return schedule(count) * jnp.minimum(1.0, (since + 1) / steps)

    return rising


def for_run(config: RunConfig, layout: Layout = ONE_DEVICE) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run, and its learning rate; the state does not depend on the layout."""
    schedule = learning_rate(config.learning_rate, config.train.steps)
    schedule = rewarmed(schedule, config.schedule.reroutings, config.learning_rate.rewarm)
    return optimizer(config.optimizer, schedule, jnp.dtype(config.train.dtype), layout), schedule


def updated_average(average: Any, params: Any, step: Int[Array, ""], decay: float | None) -> Any:
    """average + (1 - d) (params - average), with d = min(decay, (1 + step) / (10 + step)); None stays None.

    d begins small, so that the first weights are soon forgotten.
    """
    if decay is None:
        return average
    return optax.incremental_update(params, average, 1 - jnp.minimum(decay, (1 + step) / (10 + step)))
