"""Packing of gated activations: the reference's numbers, and the kernels' bits thread by thread."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pack import activations, gated
from pallas_kernels.pack.reference import select24
from tests.test_pack_kernels import assert_same_bits, emulated, entries

__all__ = ["emulated"]  # a fixture

ALONG = [(True, True, True), (True, False, True), (False, True, False), (True, True, False)]


def both(rows, columns, dtype="bfloat16"):
    return jnp.concatenate([entries(rows, columns, dtype, seed) for seed in (0, 1)], axis=1)


def check(rows, columns, along, squared):
    features, tokens, interleaved = along
    y, dh = both(rows, columns), entries(rows, columns, "bfloat16", 2)
    options = {"squared": squared, "features": features, "tokens": tokens, "interleaved": interleaved}
    expected = jax.jit(functools.partial(gated.pack_gated, **options, implementation="reference"))(y)
    assert_same_bits(gated.pack_gated(y, **options, implementation="hopper"), expected)
    options = {"squared": squared, "interleaved": interleaved}
    taken = jax.jit(functools.partial(gated.take_gated, **options, implementation="reference"))(dh, expected)
    assert_same_bits(gated.take_gated(dh, expected, **options, implementation="hopper"), taken)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("along", ALONG)
def test_emulated(along, squared):
    check(192, 128, along, squared)


@pytest.mark.gpu
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("shape", [(64, 64), (192, 128), (4096, 1408)])
def test_hopper(shape, along, squared):
    rows, columns = shape
    check(rows, columns, along, squared)


@pytest.mark.parametrize("squared", [True, False])
def test_numbers(squared):
    y = jax.random.normal(jax.random.key(0), (128, 128))
    dh = jax.random.normal(jax.random.key(1), (128, 64))
    packed = gated.pack_gated(y, squared=squared, features=True, tokens=True, interleaved=False)
    taken = gated.take_gated(dh, packed, squared=squared, interleaved=False)
    gate, up, dh = (np.asarray(t, np.float64) for t in (jax.nn.relu(y[:, :64]), y[:, 64:], dh))
    h = (gate**2 if squared else gate) * up
    kept = np.asarray(select24(jnp.asarray(h, jnp.float32)))
    along = np.asarray(select24(jnp.asarray(np.where(kept, h, 0), jnp.float32), 0)) & kept
    dg = (2 * dh * gate if squared else dh * (gate > 0)) * up
    du = dh * (gate**2 if squared else gate)

    def dense(matrix):
        return np.asarray(activations.unpack(matrix), np.float64)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(dense(packed.features), np.where(kept, h, 0))
    close(dense(taken.features), np.concatenate([np.where(kept, dg, 0), np.where(kept, du, 0)], axis=1))
    for matrix, expected in ((taken.token_gate, dg), (taken.token_up, du), (taken.token_hidden, h)):
        close(dense(matrix), np.where(along, expected, 0).T)
    assert packed.positives == (gate > 0).sum()


def test_lowers_for_hopper(monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    options = {"squared": True, "interleaved": True}

    def both_ways(y, dh):
        return gated.take_gated(dh, gated.pack_gated(y, features=True, tokens=True, **options), **options)

    arrays = [jax.ShapeDtypeStruct((128, columns), jnp.bfloat16) for columns in (512, 256)]
    text = jax.jit(both_ways).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2


def test_sizes_and_types_that_the_kernel_does_not_take(monkeypatch):
    options = {"squared": True, "features": True, "tokens": True, "interleaved": True}
    with pytest.raises(ValueError, match="rows=100 must be a positive multiple of 64"):
        gated.pack_gated(jnp.zeros((100, 128)), **options)
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    with pytest.raises(NotImplementedError, match="packs gates in bfloat16; got float16"):
        gated.pack_gated(jnp.zeros((64, 128), jnp.float16), **options)
