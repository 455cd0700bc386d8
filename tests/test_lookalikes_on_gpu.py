"""Models in the manner of three codebases on a Hopper GPU: their compiled steps hold our kernels, and they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.lookalikes import MODELS, Sizes
from venom_jax import Recipe

SIZES = Sizes(d_model=256, d_ffn=1024, rows=16, length=128, dtype=jnp.bfloat16)
SCHEDULE = [Recipe.dense(), Recipe.act24(), Recipe.venom(4, 1), Recipe.dense()]


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.skipif(
    jax.device_count() < 2, reason="needs two GPUs"))])  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_compiled_steps_hold_the_kernels(name, devices):
    run, _, axes = MODELS[name]
    mesh = jax.make_mesh(
        (devices,) + (1,) * (len(axes) - 1), axes, axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[:devices],
    )  # fmt: skip
    out = run(mesh, SCHEDULE, 5, SIZES, keep_text=True)
    # One product with its packing at least for each pass of a layer; the dense phases have none.
    kernels = [text.count("mosaic_gpu") for text in out.texts]
    assert kernels[0] == kernels[3] == 0
    assert min(kernels[1:3]) >= 4, kernels
    assert np.isfinite(out.losses).all()
    assert np.mean(out.losses[-5:]) < np.mean(out.losses[:5])
    assert all(before == after for before, after in out.places)


@pytest.mark.gpu
@pytest.mark.skipif(jax.device_count() > 1, reason="one GPU alone needs no mesh")
@pytest.mark.parametrize("name", MODELS)
def test_one_gpu_needs_no_mesh(name):
    out = MODELS[name][0](None, SCHEDULE[:2], 2, SIZES, keep_text=True)
    assert out.texts[1].count("mosaic_gpu") >= 4
