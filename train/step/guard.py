"""Steps that must not count: a loss or a gradient that is not finite, a loss that jumps.

The device decides by itself whether a step counts, so that it never waits for the host; the host learns of it with the
step's metrics, one step late, says which tensor went bad first, and stops the run or goes on.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from train.config.settings import RunConfig
from train.state.state import TrainState
from train.step.explain import first_bad


class BadStepError(Exception):
    """A step did not count and the run may not go on without it; the newest checkpoint is from before."""


@dataclass(frozen=True)
class BadStep:
    """What is known of a step that did not count; ``step`` is the number of steps complete after it."""

    step: int
    loss: float
    grad_norm: float
    limit: float
    tokens: Any


def counts(loss: Float[Array, ""], grad_norm: Float[Array, ""], limit: Any) -> Bool[Array, ""]:
    """Whether loss and gradient are finite and the loss is at most ``limit``."""
    return jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (loss <= limit)


def keep_if(good: Bool[Array, ""], new: TrainState, old: TrainState, *, skip: bool) -> TrainState:
    """``new`` where the step counts, else ``old``.

    skip: the step's number moves on all the same, and with it the learning rate and the order of the data; Adam's
    moments and their count do not. Otherwise the number stays, and no later step counts either.
    """

    def choose(new: Any, old: Any) -> Any:
        if skip and isinstance(new, optax.ScaleByScheduleState):
            return new
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    kept = jax.tree.map(choose, new, old, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
    return replace(kept, step=new.step if skip else jnp.where(good, new.step, old.step))


class Watch:
    """The host's half: limits for the losses to come, and what became of the steps that did not count."""

    def __init__(self, config: RunConfig, graphdef: nnx.GraphDef, logged: Iterable[tuple[int, float]] = ()):
        """logged: (step, loss) of the steps in metrics.jsonl, so that a run that continues has the same limits."""
        self._config, self._guard, self._graphdef = config, config.guard, graphdef
        # A step's loss is known when the next but one is sent off: two more than the window is all that is needed.
        self._losses = deque(logged, maxlen=self._guard.window + 2)
        self._pending: dict[int, tuple[Any, float]] = {}
        self._bad: list[BadStep] = []
        self._row = 0

    def begin(self, number: int, tokens: Any) -> tuple[np.float32, np.int32]:
        """What the step number ``number`` (from 0) takes besides tokens: its loss's limit, and its number."""
        limit = self._limit(number)
        self._pending[number + 1] = tokens, float(limit)
        return limit, np.int32(number)

    def _limit(self, number: int) -> np.float32:
        known = [loss for step, loss in self._losses if step < number][-self._guard.window :]
        if self._guard.spike is None or len(known) < self._guard.window:
            return np.float32(np.inf)
        return np.float32(median(known) + self._guard.spike)

    def accepts(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether the step that made ``step`` steps complete counted; one that did not awaits ``settle``."""
        tokens, limit = self._pending.pop(step)
        if self._bad and self._guard.action == "stop":
            return False  # nothing counts after it
        if np.isfinite(loss) and np.isfinite(grad_norm) and loss <= limit:
            self._row = 0
            return True
        self._row += 1
        self._bad.append(BadStep(step, loss, grad_norm, limit, tokens))
        return False

    def learn(self, step: int, loss: float) -> None:
        """Takes the loss of a step that is logged; the limits are made of these alone."""
        self._losses.append((step, loss))

    def settle(self, state: TrainState, logger: Any) -> None:
        """Reports the steps that did not count.

        Raises:
          BadStepError: the run must stop.
        """
        bad, self._bad = self._bad, []
        for step in bad:
            first = first_bad(self._graphdef, self._config, state, step.tokens, step.step - 1)
            stops = self._guard.action == "stop" or self._row > self._guard.max_skips
            logger.bad_step(
                step.step, loss=str(step.loss), grad_norm=str(step.grad_norm), first=first, skipped=not stops
            )
            if stops:
                raise BadStepError(self._message(step, first))

    def _message(self, bad: BadStep, first: str) -> str:
        what = f"step {bad.step}: loss {bad.loss:.6g}, gradient norm {bad.grad_norm:.6g}"
        if bad.limit < bad.loss < np.inf:
            usual = bad.limit - (self._guard.spike or 0.0)
            what += f", Guard.spike={self._guard.spike} above the usual {usual:.6g} is exceeded"
        row = f" after {self._guard.max_skips} skipped ones (Guard.max_skips)" if self._guard.action == "skip" else ""
        if self._guard.action == "skip":
            remedy = "To leave out more, raise Guard.max_skips; or lower "
        else:
            remedy = "Run again with --gin_bindings=\"Guard.action = 'skip'\" to leave such steps out, or lower "
        rate = self._config.learning_rate
        remedy += f"LearningRate.peak={rate.peak} or raise LearningRate.warmup={rate.warmup}, in a new workdir"
        return f"{what}{row}; {first}. Nothing was saved after the last checkpoint. {remedy}"
