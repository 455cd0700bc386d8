"""Models in the manner of three codebases, cut over eight devices, learn as on one."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.lookalikes import MODELS
from venom_jax import Recipe

# Fours of tokens form in eight blocks of the batch, on one device too.
SCHEDULE = [Recipe.dense(), Recipe.act24(token_blocks=8), Recipe.venom(4, 1, token_blocks=8), Recipe.dense()]
STEPS = 3


def mesh_of(name):
    _, shape, axes = MODELS[name]
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))


@pytest.mark.parametrize("name", MODELS)
def test_eight_devices_learn_as_one(name):
    run = MODELS[name][0]
    with jax.default_matmul_precision("highest"):
        alone, together = run(None, SCHEDULE, STEPS), run(mesh_of(name), SCHEDULE, STEPS)
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-4)
    dense, last = np.mean(together.losses[:STEPS]), np.mean(together.losses[-STEPS:])
    assert last < dense
    for before, after in together.places:
        assert before == after, "a change of recipe moves no leaf"
    assert any(len(place.device_set) == 8 and not place.is_fully_replicated for place in together.places[0][0])
    assert all(together.donated)
