"""Gradients, losses and whole runs over a mesh equal those of one device to rounding."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.helpers import assert_close
from tests.trainer import run_config
from train import model
from train.config import Mesh
from train.mesh import ONE_DEVICE, layout_of
from train.state import initial_state
from train.step import make_eval_step, make_gradients
from venom_jax import Recipe

BATCH = np.random.default_rng(5).integers(0, 300, (16, 17), np.int32)
RECIPES = {
    "all24, recomputed": (Recipe.all24(token_blocks=8), "full", False),
    "venom k=2, tied head": (Recipe.venom(4, 2, wgrad="dense"), "none", True),
}


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_equal_those_of_one_device(name):
    """In microbatches and slices of the loss; tests of the FFN alone cover the other recipes."""
    recipe, remat, tied_head = RECIPES[name]
    config = run_config(
        shape={"tied_head": tied_head},
        phases=((0, recipe),),
        batch_size=16,
        accumulation=2,
        loss_chunks=2,
        remat=remat,
    )
    config = replace(config, mesh=Mesh(data=2, fsdp=4))
    graphdef, key, results = model.structure(config.model, config.max_experts), jax.random.key(1), []
    for layout in (layout_of(config), ONE_DEVICE):
        state = initial_state(config, layout)
        gradients = jax.jit(make_gradients(graphdef, config, layout), static_argnames="recipe")
        evaluate = make_eval_step(graphdef, config, layout)
        grads, load, metrics = gradients(state.params, state.method, layout.rows(BATCH), key, recipe=recipe)
        weight = layout.rows(np.ones(16, np.float32))
        results.append(
            (grads, load, metrics, evaluate(state.params, state.method, layout.rows(BATCH), weight, recipe=recipe))
        )
    leaves = [jax.tree_util.tree_leaves_with_path(result) for result in results]
    for (path, found), (_, expected) in zip(*leaves, strict=True):
        assert_close(found, expected), path
