"""The warp kernels: limits and choices everywhere; on a GPU every product of small integers to the bit."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device, dispatch
from pallas_kernels.blackwell import kernel as blackwell
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.grouped24 import api as grouped
from pallas_kernels.metadata import pack_positions
from pallas_kernels.pack import api, product
from pallas_kernels.sparse24 import sparse24
from pallas_kernels.tile_order import to_tiles
from pallas_kernels.tiles import Problem, TileConfig
from pallas_kernels.vnm import vnm
from pallas_kernels.warp import tiles
from pallas_kernels.warp.tiles import WarpTile
from tests.helpers import assert_close
from tests.kernels import normal
from tests.test_packed_ffn import GPU_RECIPES, RECIPES, inputs, run

GPUS = {
    "8.0": device.Gpu("A100", "8.0", 108, 166912),
    "8.6": device.Gpu("RTX 3090", "8.6", 82, 101376),
    "8.9": device.Gpu("L40S", "8.9", 142, 101376),
    "9.0": device.Gpu("H200", "9.0", 132, 232448),
    "10.0": device.Gpu("B200", "10.0", 148, 232448),
    "12.0": device.Gpu("RTX 5090", "12.0", 170, 101376),
}


@pytest.mark.parametrize(
    ("capability", "family"),
    [
        ("7.5", None), ("8.0", "warp"), ("8.6", "warp"), ("8.9", "warp"), ("9.0", "hopper"), ("10.0", "blackwell"),
        ("10.3", "blackwell"), ("12.0", "warp"), ("gfx942", None),
    ],
)  # fmt: skip
def test_families(capability, family):
    assert device.family_of(capability) == family


@pytest.mark.parametrize("capability", GPUS)
def test_the_family_chooses_the_implementation(capability, monkeypatch):
    monkeypatch.setattr(device, "current", lambda: GPUS[capability])
    chosen = {"9.0": "hopper", "10.0": "reference"}.get(capability, "warp")
    assert dispatch.resolve(None) == chosen
    assert dispatch.resolve("warp") == "warp"
    if capability != "9.0":
        with pytest.raises(NotImplementedError, match=r"needs a GPU of compute capability 9\.0"):
            dispatch.resolve("hopper")


def test_a_gpu_without_sparse_tensor_cores_is_named(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.Gpu("Tesla T4", "7.5", 40, 65536))
    assert dispatch.resolve(None) == "reference"
    with pytest.raises(NotImplementedError, match=r"8\.0 or later.*has Tesla T4 of compute capability 7\.5"):
        dispatch.resolve("warp")


PROBLEMS = {
    "whole": Problem(4096, 4096, 4096),
    "rows": Problem(4096, 4096, 1024, mode="rows", groups=4, b_k_major=True),
    "columns": Problem(4096, 4096, 1024, mode="columns", groups=4, b_k_major=True, transpose_out=True),
    "contraction": Problem(1024, 1024, 4096, mode="contraction", groups=4, out_dtype="float32"),
    "gathered, v = 64": Problem(4096, 4096, 1024, v=64),
    "gathered, v = 128": Problem(4096, 4096, 1024, v=128),
}


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_tile_fits_every_gpu(name, capability):
    gpu = GPUS[capability]
    tile = tiles.choose(PROBLEMS[name], gpu)
    assert tile.smem_bytes * tile.blocks_per_sm <= gpu.smem_bytes
    assert tile.threads * 255 <= 65536


@pytest.mark.parametrize(
    ("tile", "problem", "message"),
    [
        (WarpTile(3, 2), {}, "four or eight warps"),
        (WarpTile(stages=1), {}, "at least two stages"),
        (WarpTile(ahead=9), {}, "8 blocks of a step"),
        (WarpTile(raster_m=0), {}, "at least one"),
        (WarpTile(4, 2, stages=4), {}, "155648 bytes of shared memory exceed 101376"),
        (WarpTile(2, 2, stages=2), {"dtype": "float32"}, "operands are bfloat16 or float16"),
        (WarpTile(2, 2, stages=2), {"dtype": "float8_e4m3fn"}, "operands are bfloat16 or float16"),
        (WarpTile(2, 2, stages=2), {"k": 96}, "no multiple of 64"),
        (WarpTile(2, 2, stages=2), {"v": 64}, "one block of v rows"),
        (WarpTile(2, 2, stages=2), {"mode": "rows", "groups": 129}, "at most 128 groups"),
        (WarpTile(2, 2, stages=2), {"b_interleaved": True, "b_k_major": True}, "interleaved for a whole product"),
        (WarpTile(2, 2, stages=2), {"n": 68}, "multiples of 16 bytes"),
    ],
)
def test_limits_are_told(tile, problem, message):
    assert message in str(tile.violation(Problem(**{"m": 256, "n": 256, "k": 256} | problem), GPUS["8.6"]))


def test_fp8_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(device, "current", lambda: GPUS["8.0"])
    values, metadata = packed(64, 128)
    eight = "float8_e4m3fn"
    with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
        sparse24(values.astype(eight), metadata, integers(128, 64).astype(eight), implementation="warp")
    with pytest.raises(NotImplementedError, match=r"multiply bfloat16 or float16.*got float8_e4m3fn and bfloat16"):
        tiles.check_types(eight, "bfloat16")


def test_a_tile_of_the_other_kernels_is_refused():
    with pytest.raises(ValueError, match="no tile of the warp kernels, which take a WarpTile"):
        dispatch.check_tile("warp", TileConfig())
    with pytest.raises(ValueError, match="no tile of the hopper kernels, which take a TileConfig"):
        dispatch.check_tile("hopper", WarpTile())
    dispatch.check_tile("warp", WarpTile())
    dispatch.check_tile("hopper", None)


def test_positions_for_blackwell_are_the_same_words_in_another_order():
    positions = jnp.asarray(PAIRS[np.random.default_rng(0).integers(0, 6, (256, 96))])
    wanted = plgpu.format_tcgen05_sparse_metadata(positions.astype(jnp.uint2), jnp.bfloat16)
    np.testing.assert_array_equal(
        blackwell.to_tcgen05(pack_positions(positions)).astype(jnp.int32), wanted.astype(jnp.int32)
    )
    with pytest.raises(ValueError, match="multiples of 128 rows and 128 columns"):
        blackwell.to_tcgen05(pack_positions(positions[:64]))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((128, 256, 192), {}, r"multiples of 128, 256 and 128"),
        ((128, 256, 256), {"two_ctas": True}, r"multiples of 256, 256 and 128"),
        ((128, 256, 256), {"b_k_major": False, "dtype": "float8_e4m3fn"}, r"of 8 bits .* \[n, k\] only"),
    ],
)
def test_what_blackwell_does_not_take(sizes, options, message):
    (m, n, k), dtype = sizes, options.pop("dtype", "bfloat16")
    b = jnp.zeros((n, k) if options.get("b_k_major", True) else (k, n), dtype)
    positions = jnp.zeros((m // 128, -(-k // 128), 128, 64), jnp.uint2)
    with pytest.raises(ValueError, match=message):
        blackwell.matmul(jnp.zeros((m, k // 2), dtype), positions, b, **options)


# ------------------------------------------------------------------------------------------------------- on a GPU

PAIRS = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])


def integers(*shape, dtype="bfloat16", seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 4, shape), dtype)


def packed(m, k, dtype="bfloat16", *, in_rows=False):
    """values and metadata of a matrix of small integers: sums are exact in any order."""
    positions = PAIRS[np.random.default_rng(1).integers(0, 6, (m, k // 4))]
    positions = np.pad(positions, ((0, -m % 64), (0, -k % 64 // 4), (0, 0)))
    positions[m:, :, 1] = positions[:, k // 4 :, 1] = 1
    values = integers(m, k // 2, dtype=dtype, seed=2)
    return (values if in_rows else to_tiles(values)), pack_positions(jnp.asarray(positions))


def check(function, *arrays, **options):
    """A kernel's result and the reference's, to the bit."""
    found, wanted = (
        jax.jit(functools.partial(function, implementation=name, **options))(*arrays) for name in ("warp", "reference")
    )
    for out, ref in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert out.dtype == ref.dtype
        np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(ref, np.float32))


TILES = [
    WarpTile(4, 2, stages=4),
    WarpTile(4, 2, stages=6, raster_m=8),
    WarpTile(2, 4, stages=3, raster_m=2),
    WarpTile(2, 2, stages=3, blocks_per_sm=2),
    WarpTile(2, 2, stages=2, ahead=2),
    WarpTile(4, 1, stages=3, ahead=8),
    WarpTile(1, 4, stages=2, ahead=1),
]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("k_major", [False, True])
def test_every_tile(tile, k_major):
    b = integers(1088, 1024) if k_major else integers(1024, 1088)
    check(sparse24, *packed(2368, 1024), b, b_k_major=k_major, config=tile)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(8, 8, 8), (64, 64, 64), (72, 136, 200), (192, 320, 256), (320, 200, 1024), (1024, 960, 512), (8192, 64, 128)],
)
@pytest.mark.parametrize("k_major", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_sizes(m, n, k, k_major, transposed):
    b = integers(n, k) if k_major else integers(k, n)
    check(sparse24, *packed(m, k, in_rows=True), b, b_k_major=k_major, transpose_out=transposed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("out", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("operand", [None, "multiply", "add"])
def test_epilogues(dtype, out, transposed, operand):
    m, n, k = 320, 448, 192
    shape = (n, m) if transposed else (m, n)
    epilogue = Epilogue("relu2" if operand else "relu", operand, row_scale=operand is not None, alpha=0.5)
    extra = {} if operand is None else {"operand": integers(*shape, dtype=out, seed=5)}
    if operand is not None:
        extra["row_scale"] = jnp.asarray(np.random.default_rng(3).integers(0, 3, m), jnp.float32)

    def function(values, metadata, b, extra, **options):
        return sparse24(values, metadata, b, **extra, **options)

    check(
        function, *packed(m, k, dtype), integers(k, n, dtype=dtype), extra,
        transpose_out=transposed, out_dtype=out, epilogue=epilogue,
    )  # fmt: skip


@pytest.mark.gpu
def test_interleaved_tokens():
    check(sparse24, *packed(384, 1024), integers(1024, 512), b_interleaved=True, out_dtype="float32")
    check(sparse24, *packed(384, 64), integers(64, 512), b_interleaved=True)


SIZES = {
    "equal": (256, 256, 256, 256),
    "ragged": (0, 1, 63, 64, 65, 300, 128, 0),
    "single": (0, 0, 1024, 0),
    "empty": (0, 0),
    "too many": (512, 512, 512, 64),
    "negative": (128, -64, 128, 3),
}


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("k_major", [False, True])
@pytest.mark.parametrize("mode", ["rows", "columns", "contraction"])
def test_groups(mode, k_major, sizes):
    group_sizes, groups, tokens, wide, narrow = jnp.asarray(SIZES[sizes]), len(SIZES[sizes]), 1024, 320, 192
    if mode == "rows":
        a, b = packed(tokens, wide), integers(wide, groups, narrow).swapaxes(0, 1)
        b = jnp.transpose(b, (2, 0, 1)) if k_major else b
    elif mode == "columns":
        a, b = packed(groups * narrow, wide), integers(wide, tokens)
        b = b.T if k_major else b
    else:
        a, b = packed(narrow, tokens), integers(tokens, wide)
        b = b.T if k_major else b
    options = {"b_k_major": k_major, "out_dtype": "float32" if mode == "contraction" else None}
    for transposed in (False, True):
        check(getattr(grouped, mode), *a, b, group_sizes, transpose_out=transposed, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 7, 128])
def test_many_tiles_over_groups(groups):
    sizes = np.random.default_rng(groups).multinomial(16384, np.ones(groups) / groups)
    check(grouped.rows, *packed(16384, 256), integers(groups, 256, 512), jnp.asarray(sizes, jnp.int32))
    small = packed(512, 16384)
    check(grouped.contraction, *small, integers(16384, 512), jnp.asarray(sizes, jnp.int32), out_dtype="float32")


@pytest.mark.gpu
@pytest.mark.parametrize("v", [64, 128, 256])
@pytest.mark.parametrize("n", [8, 200, 1032])
def test_gathered_rows(v, n):
    rows, k, compressed = 768, 1024, 320
    rng = np.random.default_rng(v)
    columns = rng.integers(-2, k + 3, (rows // v, compressed)).astype(np.int32)
    columns = jnp.asarray(np.where(columns < 0, k, columns))  # k and beyond stand for rows of zeros
    b = integers(k, n)
    values, metadata = packed(rows, compressed)
    out = jax.jit(functools.partial(vnm, implementation="warp"))(values, metadata, columns, b)
    padded = jnp.concatenate([b, jnp.zeros((3, n), b.dtype)])
    for block in range(rows // v):
        part = slice(block * v // 64, (block + 1) * v // 64)
        wanted = sparse24(values[part], metadata[part], padded[columns[block]], implementation="reference")
        np.testing.assert_array_equal(np.asarray(out[block * v : (block + 1) * v], np.float32), np.asarray(wanted))


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_packing(interleaved, dtype):
    y, dy2 = normal(0, 512, 320, dtype=dtype), normal(1, 512, 320, dtype=dtype)
    options = {"features": True, "tokens": True, "interleaved": interleaved}
    check(api.pack_activations, y, **options)
    taken = api.pack_activations(y, **options, implementation="reference")
    check(api.take_activations, dy2, taken.features, taken.tokens, interleaved=interleaved)
    check(api.pack_thresholded, normal(2, 256, 320, dtype="float32"), jnp.float32(1.5), axis=0, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("group_sizes", [None, (128, 64, 320)])
def test_products_that_are_packed(group_sizes):
    sizes = None if group_sizes is None else jnp.asarray(group_sizes)
    weights, rows = packed(384, 256), integers(512, 256, seed=3)

    def function(values, metadata, rows, sizes, **options):
        found = product.pack_product(api.Packed(values, metadata), rows, sizes, **options)
        taken = product.take_product(
            api.Packed(values, metadata), rows[::-1], found.features, found.tokens, sizes,
            interleaved=options["interleaved"], implementation=options["implementation"],
        )  # fmt: skip
        return found, taken

    check(function, *weights, rows, sizes, features=True, tokens=True, interleaved=group_sizes is None)


@pytest.mark.gpu
def test_a_hundred_runs_give_the_same_bits():
    values, metadata = packed(4096, 1024)
    b = normal(1, 1024, 4160)
    product_ = jax.jit(functools.partial(sparse24, implementation="warp"))
    same, first = jax.jit(jnp.array_equal), product_(values, metadata, b)
    assert all(bool(same(first, product_(values, metadata, b))) for _ in range(100))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [100, 2048])
@pytest.mark.parametrize("name", GPU_RECIPES)
def test_the_layer(name, tokens):
    """The same operands, so the same patterns: only the order of summation and the rounding of y1 differ."""
    x, w1, w2, dy = inputs(tokens, jnp.bfloat16, d_model=256, d_ffn=1024)
    found = run(x, w1, w2, dy, RECIPES[name], "warp")
    reference = run(x, w1, w2, dy, RECIPES[name], "reference")
    for out, ref in zip(found, reference, strict=True):
        assert_close(out, ref, "bfloat16")
