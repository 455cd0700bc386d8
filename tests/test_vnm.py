"""Products with V:N:M matrices: references, errors and the gather's addresses everywhere; kernels on a Hopper GPU."""

import functools
import re
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.grouped24 import api as grouped
from pallas_kernels.hopper import gather
from pallas_kernels.hopper.schedule import next_in_place
from pallas_kernels.measure import vnm as bench
from pallas_kernels.measure.vnm_shapes import Case, cases
from pallas_kernels.sparse24 import sparse24
from pallas_kernels.tiles import TileConfig
from pallas_kernels.vnm import api, best_form, hopper, vnm, vnm_transposed
from tests.helpers import relative_error
from tests.kernels import LIMIT, normal
from venom_jax import Pattern, prune

pruned = jax.jit(prune.vnm, static_argnames=("pattern", "columns"))
reference = jax.jit(functools.partial(vnm, implementation="reference"), static_argnames=("transpose_out", "out_dtype"))
transposed = jax.jit(vnm_transposed, static_argnames=("num_columns", "out_dtype"))


def problem(m: int, n: int, k: int, v: int, pattern_m: int, dtype="bfloat16"):
    """(values, metadata, columns), b, the logical matrix and the product in f64, both with the padding rows."""
    packed = pruned(normal(0, m, k, dtype=dtype), Pattern(v=v, m=Fraction(pattern_m)))
    b = normal(1, k, n, dtype=dtype)
    dense = np.zeros((packed.columns.shape[0] * v, k))
    dense[:m] = np.asarray(packed.to_dense(), np.float64)
    return (packed.values, packed.metadata, packed.columns), b, dense, dense @ np.asarray(b, np.float64)


# ------------------------------------------------------------------------------------------------ everywhere


def test_reference_multiplies_and_its_transpose_too():
    a, b, dense, wanted = problem(72, 40, 96, 64, 12)
    out = reference(*a, b, out_dtype="float32")
    assert relative_error(out, wanted) < LIMIT["float32"]
    assert relative_error(reference(*a, b, out_dtype="float32", transpose_out=True), wanted.T) < LIMIT["float32"]
    assert reference(*a, b).dtype == jnp.bfloat16
    back = normal(2, 128, 24)
    found = transposed(*a, back, num_columns=96, out_dtype="float32")
    assert relative_error(found, dense.T @ np.asarray(back, np.float64)) < LIMIT["float32"]


