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
from pallas_kernels.sparse24.api import sparse24
from pallas_kernels.tiles import TileConfig
from tests import word_machine
from tests.kernels import normal
from tests.test_pack_kernels import ALONG, assert_same_bits, entries

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


def test_wrong_shapes_are_named():
    a, x = pack_features(normal(0, 64, 128)), normal(1, 64, 64)
    with pytest.raises(ValueError, match="nothing is to be packed"):
        pack_product(a, x, features=False, tokens=False, interleaved=True)
    with pytest.raises(ValueError, match="nothing is to be taken"):
        take_product(a, x, None, None, interleaved=True)
    with pytest.raises(ValueError, match="differ in k"):
        pack_product(a, x, features=True, tokens=False, interleaved=True, implementation="reference")
