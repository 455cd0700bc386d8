"""The packing kernels give the reference's bits: emulated thread by thread here, on the tensor core's GPU there."""

import functools
from typing import Any

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
            bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[out.itemsize]
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


def neuron_scales(columns: int, groups: int = 1, power: int = 2) -> jax.Array:
    """Powers of two, or of four, of neurons of unlike size, among them the largest, the smallest, zero and NaN."""
    exponents = power * np.random.default_rng(columns).integers(-4, 2, columns * groups)
    scale = np.float32(2.0) ** exponents.astype(np.float32)
    scale[:4] = 2.0**60, 2.0**-60, 0, np.nan
    return jnp.asarray(scale)


def scaled_entries(rows: int, columns: int, seed: int = 0) -> jax.Array:
    """`entries` in bf16; a neuron that never fires, a token of zeros, a neuron and a token 1e4 times as large."""
    y = np.array(entries(rows, columns, "float32", seed))
    y[:, 9], y[11] = -np.abs(y[:, 9]), 0
    y[:, 17] *= 1e4
    y[19] *= 1e-4
    return jnp.asarray(y, "bfloat16")


def check_scaled_activations(rows, columns, along, interleaved, sizes=None):
    """In e4m3, to the bit."""
    features, tokens = along
    options = {"interleaved": interleaved, "group_sizes": None if sizes is None else jnp.asarray(sizes, jnp.int32)}
    groups = 1 if sizes is None else len(sizes)
    y, dy2 = (scaled_entries(rows, columns, seed) for seed in range(2))
    pack = functools.partial(
        api.pack_activations, scale=neuron_scales(columns, groups), features=features, tokens=tokens, **options
    )
    expected = jax.jit(functools.partial(pack, implementation="reference"))(y)
    assert_same_bits(pack(y, implementation="hopper"), expected)
    scales = {"squared_scale": neuron_scales(columns, groups), "scale": neuron_scales(columns, groups, power=1)}
    take = functools.partial(api.take_activations, **options, **scales)
    given = (dy2, expected.squared, expected.tokens)
    reference = jax.jit(functools.partial(take, implementation="reference"))
    assert_same_bits(take(*given, implementation="hopper"), reference(*given))


def check_scaled_weights(rows, columns, axis, masters):
    w, beta = entries(rows, columns, masters), jnp.float32(1.4)
    w = w.at[:, 5].set(0).at[7].set(0).at[9].mul(1e4).at[:, 11].mul(1e4)
    found = api.pack_thresholded8(w, beta, axis=axis, implementation="hopper")
    reference = functools.partial(api.pack_thresholded8, axis=axis, implementation="reference")
    assert_same_bits(found, jax.jit(reference)(w, beta))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("rows", "columns", "along", "interleaved", "sizes"),
    [
        (256, 128, (True, True), True, None),
        (192, 128, (True, False), True, None),
        (128, 192, (False, True), False, None),
        (768, 128, (True, True), False, (0, 1, 127, 0, 128, 65)),
    ],
)
def test_emulated_scaled_activations(rows, columns, along, interleaved, sizes):
    check_scaled_activations(rows, columns, along, interleaved, sizes)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("axis", "rows", "columns"), [(0, 128, 192), (1, 192, 128)])
def test_emulated_scaled_weights(axis, rows, columns):
    for masters in ("float32", "bfloat16"):
        check_scaled_weights(rows, columns, axis, masters)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (384, 640), (16512, 2048)])
def test_hopper_scaled_activations(rows, columns, along, interleaved):
    check_scaled_activations(rows, columns, along, interleaved)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(0, 1, 63, 64, 65, 127, 128), (2**31 - 1, 5), (-5, 130, 1 << 30)])
def test_hopper_scaled_activations_of_groups(sizes):
    check_scaled_activations(1024, 256, (True, True), False, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("masters", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (384, 640), (2048, 8192)])
def test_hopper_scaled_weights(rows, columns, axis, masters):
    check_scaled_weights(rows, columns, axis, masters)


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

    def both_scaled(y, dy2, scale):
        packed = api.pack_activations(y, features=features, tokens=tokens, interleaved=True, scale=scale)
        scales = {"squared_scale": scale, "scale": scale}
        return packed, api.take_activations(dy2, packed.squared, packed.tokens, interleaved=True, **scales)

    y, scale = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16), jax.ShapeDtypeStruct((128,), jnp.float32)
    for function, arguments in ((both, (y, y)), (both_scaled, (y, y, scale))):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize("masters", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_weight_kernels_lower(axis, masters, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    arguments = jax.ShapeDtypeStruct((256, 128), masters), jax.ShapeDtypeStruct((), jnp.float32)
    in_16_bits = functools.partial(api.pack_thresholded, dtype="bfloat16")
    for function in (in_16_bits, api.pack_thresholded8):
        packing = jax.jit(functools.partial(function, axis=axis, implementation="hopper"))
        assert "mosaic_gpu" in packing.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_sizes_and_types_that_the_kernels_do_not_take(monkeypatch):
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    options: dict[str, Any] = {"features": True, "tokens": True, "interleaved": True}
    with pytest.raises(ValueError, match="rows=96 must be a positive multiple of 64"):
        api.pack_activations(jnp.zeros((96, 64), jnp.bfloat16), **options)
    with pytest.raises(NotImplementedError, match="got float32"):
        api.pack_activations(jnp.zeros((64, 64), jnp.float32), **options)
    w = jnp.zeros((64, 96), jnp.float32)
    with pytest.raises(ValueError, match="columns=96"):
        api.pack_thresholded(w, jnp.float32(1), axis=0, dtype="bfloat16", implementation="hopper")
    assert api.pack_thresholded(w, jnp.float32(1), axis=0, dtype="bfloat16").values.shape == (2, 1, 8, 256)
    with pytest.raises(ValueError, match="columns=192 must be a positive multiple of 128"):
        api.pack_thresholded8(jnp.zeros((64, 192), jnp.float32), jnp.float32(1), axis=1, implementation="hopper")
    assert api.pack_thresholded8(w, jnp.float32(1), axis=1)[0].values.shape == (1, 1, 16, 256)
    y, scale = jnp.zeros((128, 192), jnp.bfloat16), jnp.ones(192)
    with pytest.raises(ValueError, match="columns=192 must be a positive multiple of 128"):
        api.pack_activations(y, **options, scale=scale)
    with pytest.raises(ValueError, match=r"scale is float32\[192\]; want float32\[384\]"):
        api.pack_activations(
            y, features=False, tokens=True, interleaved=True, scale=scale, group_sizes=jnp.array([1, 2])
        )
    with pytest.raises(NotImplementedError, match="got float16"):
        api.pack_activations(y[:, :128].astype(jnp.float16), **options, scale=scale[:128], implementation="hopper")
    with pytest.raises(NotImplementedError, match="packs float32 or bfloat16"):
        api.pack_thresholded(w, jnp.float32(1), axis=0, dtype="float32", implementation="hopper")
