"""AdamW with clipping, and the two schedules of the learning rate."""

import jax
import optax

from train.config import LearningRate, Optimizer, RunConfig
from train.schedule import resolve_step


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


def _is_decayed(path: tuple, _) -> bool:
    return not jax.tree_util.keystr(path[-1:], simple=True).endswith("scale")


def optimizer(config: Optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW; norms' scales are not decayed."""
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree_util.tree_map_with_path(_is_decayed, params),
    )
    return adamw if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def for_run(config: RunConfig) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run, and its learning rate."""
    schedule = learning_rate(config.learning_rate, config.train.steps)
    return optimizer(config.optimizer, schedule), schedule
