"""The packing kernels give the reference's bits: emulated thread by thread here, on the tensor core's GPU there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pack import api, hopper
from tests import word_machine

# No subnormal number: XLA on the CPU takes them for zeros, the GPU does not.
CORNERS = np.array([0.0, -0.0, 1.0, -1.0, 1.0, 2.0, -3.5, 1e-30, np.inf, -np.inf, np.nan], np.float32)
ALONG = [(True, True), (True, False), (False, True)]


@pytest.fixture
def emulated(monkeypatch):
    """implementation="hopper" runs the kernels' threads in numpy."""

    def launch(body, matrix, dtype, arrays, out, *, shared):
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        found = word_machine.run(body, matrix, jnp.dtype(dtype).name, arrays, out, shared=shared)
        return {name: jnp.asarray(array) for name, array in found.items()}

    monkeypatch.setattr(hopper, "_launch", launch)
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)


def entries(rows: int, columns: int, dtype: str, seed: int = 0) -> jax.Array:
    """Normal entries; among them ties, zeros of both signs and non-finite ones in every combination."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((rows, columns)).astype(np.float32)
    corner = rng.choice(CORNERS, (rows, columns))
    return jnp.asarray(np.where(rng.random((rows, columns)) < 0.3, corner, normal)).astype(dtype)


def assert_same_bits(found, expected):
    """Equal to the bit, but for the payload and the sign of NaN, which no format defines."""
    for out, ref in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert out.dtype == ref.dtype
        assert out.shape == ref.shape
        out, ref = np.asarray(out), np.asarray(ref)
        if out.dtype.kind not in "iu":
            is_nan = np.isnan(ref.astype(np.float32))
            np.testing.assert_array_equal(np.isnan(out.astype(np.float32)), is_nan)
            bits = np.uint16 if out.itemsize == 2 else np.uint32
            out, ref = (np.where(is_nan, 0, x.view(bits)) for x in (out, ref))
        np.testing.assert_array_equal(out, ref)


def check_activations(rows, columns, along, interleaved, dtype):
    features, tokens = along
    options = {"features": features, "tokens": tokens, "interleaved": interleaved}
    y, dy2 = entries(rows, columns, dtype), entries(rows, columns, dtype, 1)
    found = api.pack_activations(y, **options, implementation="hopper")
    expected = jax.jit(functools.partial(api.pack_activations, **options, implementation="reference"))(y)
    assert_same_bits(found, expected)
    given = (dy2, expected.features, expected.tokens)
    taken = api.take_activations(*given, interleaved=interleaved, implementation="hopper")
    reference = functools.partial(api.take_activations, interleaved=interleaved, implementation="reference")
    assert_same_bits(taken, jax.jit(reference)(*given))


def check_weights(rows, columns, axis, masters, dtype):
    w, beta = entries(rows, columns, masters), jnp.float32(1.4)
    found = api.pack_thresholded(w, beta, axis=axis, dtype=dtype, implementation="hopper")
    reference = functools.partial(api.pack_thresholded, axis=axis, dtype=dtype, implementation="reference")
    assert_same_bits(found, jax.jit(reference)(w, beta))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("along", "interleaved"), [((True, True), True), ((True, False), True), ((False, True), False)]
)
def test_emulated_activations(along, interleaved):
    check_activations(192, 128, along, interleaved, "bfloat16")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("masters", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_emulated_weights(axis, masters):
    check_weights(128, 192, axis, masters, "bfloat16")


@pytest.mark.usefixtures("emulated")
def test_emulated_half_precision():
    check_activations(128, 64, (True, True), True, "float16")
    check_weights(64, 64, 0, "float32", "float16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (192, 320), (16448, 2048)])
def test_hopper_activations(rows, columns, along, interleaved, dtype):
    check_activations(rows, columns, along, interleaved, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("masters", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (320, 192), (2048, 8192)])
def test_hopper_weights(rows, columns, axis, masters):
    check_weights(rows, columns, axis, masters, "bfloat16")


@pytest.mark.parametrize("along", ALONG)
def test_activation_kernels_lower(along, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    features, tokens = along

    def both(y, dy2):
        packed = api.pack_activations(y, features=features, tokens=tokens, interleaved=True)
        return packed, api.take_activations(dy2, packed.features, packed.tokens, interleaved=True)

    y = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16)
    text = jax.jit(both).trace(y, y).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize("masters", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_weight_kernels_lower(axis, masters, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    packing = jax.jit(
        lambda w, beta: api.pack_thresholded(w, beta, axis=axis, dtype="bfloat16", implementation="hopper")
    )
    arguments = jax.ShapeDtypeStruct((256, 128), masters), jax.ShapeDtypeStruct((), jnp.float32)
    assert "mosaic_gpu" in packing.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_sizes_and_types_that_the_kernels_do_not_take(monkeypatch):
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    options = {"features": True, "tokens": True, "interleaved": True}
    with pytest.raises(ValueError, match="rows=96 must be a positive multiple of 64"):
        api.pack_activations(jnp.zeros((96, 64), jnp.bfloat16), **options)
    with pytest.raises(NotImplementedError, match="got float32"):
        api.pack_activations(jnp.zeros((64, 64), jnp.float32), **options)
    w = jnp.zeros((64, 96), jnp.float32)
    with pytest.raises(ValueError, match="columns=96"):
        api.pack_thresholded(w, jnp.float32(1), axis=0, dtype="bfloat16", implementation="hopper")
    assert api.pack_thresholded(w, jnp.float32(1), axis=0, dtype="bfloat16").values.shape == (2, 1, 8, 256)
    with pytest.raises(NotImplementedError, match="packs float32 or bfloat16"):
        api.pack_thresholded(w, jnp.float32(1), axis=0, dtype="float32", implementation="hopper")
