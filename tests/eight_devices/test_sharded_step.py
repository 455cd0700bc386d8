"""The gradients over a mesh equal those of one device to rounding."""

import re
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
from train.step import make_gradients
from venom_jax import Recipe

BATCH = np.random.default_rng(5).integers(0, 300, (16, 17), np.int32)
RECIPE = Recipe.all24(token_blocks=8)


@pytest.mark.parametrize(
    "options", [{"accumulation": 2, "remat": "full"}, {"unroll": 2}], ids=["microbatches, recomputed", "unrolled"]
)
def test_gradients_equal_those_of_one_device(options):
    """In slices of the loss, with a tied head; test_sharded_ffn has all the recipes."""
    config = run_config(
        shape={"tied_head": True},
        phases=((0, RECIPE),),
        batch_size=16,
        loss_chunks=2,
        **options,
    )
    config = replace(config, mesh=Mesh(data=2, fsdp=4))
    graphdef, key, results = model.structure(config.model, config.max_experts), jax.random.key(1), []
    for layout in (layout_of(config), ONE_DEVICE):
        state = initial_state(config, layout)
        gradients = jax.jit(make_gradients(graphdef, config, layout), static_argnames="recipe")
        results.append(gradients(state.params, state.method, layout.rows(BATCH), key, recipe=RECIPE))
    leaves = [jax.tree_util.tree_leaves_with_path(result) for result in results]
    for (path, found), (_, expected) in zip(*leaves, strict=True):
        assert_close(found, expected), path


@pytest.mark.parametrize(("accumulation", "shape"), [(1, "32x16"), (2, "2x32x16")], ids=["by layer", "at the end"])
def test_copies_sum_a_layers_gradients_in_the_backward_unless_there_are_microbatches(accumulation, shape):
    """W1 is 32 x 64 in each of two layers, over four devices."""
    config = replace(run_config(batch_size=16, accumulation=accumulation), mesh=Mesh(data=2, fsdp=4))
    layout, graphdef = layout_of(config), model.structure(config.model, config.max_experts)
    state, gradients = initial_state(config, layout), make_gradients(graphdef, config, layout)
    arguments = (state.params, state.method, layout.rows(BATCH), jax.random.key(1))
    text = jax.jit(gradients, static_argnames="recipe").lower(*arguments, recipe=Recipe()).as_text()
    summed = re.findall(r"\}\) : \(tensor<((?:2x)?32x16)xf32>\) -> tensor<\1xf32>", text)
    assert set(summed) == {shape}
