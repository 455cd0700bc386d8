"""The packed layer's custom_vjp under scan, checkpoint and vmap over a leading axis, weights packed beforehand."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import assert_close
from tests.test_packed_ffn import BETA, RECIPES, inputs
from venom_jax import pack_weights, router
from venom_jax.ffn import _sparse

# One recipe for each way through the code: compiling takes seconds each.
CPU_RECIPES = ["features only", "weights only", "venom, two of four"]


def gradients(recipe, kernels, *, plain: bool):
    """(x, w1, w2) -> the loss and its gradients, of the layer plain or rematerialised inside a scan."""

    def loss(x, w1, w2):
        scoring = "reference" if kernels == "reference" else None
        packed = pack_weights(w1, w2, BETA, dtype=x.dtype, implementation=kernels) if recipe.weights else None

        def layer(x, _=None):
            route = router.route(x, w1, recipe, implementation=scoring) if recipe.routed else None
            return x + _sparse(recipe, kernels, x, w1, w2, BETA, packed, route)[0], None

        x, _ = layer(x) if plain else jax.lax.scan(jax.checkpoint(layer), x, length=1)
        return jnp.sum(jnp.sin(x.astype(jnp.float32)))

    return jax.value_and_grad(loss, (0, 1, 2))


def stacked(tokens, dtype=jnp.float32, **sizes):
    """Two layers' inputs: tokens, masters, of which the second layer's differ."""
    x, w1, w2, _ = inputs(tokens, dtype, **sizes)
    return jnp.stack([x, x[::-1]]), jnp.stack([w1, w1[:, ::-1]]), jnp.stack([w2, -w2[::-1]])


def compare(name, kernels, arrays, dtype):
    """Scan, checkpoint and vmap together against the plain layer, one element after the other."""
    mapped = jax.jit(jax.vmap(gradients(RECIPES[name], kernels, plain=False)))(*arrays)
    plain = jax.jit(gradients(RECIPES[name], kernels, plain=True))
    for i in range(2):
        expected = plain(*(array[i] for array in arrays))
        for out, ref in zip(jax.tree.leaves(mapped), jax.tree.leaves(expected), strict=True):
            assert_close(out[i], ref, dtype)


@pytest.mark.parametrize("name", CPU_RECIPES)
def test_transformations_change_nothing(name):
    with jax.default_matmul_precision("highest"):
        compare(name, "reference", stacked(130), "float32")


@pytest.mark.parametrize("name", ["tokens only", "venom, two of four"])
def test_kernels_lower_under_vmap(name, monkeypatch):
    """Products one launch after the other, everything else with one more grid axis."""
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    arrays = jax.eval_shape(functools.partial(stacked, 130, jnp.bfloat16, d_model=128))
    function = jax.jit(jax.vmap(gradients(RECIPES[name], "hopper", plain=False)))
    text = function.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") >= {"tokens only": 4, "venom, two of four": 20}[name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_hopper_under_transformations(name):
    compare(name, "hopper", stacked(512, jnp.bfloat16, d_model=256, d_ffn=1024), "bfloat16")