@pytest.mark.parametrize("tile_n", [64, 128, 256])
def test_gathered_pieces_lie_where_the_tensor_core_reads_them(tile_n):
    """Tiles of 8 x 64 elements one after another, bits 4 to 6 of an address exchanged by bits 7 to 9."""
    row, column = np.meshgrid(np.arange(64), np.arange(tile_n), indexing="ij")
    tile = (row // 8) * (tile_n // 64) + column // 64
    plain = tile * 1024 + (row % 8) * 128 + (column % 64) * 2
    wanted = plain ^ ((plain >> 7 & 7) << 4)
    seen = np.zeros(64 * tile_n // 8, int)
    warp, lane = np.arange(128) // 32, np.arange(128) % 32
    first = gather.first_byte(warp, lane, tile_n)
    for turn in range(gather.pieces_per_lane(tile_n)):
        piece = gather.piece_of(warp, lane, turn, tile_n)
        np.testing.assert_array_equal(piece.row // 16, warp)  # whose indices the warp renews itself
        np.testing.assert_array_equal(piece.row, gather.piece_of(warp, lane, 0, tile_n).row + turn)  # loaded in vectors
        offset = (first ^ piece.swap) + piece.skip
        np.testing.assert_array_equal(offset, wanted[piece.row, piece.piece * 8])
        seen[offset // 16] += 1
        banks = (offset // 16 % 8).reshape(-1, 8)
        assert all(len(set(eight)) == 8 for eight in banks)  # eight lanes write to all banks
    assert (seen == 1).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 16, 33])
@pytest.mark.parametrize("stages", [2, 4, 5, 8])
def test_indices_go_where_their_stage_will_look_for_them(steps, stages):
    """Stage s of all tiles' stages takes place s mod stages, so next to it there comes s + stages."""
    i = np.arange(steps)
    near, is_far, stage = next_in_place(i, stages, steps)
    np.testing.assert_array_equal((near + is_far) * steps + stage, i + stages)
    assert set(np.asarray(stage).tolist()) == set(range(steps))


def tiles() -> dict[TileConfig, int]:
    return {config: v for v, config in hopper.TILES.items()} | {
        config: v for v, configs in bench.TILES.items() for config in configs
    }


@pytest.mark.parametrize(
    ("config", "v"), tiles().items(), ids=lambda c: bench.label(c) if isinstance(c, TileConfig) else str(c)
)
def test_every_tile_lowers(config, v, monkeypatch):
    assert config.violation(hopper.problem_of(512, 520, 256, v)) is None
    assert "mosaic_gpu" in lower(monkeypatch, v, config, transpose_out=False)


@pytest.mark.parametrize("v", [64, 128, 256])
def test_transposed_outputs_and_other_types_lower(v, monkeypatch):
    assert "mosaic_gpu" in lower(monkeypatch, v, None, transpose_out=True, dtype="float16", out_dtype="float32")


def lower(monkeypatch, v, config, *, transpose_out, dtype="bfloat16", out_dtype="bfloat16"):
    monkeypatch.setenv("MOSAIC_GPU_ARCH", "sm_90a")
    rows, compressed, k, n, array = 512, 256, 1000, 520, jax.ShapeDtypeStruct
    launch = jax.jit(lambda v, e, c, b: hopper.vnm(v, e, c, b, transpose_out, out_dtype, config))
    traced = launch.trace(
        array((rows // 64, compressed // 64, 8, 256), dtype),
        array((rows // 64, compressed // 64, 128), jnp.uint32),
        array((rows // v, compressed), jnp.int32),
        array((k, n), dtype),
    )
    assert traced.out_info.shape == ((n, rows) if transpose_out else (rows, n))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("v", "config", "message"),
    [
        (64, TileConfig(64, 256, 2, 1), "tile_m=128.*problem.v=64"),
        (128, TileConfig(128, 192, 1, 1), "tile_n=192"),
        (128, TileConfig(gather_lag=3), "gather_lag=3, self.stages=4"),
    ],
)
def test_tiles_that_cannot_gather_are_refused(v, config, message):
    with pytest.raises(ValueError, match=message):
        config.check(hopper.problem_of(512, 512, 256, v))


def test_operands_of_8_bits_are_refused():
    values, words = jnp.zeros((1, 1, 16, 256), jnp.float8_e4m3fn), jnp.zeros((1, 2, 128), jnp.uint32)
    columns, b = jnp.zeros((1, 128), jnp.int32), jnp.zeros((128, 64), jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match=r"product takes operands of 16 bits, not float8_e4m3fn.*bfloat16"):
        api._check(values, words, columns, b)


def test_errors_carry_values():
    a, b, *_ = problem(64, 16, 64, 64, 16)
    values, metadata, columns = a
    for change, message in (
        ({"columns": columns[:, :32]}, r"columns are int32\[1, 32\].*int32\[blocks, 64\]"),
        ({"columns": jnp.tile(columns, (2, 1))}, "64 rows in 2 blocks: a block has 64, 128, 256 rows"),
        ({"columns": columns[:0]}, "64 rows in 0 blocks: a block has 64, 128, 256 rows"),
        ({"b": b[:, :12]}, "n=12 must be a positive multiple of 8"),
        ({"b": b.astype(jnp.float16)}, "values are bfloat16.*b's dtype, float16"),
        ({"metadata": metadata[..., :64]}, r"uint32\[1, 1, 64\].*uint32\[1, 1, 128\]"),
    ):
        arguments: dict[str, Any] = {"values": values, "metadata": metadata, "columns": columns, "b": b} | change
        # The type checker, which runs under pytest only, may speak first.
        with pytest.raises(Exception, match=f"{message}|TypeCheckError|Type-check"):
            vnm(**arguments)
    with pytest.raises(ValueError, match=r"b \[32, 8\] has 32 rows; the stored matrix has 64"):
        vnm_transposed(*a, jnp.zeros((32, 8), jnp.bfloat16), 64)


def test_a_named_kernel_never_falls_back(monkeypatch):
    a, b, *_ = problem(64, 16, 64, 64, 16)
    monkeypatch.setattr(device, "current", lambda: None)
    with pytest.raises(NotImplementedError, match="no GPU"):
        vnm(*a, b, implementation="hopper")


def test_the_fastest_form_is_taken(monkeypatch):
    """Dense where sizes are tiny, plain 2:4 where the caller has it and it is ahead, the kernel otherwise."""
    a, b, *_ = problem(64, 16, 64, 64, 16)
    taken = []

    def launch(values, metadata, columns, b, *_):
        taken.append(columns.shape)
        return jnp.zeros((values.shape[0] * 64, b.shape[1]), b.dtype)

    monkeypatch.setattr(device, "current", lambda: device.Gpu("NVIDIA H100", "9.0", 132))
    monkeypatch.setattr(hopper, "vnm", launch)
    vnm(*a, b)
    assert not taken
    vnm(*a, b, implementation="hopper")
    assert taken == [(1, 64)]
    big = {"m": 16384, "n": 4096, "k": 4096}
    assert best_form(**big, v=128, compressed=512, has_24=True) == "vnm"
    assert best_form(**big, v=64, compressed=2048, has_24=True) == "sparse24"
    assert best_form(**big, v=128, compressed=2048, has_24=True) == "vnm"
    assert best_form(**big, v=64, compressed=2048) == "vnm"
    assert best_form(64, 64, 64, v=64, compressed=64, has_24=True) == "dense"


def test_bench_names_read_as_documented_and_operands_are_right():
    assert "16384x4096x4096 V=64 M=16" in cases()
    assert all(re.fullmatch(r"\d+x\d+x\d+ V=\d+ M=\d+", name) for name in cases())
    assert len(cases()) == 32
    case = Case(128, 64, 128, 64, 16)
    operands = bench.operands(case, 0)
    columns = operands[2]
    groups = np.asarray(columns)[:, :32].reshape(2, 8, 4)
    assert (np.diff(groups, axis=-1) > 0).all()
    assert (groups // 16 == np.arange(8)[:, None]).all()
    assert (np.asarray(columns)[:, 32:] == 128).all()
    out = reference(*operands, out_dtype="float32")
    assert bench.relative_error(operands, out) < 1e-6
    assert bench.relative_error(operands, out.at[3, 5].add(100)) > 2e-3
    values, metadata = bench.as_24(case, *operands[:3])
    plain = sparse24(values, metadata, operands[3], implementation="reference")
    assert bench.relative_error(operands, plain) < 2e-3
    assert {bench.form_of(case) for case in cases().values()} == {"vnm", "sparse24"}
    found = bench.least_times(cases()["16384x4096x4096 V=64 M=16"])
    other = bench.least_times(cases()["16384x4096x4096 V=128 M=16"])
    assert 1.7 < found["l2_ms"] / other["l2_ms"] < 2.0  # half as many rows share what is gathered
    assert found["dram_ms"] == pytest.approx(0.07, rel=0.2)


# -------------------------------------------------------------------------------------------- on a Hopper GPU

kernel = jax.jit(
    functools.partial(vnm, implementation="hopper"), static_argnames=("transpose_out", "out_dtype", "config")
)
SIZES = [(64, 64, 64), (72, 8, 128), (1000, 520, 256), (520, 1032, 1024), (2056, 136, 4096)]


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("v", [64, 128, 256])
@pytest.mark.parametrize("pattern_m", [4, 16, 64])
def test_kernel_agrees_with_f64(m, n, k, v, pattern_m):
    a, b, _, wanted = problem(m, n, k, v, pattern_m)
    assert relative_error(kernel(*a, b), wanted) < LIMIT["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("pattern_m", [8, 12, 32, 48, 128])
@pytest.mark.parametrize("transpose_out", [False, True])
def test_other_patterns_and_orders_agree(pattern_m, transpose_out):
    a, b, _, wanted = problem(392, 328, 768, 128, pattern_m)
    out = kernel(*a, b, transpose_out=transpose_out)
    assert relative_error(out.T if transpose_out else out, wanted) < LIMIT["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
def test_kernel_types(dtype, out_dtype):
    a, b, _, wanted = problem(520, 264, 512, 64, 8, dtype)
    out = kernel(*a, b, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert relative_error(out, wanted) < LIMIT[out_dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("config", "v"), tiles().items(), ids=lambda c: bench.label(c) if isinstance(c, TileConfig) else str(c)
)
def test_every_tile_gives_the_same_bits(config, v):
    a, b, _, wanted = problem(4096, 776, 1024, v, 8)
    out = kernel(*a, b, config=config)
    assert relative_error(out, wanted) < LIMIT["bfloat16"]
    np.testing.assert_array_equal(out, kernel(*a, b))


@pytest.mark.gpu
@pytest.mark.parametrize("v", [64, 128])
def test_a_hundred_runs_give_the_same_bits(v):
    a, b, *_ = problem(4096, 1032, 2048, v, 16)
    first = kernel(*a, b)
    same = jax.jit(jnp.array_equal)
    assert all(bool(same(first, kernel(*a, b))) for _ in range(100))


@pytest.mark.gpu
def test_every_element_is_written_over_poison():
    a, b, _, wanted = problem(1000, 520, 256, 64, 16)
    poison = jnp.full((1024 * 576 * 4,), jnp.nan, jnp.bfloat16)
    jax.block_until_ready(poison)
    poison.delete()
    assert relative_error(kernel(*a, b), wanted) < LIMIT["bfloat16"]


@pytest.mark.gpu
def test_rows_that_no_block_names_are_never_read():
    (values, metadata, columns), b, _, wanted = problem(192, 136, 256, 64, 32)
    named = jnp.zeros(257, bool).at[columns.reshape(-1)].set(True)[:256]
    assert 0 < int(named.sum()) < 256
    out = kernel(values, metadata, columns, jnp.where(named[:, None], b, jnp.nan))
    assert relative_error(out, wanted) < LIMIT["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("outside", [256, 257, -1, 2**31 - 1, -(2**31)])
def test_an_index_outside_reads_zeros(outside):
    (values, metadata, columns), b, *_ = problem(64, 136, 256, 64, 8)
    out = kernel(values, metadata, columns.at[0, 5].set(outside), b, out_dtype="float32")
    wanted = kernel(values, metadata, columns, b.at[columns[0, 5]].set(0), out_dtype="float32")
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [2, 4, 8])
@pytest.mark.parametrize("v", [64, 128])
def test_blocks_that_share_columns_give_the_grouped_kernels_bits(experts, v):
    """A routed product: block r of group g keeps the columns of expert g, four of each 4 x experts."""
    tokens, k, n = 1024, 256, 576
    values, metadata, columns, _ = bench.operands(Case(tokens, n, k * experts, v, 4 * experts), 0)
    b = normal(3, experts, k, n)
    sizes = jnp.full((experts,), tokens // experts, jnp.int32)
    group = jnp.arange(tokens // v) * v // (tokens // experts)
    j, i = jnp.arange(k) // 4, jnp.arange(k) % 4
    columns = (j * 4 * experts + i)[None] + 4 * group[:, None]
    # Row 4 j + i of expert g's weights stands at column 4 experts j + 4 g + i of the V:N:M matrix.
    mixed = b.reshape(experts, k // 4, 4, n).swapaxes(0, 1).reshape(experts * k, n)
    out = kernel(values, metadata, columns.astype(jnp.int32), mixed)
    np.testing.assert_array_equal(out, grouped.rows(values, metadata, b, sizes, implementation="hopper"))


@pytest.mark.gpu
def test_the_transposed_product_agrees_with_f64():
    a, _, dense, _ = problem(520, 8, 512, 64, 16)
    back = normal(2, dense.shape[0], 264)
    found = vnm_transposed(*a, back, 512, out_dtype=jnp.float32)
    assert relative_error(found, dense.T @ np.asarray(back, np.float64)) < LIMIT["float32"]


@pytest.mark.gpu
def test_benchmark_cases_pass_their_check():
    for name in ("1024x4096x4096 V=64 M=64", "1024x4096x4096 V=128 M=8"):
        _, _, error = bench.prepare(cases()[name])
        assert error <= 2e-3
