"""Train.deterministic: the same gradients, summed in a fixed order; no kernel that adds as its threads come."""

import contextlib
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import determinism
from tests.helpers import assert_close
from tests.trainer import gin_bindings, run_config
from train import main
from train.command import DETERMINISTIC_FLAGS
from train.model import decoder
from train.model.embedding import look_up
from train.state.state import abstract_state, initial_state
from train.step.step import make_gradients, make_train_step

DENSE = ((0, "dense"),)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_embeddings_gradient_is_summed_in_float32(dtype, deterministic):
    """A token that comes 4,096 times has the sum of as many rows, which bfloat16 would leave at an eighth; one that
    does not occur has exactly 0."""
    table = jax.random.normal(jax.random.key(0), (12, 5))
    tokens = jnp.array([[3] * 4096, [3, 7, 7, 0] * 1024])
    weight = (1 + jax.random.uniform(jax.random.key(1), (*tokens.shape, 5))).astype(dtype)

    def rows(table):
        return look_up(table, tokens, dtype, deterministic)

    np.testing.assert_array_equal(rows(table), table[tokens].astype(dtype))
    found = jax.jit(lambda table: jax.vjp(rows, table)[1](weight)[0])(table)
    expected = np.zeros((12, 5))
    np.add.at(expected, np.asarray(tokens), np.asarray(weight, np.float64))
    assert found.dtype == table.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (np.asarray(found)[[1, 2, 4, 5, 6, 8, 9, 10, 11]] == 0).all()


def test_gradients_are_those_of_the_default():
    found = []
    for deterministic in (False, True):
        config = run_config(shape={"document_start": 5}, deterministic=deterministic)
        gradients = make_gradients(decoder.structure(config.model, config.max_experts), config)
        state = initial_state(config)
        recipe = config.schedule.recipes[0]
        tokens = jax.random.randint(jax.random.key(5), (4, 17), 0, 20)
        found.append(jax.jit(gradients, static_argnames="recipe")(
            state.params, state.method, tokens, jax.random.key(0), recipe=recipe
        )[0])  # fmt: skip
    jax.tree.map(assert_close, found[1], found[0])


SCATTER = re.compile(r'"stablehlo.(?:select_and_)?scatter"\(.*')


@pytest.mark.parametrize(
    ("how", "phases", "scatters", "cudnn"),
    [("default", DENSE, True, True), ("deterministic", (*DENSE, (2, "venom")), False, False),
     ("all but the attention", DENSE, False, True), ("all but the embedding", DENSE, True, False)],
)  # fmt: skip
def test_what_adds_in_any_order_is_not_in_a_step(monkeypatch, how, phases, scatters, cudnn):
    """Scatters to places that may be the same, and cuDNN's attention; those that tests/determinism.py leaves in are."""
    asked = []
    monkeypatch.setattr(decoder, "attention_implementation", lambda dtype: asked.append(dtype))
    config = run_config(phases=phases, deterministic=how != "default")
    step: Any = make_train_step(decoder.structure(config.model, config.max_experts), config)
    tokens = jax.ShapeDtypeStruct((8, 17), jnp.int32)
    with determinism.OTHERS.get(how, contextlib.nullcontext)():
        text = step.trace(abstract_state(config), tokens).lower(lowering_platforms=("cuda",)).as_text()
    colliding = [line for line in SCATTER.findall(text) if "unique_indices = true" not in line]
    assert (bool(colliding), bool(asked)) == (scatters, cudnn)


@pytest.mark.parametrize("how", ["option", "binding"])
def test_xla_is_told_before_it_computes(monkeypatch, tmp_path, how):
    """Both ways to ask for it reach XLA's flags and the configuration, before the run is prepared."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    seen = []

    def prepare(config, *_, **__):
        seen.append((config.train.deterministic, os.environ["XLA_FLAGS"]))
        raise ValueError("seen")

    monkeypatch.setattr(main.loop, "prepare", prepare)
    bindings = gin_bindings(Train_deterministic=True) if how == "binding" else gin_bindings()
    assert main.run([], bindings, tmp_path, deterministic=how == "option") == 2
    assert seen == [(True, f"--xla_dump_to=x {DETERMINISTIC_FLAGS}")]
