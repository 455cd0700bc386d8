"""A product packed in its epilogue gives the bits of the product and the packing one after the other."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped24 import api as grouped
from pallas_kernels.pack import api, blocks, hopper
from pallas_kernels.pack.activations import pack_features, unpack
from pallas_kernels.pack.product import pack_product, take_product
from pallas_kernels.pack.reference import select24
from pallas_kernels.sparse24.api import sparse24
from pallas_kernels.tiles import TileConfig
from tests import word_machine
from tests.kernels import normal
from tests.test_pack_kernels import ALONG, assert_same_bits, check_scaled_activations, entries

TILES = [
    TileConfig(warpgroup_m=128, warpgroup_n=128, stages=4),
    TileConfig(warpgroup_m=128, warpgroup_n=128, warpgroups_m=1, warpgroups_n=2, stages=3),
    TileConfig(warpgroup_n=192, stages=5),
    TileConfig(warpgroup_n=64, warpgroups_m=1, stages=3),
]


def chunk_order(rows: int, interleaved: bool) -> np.ndarray:
    """[rows / 64, 64] the row of the matrix that lies in each row of a chunk, by the words of `ChunkThread`."""
    bits = np.arange(64)
    four, member = bits // 16 + 4 * (bits // 2 % 4), 2 * (bits // 8 % 2) + bits % 2
    first = np.arange(rows // 64)[:, None]
    return member * (rows // 4) + 16 * first + four if interleaved else 64 * first + 4 * four + member


class ChunkMachine(word_machine.NumpyMachine):
    """Begins with the chunk of each block in shared memory, as a product's epilogue leaves it."""

    matrix: blocks.Matrix

    def __init__(self, *arguments):
        super().__init__(*arguments)
        rows, columns = self.matrix.rows, self.matrix.columns
        y = self._memory["y"].view(np.uint16).reshape(rows, columns)[chunk_order(rows, self.matrix.interleaved)]
        chunks = y.reshape(rows // 64, 64, columns // 64, 64).swapaxes(1, 2).reshape(-1, 64, 8, 8)
        row = np.arange(64)[:, None]
        swizzled = np.empty_like(chunks)
        swizzled[:, row, np.arange(8) ^ row % 8] = chunks
        self._shared[:] = np.ascontiguousarray(swizzled).reshape(len(chunks), 512, 8).view(np.uint32)


@pytest.mark.parametrize("interleaved", [True, False])
def test_emulated_chunks(interleaved, monkeypatch):
    y, dy2 = entries(128, 64, "bfloat16"), entries(128, 64, "bfloat16", 1)

    def launch(body, matrix, dtype, arrays, out, *, shared):
        monkeypatch.setattr(ChunkMachine, "matrix", matrix, raising=False)
        monkeypatch.setattr(hopper, "Thread", blocks.ChunkThread)
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        run = functools.partial(word_machine.run_blocks, machine=ChunkMachine)
        found = run(body, matrix.blocks, jnp.dtype(dtype).name, arrays, out, shared=1)
        return {name: jnp.asarray(array) for name, array in found.items()}

    monkeypatch.setattr(hopper, "_launch", launch)
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    packed = api.pack_activations(y, features=True, tokens=True, interleaved=interleaved, implementation="hopper")
    expected = api.pack_activations(y, features=True, tokens=True, interleaved=interleaved, implementation="reference")
    assert_same_bits(packed, expected)
    given = (dy2, expected.features, expected.tokens)
    taken = api.take_activations(*given, interleaved=interleaved, implementation="hopper")
    assert_same_bits(taken, api.take_activations(*given, interleaved=interleaved, implementation="reference"))
    check_scaled_activations(256, 128, (True, True), interleaved)


def check(rows, features, k, along, group_sizes, dtype="bfloat16", config=None, implementation="hopper", form="sparse"):
    """In the epilogue against one after the other."""
    groups = 1 if group_sizes is None else len(group_sizes)
    sizes = None if group_sizes is None else jnp.asarray(group_sizes, jnp.int32)
    a = normal(0, features * groups, k, dtype=dtype)
    packed = pack_features(a)
    if form != "sparse":  # the same matrix, so that one oracle serves
        a = unpack(packed)
    weights = {"sparse": packed, "k_major": a, "m_major": a.T}[form]
    x, dy = normal(1, rows, k, dtype=dtype), normal(2, rows, k, dtype=dtype)
    options: dict[str, Any] = {"b_k_major": True, "transpose_out": True, "implementation": implementation}

    def product(tokens):
        if sizes is None:
            return sparse24(*packed, tokens, **options)
        return grouped.columns(*packed, tokens, sizes, **options)

    how: dict[str, Any] = {"interleaved": sizes is None, "implementation": implementation}
    expected = api.pack_activations(product(x), features=along[0], tokens=along[1], **how)
    how |= {"transposed": form == "m_major"}
    pack = functools.partial(pack_product, features=along[0], tokens=along[1], **how, config=config)
    agree = assert_same_bits if form == "sparse" else assert_nearly
    agree(jax.jit(pack)(weights, x, sizes), expected)
    given = (expected.features, expected.tokens)
    take = functools.partial(take_product, **how, config=config)
    how.pop("transposed")
    expected = api.take_activations(product(dy), *given, **how)
    agree(jax.jit(take)(weights, dy, *given, sizes), expected)


def integers(seed: int, *shape: int) -> jax.Array:
    """e4m3 whose sums of products are exact in the tensor core's 13 bits, in any order."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), "float8_e4m3fn")


def powers(seed: int, size: int, lowest: int, step: int = 1) -> jax.Array:
    return jnp.asarray(2.0 ** (lowest + step * np.random.default_rng(seed).integers(0, 4, size)), "float32")


def check8(rows, features, k, along, group_sizes, config=None, form="sparse", scaled=True):
    """In e4m3, against the reference, to the bit: sums of integers have no order."""
    sizes, neurons = None if group_sizes is None else jnp.asarray(group_sizes, jnp.int32), features
    if group_sizes is not None:
        neurons *= len(group_sizes)
    a = integers(0, neurons, k)
    weights = pack_features(a) if form == "sparse" else a
    x, dy = integers(1, rows, k), integers(2, rows, k)
    how: dict[str, Any] = {"interleaved": sizes is None}
    if scaled:
        how |= {"row_scale": powers(3, neurons, -5), "column_scale": powers(4, rows, -2)}
    scale, squared_scale = powers(5, neurons, -4), powers(6, neurons, -6, step=2)
    pack = functools.partial(pack_product, features=along[0], tokens=along[1], scale=squared_scale, **how)
    expected = jax.jit(functools.partial(pack, implementation="reference"))(weights, x, sizes)
    ways = [False] if config is not None or (form != "sparse" and sizes is not None) else [False, True]
    for apart in ways:
        run = functools.partial(pack, apart=apart, config=config, implementation="hopper")
        assert_same_bits(jax.jit(run)(weights, x, sizes), expected)
    given = (expected.squared, expected.tokens, sizes)
    take = functools.partial(take_product, squared_scale=squared_scale, scale=scale, **how)
    expected = jax.jit(functools.partial(take, implementation="reference"))(weights, dy, *given)
    for apart in ways:
        run = functools.partial(take, apart=apart, config=config, implementation="hopper")
        assert_same_bits(jax.jit(run)(weights, dy, *given), expected)


def assert_nearly(found, expected):
    """Sums in another order: a rounding here and there, and then another choice between near magnitudes."""
    for out, ref in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert out.shape == ref.shape
        if out.ndim:
            assert np.mean(np.asarray(out) != np.asarray(ref)) < 0.02
        else:
            np.testing.assert_allclose(out, ref, rtol=1e-3)


GROUPS = (64, 0, 40)


@pytest.mark.parametrize(("group_sizes", "form"), [(None, "m_major"), (GROUPS, "sparse"), (GROUPS, "m_major")])
def test_reference(group_sizes, form):
    check(192, 64, 64, (True, True), group_sizes, implementation="reference", form=form)


@pytest.mark.parametrize(
    ("group_sizes", "rows_of_groups", "form"),
    [(None, (384,), "sparse"), ((128, 0, 65), (128, 0, 128), "sparse"), ((130, 1), (256, 128), "k_major")],
)
def test_reference_in_eight_bits(group_sizes, rows_of_groups, form):
    """Against numpy, along features; rows of no group give zeros."""
    groups, own = len(rows_of_groups), sum(rows_of_groups)
    sizes = None if group_sizes is None else jnp.asarray(group_sizes, jnp.int32)
    weights, x, dy = integers(0, 128 * groups, 128), integers(1, 384, 128), integers(2, 384, 128)
    packed = pack_features(weights)
    dense = unpack(packed) if form == "sparse" else weights
    row_scale, column_scale = powers(3, 128 * groups, -5), powers(4, 384, -2)
    scale, squared_scale = powers(5, 128 * groups, -4), powers(6, 128 * groups, -6, step=2)
    how: dict[str, Any] = {"interleaved": sizes is None, "implementation": "reference"}
    how |= {"row_scale": row_scale, "column_scale": column_scale}

    def of_rows(neurons) -> np.ndarray:
        """[R, C, ..] what each row's group has, zeros where a row has none."""
        parts = np.asarray(neurons, np.float64).reshape(groups, 128, *neurons.shape[1:])
        return np.concatenate([np.repeat(parts, rows_of_groups, 0), np.zeros((384 - own, *parts.shape[1:]))])

    def product(x):
        y = np.einsum("rk,rck->rc", np.asarray(x, np.float64), of_rows(dense)) * of_rows(row_scale)
        return np.asarray(jnp.asarray(y * np.asarray(column_scale)[:, None], "bfloat16"), np.float64)

    y, dy2 = product(x), product(dy)
    a = np.maximum(y, 0)
    mask = np.asarray(select24(jnp.asarray(a, "float32")))
    with np.errstate(invalid="ignore"):
        squared = np.where(mask & (a > 0), np.minimum(a * a / of_rows(squared_scale), 448), 0)
    squared = squared.astype(jnp.float8_e4m3fn)
    weights = packed if form == "sparse" else weights
    found = pack_product(weights, x, sizes, features=True, tokens=True, scale=squared_scale, **how)
    assert found.squared is not None
    np.testing.assert_array_equal(unpack(found.squared), squared)
    assert float(found.positives) == (a > 0).sum()
    root = np.asarray(jnp.asarray(np.sqrt(squared.astype(np.float64)), "bfloat16"), np.float64)
    dy1 = 2 * dy2 * root * np.sqrt(of_rows(squared_scale))
    with np.errstate(invalid="ignore"):
        dy1 = np.where(root > 0, np.clip(dy1 / of_rows(scale), -448, 448), 0).astype(jnp.float8_e4m3fn)
    taken = take_product(
        weights, dy, found.squared, found.tokens, sizes, squared_scale=squared_scale, scale=scale, **how
    )
    assert taken.features is not None
    np.testing.assert_array_equal(np.asarray(unpack(taken.features), np.float32), dy1.astype(np.float32))
    assert taken.squared is found.tokens


GROUPS8 = (0, 1, 63, 64, 65, 127, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["sparse", "k_major"])
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("group_sizes", [None, GROUPS8])
@pytest.mark.parametrize(("rows", "features", "k"), [(1024, 128, 128), (1152, 384, 256), (2176, 1024, 512)])
def test_hopper_in_eight_bits(rows, features, k, group_sizes, along, form):
    check8(rows, features, k, along, group_sizes, form=form)


@pytest.mark.gpu
@pytest.mark.parametrize("group_sizes", [None, GROUPS8])
@pytest.mark.parametrize("config", TILES, ids=lambda c: f"{c.warpgroup_m}x{c.warpgroup_n}x{c.warpgroups_m}")
def test_every_tile_in_eight_bits(config, group_sizes):
    check8(1152, 384, 256, (True, True), group_sizes, config=config)


@pytest.mark.gpu
def test_eight_bits_without_scales_of_the_product_and_many_tiles():
    check8(1152, 384, 256, (True, True), None, scaled=False)
    check8(16384, 4096, 128, (True, True), None)
    check8(16384, 1024, 128, (True, True), (5000, 0, 128, 9000))


@pytest.mark.gpu
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("group_sizes", [None, (70, 0, 500, 64)])
@pytest.mark.parametrize(("rows", "features", "k"), [(64, 64, 64), (832, 320, 192), (2112, 1024, 512)])
def test_hopper(rows, features, k, group_sizes, along):
    check(rows, features, k, along, group_sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["k_major", "m_major"])
@pytest.mark.parametrize("group_sizes", [None, (70, 0, 500, 64)])
@pytest.mark.parametrize(("rows", "features", "k"), [(64, 64, 64), (832, 320, 192), (2112, 1024, 512)])
def test_dense_weights(rows, features, k, group_sizes, form):
    check(rows, features, k, (True, True), group_sizes, form=form)


@pytest.mark.gpu
@pytest.mark.parametrize("group_sizes", [None, (70, 0, 500, 64)])
@pytest.mark.parametrize("config", TILES, ids=lambda c: f"{c.warpgroup_m}x{c.warpgroup_n}x{c.warpgroups_m}")
def test_every_tile(config, group_sizes):
    check(1088, 448, 320, (True, True), group_sizes, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize("group_sizes", [None, (70, 0, 500, 64)])
def test_half_precision(group_sizes):
    check(832, 320, 192, (True, True), group_sizes, dtype="float16")


@pytest.mark.gpu
def test_many_more_tiles_than_multiprocessors():
    check(16384, 4096, 128, (True, True), None)


@pytest.mark.parametrize(
    ("along", "group_sizes", "form"),
    [
        ((True, True), None, "sparse"),
        ((False, True), (70, 0, 500, 64), "sparse"),
        ((True, True), (70, 0, 500, 64), "k_major"),
        ((True, False), None, "m_major"),
    ],
)
def test_lowers(along, group_sizes, form, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    sizes = None if group_sizes is None else jnp.asarray(group_sizes, jnp.int32)
    features = 128 if group_sizes is None else 128 * len(group_sizes)
    x = jax.ShapeDtypeStruct((1024, 192), jnp.bfloat16)
    shape = (features, 192) if form == "k_major" else (192, features)
    weights = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    if form == "sparse":
        weights = jax.eval_shape(lambda: pack_features(normal(0, features, 192)))
    options: dict[str, Any] = {"interleaved": sizes is None, "implementation": "hopper"}
    options["transposed"] = form == "m_major"

    def both(a, x):
        packed = pack_product(a, x, sizes, features=along[0], tokens=along[1], **options)
        return take_product(a, x, packed.features, packed.tokens, sizes, **options)

    assert jax.jit(both).trace(weights, x).lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 2


@pytest.mark.parametrize(
    ("along", "groups", "form", "apart"),
    [
        ((True, True), 1, "sparse", False),
        ((True, True), 3, "k_major", False),
        ((False, True), 3, "sparse", True),
        ((True, True), 1, "k_major", True),
    ],
)
def test_eight_bits_lower(along, groups, form, apart, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    monkeypatch.setattr("pallas_kernels.device.hopper_available", lambda: True)
    sizes = None if groups == 1 else jnp.full(groups, 256, jnp.int32)
    array, neurons = jax.ShapeDtypeStruct, 128 * groups
    weights = array((neurons, 256), "float8_e4m3fn")
    if form == "sparse":
        weights = jax.eval_shape(lambda: pack_features(integers(0, neurons, 256)))
    options: dict[str, Any] = {"interleaved": sizes is None, "implementation": "hopper", "apart": apart}

    def both(a, x, of_neurons, of_tokens):
        scales = {"row_scale": of_neurons, "column_scale": of_tokens, "scale": of_neurons}
        packed = pack_product(a, x, sizes, features=along[0], tokens=along[1], **options, **scales)
        scales["squared_scale"] = of_neurons
        return take_product(a, x, packed.squared, packed.tokens, sizes, **options, **scales)

    arguments = array((1024, 256), "float8_e4m3fn"), array((neurons,), "float32"), array((1024,), "float32")
    text = jax.jit(both).trace(weights, *arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == (4 if apart else 2)


def test_wrong_shapes_are_named():
    a, x = pack_features(normal(0, 64, 128)), normal(1, 64, 64)
    with pytest.raises(ValueError, match="nothing is to be packed"):
        pack_product(a, x, features=False, tokens=False, interleaved=True)
    with pytest.raises(ValueError, match="nothing is to be taken"):
        take_product(a, x, None, None, interleaved=True)
    with pytest.raises(ValueError, match="differ in k"):
        pack_product(a, x, features=True, tokens=False, interleaved=True, implementation="reference")
    a, x, one = integers(0, 128, 128), integers(1, 128, 128), jnp.ones(128)
    along: dict[str, Any] = {"features": True, "tokens": True, "interleaved": True, "implementation": "reference"}
    with pytest.raises(ValueError, match=r"scale is None; want float32\[128\]"):
        pack_product(a, x, **along)
    with pytest.raises(ValueError, match=r"row_scale is float32\[64\]"):
        pack_product(a, x, **along, scale=one, row_scale=jnp.ones(64))
    with pytest.raises(
        ValueError, match="apart=True is for operands of 8 bits, and of dense ones for those without gr"
    ):
        pack_product(a, x, jnp.array([128]), **along, scale=one, apart=True)
    with pytest.raises(ValueError, match="transposed=True"):
        pack_product(a, x, **along, scale=one, transposed=True)
    with pytest.raises(ValueError, match="rows=64 must be a positive multiple of 128"):
        pack_product(a, x[:64], **along, scale=one)
    with pytest.raises(ValueError, match="scale is given with operands in bfloat16"):
        pack_product(a.astype("bfloat16"), x.astype("bfloat16"), **along, scale=one)
