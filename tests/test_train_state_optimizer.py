"""Learning-rate schedules and AdamW, against their formulas."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config.settings import LearningRate, Optimizer
from train.state.optimizer import decay_mask, learning_rate, optimizer, rewarmed, updated_average

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


def test_rewarming_rises_anew_after_each_switch():
    base = learning_rate(LearningRate(peak=1e-3, warmup=10), STEPS)
    schedule = rewarmed(base, (50, 53, 120), 5)
    shares = {49: 1, 50: 0.2, 51: 0.4, 52: 0.6, 53: 0.2, 54: 0.4, 57: 1, 58: 1, 120: 0.2, 123: 0.8, 124: 1, 199: 1}
    for step, share in shares.items():
        np.testing.assert_allclose(schedule(step), share * base(step), rtol=1e-6)
    assert rewarmed(base, (50,), 0) is base
    assert rewarmed(base, (), 5) is base


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


def test_patterns_say_what_is_not_decayed():
    params = {"embedding": 0, "final_scale": 0, "blocks": {"ffn": {"w1": 0, "w2": 0}, "ffn_scale": 0}}
    assert decay_mask(Optimizer(), params) == {
        "embedding": True,
        "final_scale": False,
        "blocks": {"ffn": {"w1": True, "w2": True}, "ffn_scale": False},
    }
    found = decay_mask(Optimizer(no_decay=["embedding", "*/w1"]), params)
    assert [found["embedding"], found["blocks"]["ffn"]["w1"], found["final_scale"]] == [False, False, True]
    with pytest.raises(ValueError, match=r"no_decay has 'embeding', which matches none of the parameters .*embedding"):
        decay_mask(Optimizer(no_decay=["embeding"]), params)


def test_the_first_moment_may_be_bfloat16():
    params = {"w": jnp.ones(4)}
    state = optimizer(Optimizer(first_moment_dtype="bfloat16", no_decay=()), optax.constant_schedule(0.1)).init(params)
    (mu,), (nu,) = (
        [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if f".{name}" in jax.tree_util.keystr(path)]
        for name in ("mu", "nu")
    )
    assert (mu.dtype, nu.dtype) == (jnp.bfloat16, jnp.float32)


def test_the_average_follows_its_formula():
    rng = np.random.default_rng(0)
    average = expected = rng.normal(size=5)
    for step in range(60):
        params = rng.normal(size=5)
        average = updated_average(jnp.asarray(average, jnp.float32), params, jnp.int32(step), 0.8)
        keep = min(0.8, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * params
    np.testing.assert_allclose(average, expected, rtol=1e-5)
    assert updated_average(None, params, jnp.int32(0), None) is None
