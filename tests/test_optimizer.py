"""Learning-rate schedules and AdamW, against their formulas."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config import LearningRate, Optimizer
from train.optimizer import learning_rate, optimizer

STEPS = 200


def test_cosine_follows_its_formula():
    schedule = learning_rate(LearningRate(peak=2e-3, warmup=20, final_fraction=0.1), STEPS)
    for step in (0, 1, 10, 20, 21, 77, 199, 200):
        t = (step - 20) / (STEPS - 20)
        cosine = 2e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2)
        expected = 2e-3 * step / 20 if step < 20 else cosine
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)


def test_cosine_is_optax_warmup_cosine_decay():
    ours = learning_rate(LearningRate(peak=1e-3, warmup=0.1), STEPS)
    theirs = optax.warmup_cosine_decay_schedule(0, 1e-3, 20, STEPS, 5e-5)
    steps = jnp.arange(STEPS)
    np.testing.assert_array_equal(ours(steps), theirs(steps))


def test_wsd_warms_up_holds_and_decays():
    schedule = learning_rate(LearningRate(peak=1.0, kind="wsd", warmup=20, decay=50, final_fraction=0.2), STEPS)
    found = schedule(jnp.asarray([0, 10, 20, 100, 150, 175, 200]))
    np.testing.assert_allclose(found, [0, 0.5, 1, 1, 1, 0.6, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LearningRate(peak=1.0, warmup=STEPS), "leaves no step"),
        (LearningRate(peak=1.0, kind="wsd", warmup=150, decay=100), "exceed Train.steps=200"),
        (LearningRate(peak=1.0, warmup=STEPS + 1), "LearningRate.warmup=201 must lie between"),
    ],
)
def test_schedules_that_do_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(config, STEPS)


def adamw_by_hand(params, gradients, config, rate):
    """Two moments per entry, bias-corrected, decoupled decay on everything but scales, after clipping."""
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for step, grads in enumerate(gradients, start=1):
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        for name, grad in grads.items():
            clipped = grad * min(1.0, config.clip / norm) if config.clip else grad
            first[name] = config.b1 * first[name] + (1 - config.b1) * clipped
            second[name] = config.b2 * second[name] + (1 - config.b2) * clipped**2
            m, v = first[name] / (1 - config.b1**step), second[name] / (1 - config.b2**step)
            decay = 0.0 if name.endswith("scale") else config.weight_decay
            params[name] = params[name] - rate * (m / (np.sqrt(v) + config.epsilon) + decay * params[name])
    return params


@pytest.mark.parametrize("clip", [0.5, None])
def test_adamw_by_hand(clip):
    rng = np.random.default_rng(0)
    shapes = {"w1": (3, 4), "ffn_scale": (3,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gradients = [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(3)]
    config = Optimizer(clip=clip)
    transform = optimizer(config, optax.constant_schedule(0.1))
    found: dict[str, Any] = {name: jnp.asarray(value) for name, value in params.items()}
    state = transform.init(found)
    for grads in gradients:
        updates, state = transform.update({name: jnp.asarray(g) for name, g in grads.items()}, state, found)
        found = dict(jax.tree.map(jnp.add, found, updates))
    expected = adamw_by_hand(dict(params), gradients, config, 0.1)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
