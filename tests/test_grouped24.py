"""grouped24: the reference against loops over groups everywhere; on a Hopper GPU the kernels against f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.dispatch import is_fp8
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.grouped24 import api
from pallas_kernels.measure import tune
from pallas_kernels.tiles import PROMOTE, TileConfig
from tests.helpers import relative_error
from tests.kernels import E4M3, E5M2, LIMIT, bounds, dense, limit, normal, oracle, pack

KINDS = ["bfloat16", E4M3]
MODES = {"rows": api.rows, "columns": api.columns, "contraction": api.contraction}
TOKENS = 1024
SIZES = {
    "equal": (256, 256, 256, 256),
    "ragged": (64, 0, 704, 256),
    "one": (1, 1, 0, 1),
    "single": (0, 0, 1024, 0),
    "empty": (0, 0, 0, 0),
    "rest": (128, 192, 64, 65),
    "odd": (127, 128, 63, 65),
    "too many": (512, 512, 512, 64),
    "negative": (128, -64, 128, 3),
}


def operands(mode: str, sizes, m=192, n=320, k=256, dtype="bfloat16"):
    """values, metadata, the dense operand b, and the product in f64."""
    groups = len(sizes)
    a_shape = {"rows": (TOKENS, k), "columns": (groups * m, k), "contraction": (m, TOKENS)}[mode]
    b_shape = {"rows": (groups, k, n), "columns": (k, TOKENS), "contraction": (TOKENS, n)}[mode]
    values, metadata = pack(normal(0, *a_shape, dtype=dtype))
    b = normal(1, *b_shape, dtype=E5M2 if dtype == E4M3 and mode == "rows" else dtype)
    return values, metadata, b, oracle(mode, dense(values, metadata), np.asarray(b, np.float64), sizes, dtype)


def scales(mode: str, groups: int, m=192, n=320) -> dict:
    """Random scales of the problem of `operands`, as options."""
    rows = {"rows": TOKENS, "columns": groups * m, "contraction": groups * m}[mode]
    columns = TOKENS if mode == "columns" else n
    return {
        "epilogue": Epilogue(row_scale=True, column_scale=True),
        "row_scale": normal(4, rows, dtype="float32"),
        "column_scale": normal(5, columns, dtype="float32"),
    }


def run(mode: str, values, metadata, b, sizes, *, b_k_major=None, transpose_out=False, **options):
    if b_k_major is None:  # of 8 bits there is one order
        b_k_major = is_fp8(b.dtype)
    if b_k_major:
        b = jnp.transpose(b, (2, 0, 1)) if mode == "rows" else b.T
    group_sizes = jnp.asarray(sizes, jnp.int32)
    out = MODES[mode](
        values, metadata, b, group_sizes, b_k_major=b_k_major, transpose_out=transpose_out, **options
    )  # fmt: skip
    if transpose_out:
        out = jnp.transpose(out, (1, 2, 0)) if mode == "contraction" else out.T
    return out


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_reference_agrees_with_a_loop_over_groups(mode, sizes, dtype):
    values, metadata, b, wanted = operands(mode, SIZES[sizes], dtype=dtype)
    out = run(mode, values, metadata, b, SIZES[sizes], implementation="reference", out_dtype=jnp.float32)
    assert relative_error(out, wanted) < LIMIT["float32"]
    other = run(
        mode, values, metadata, b, SIZES[sizes], implementation="reference", out_dtype=jnp.float32, b_k_major=True,
        transpose_out=True,
    )  # fmt: skip
    assert relative_error(other, wanted) < LIMIT["float32"]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("transpose_out", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_reference_scales_rows_of_a_and_columns_of_b(mode, transpose_out, dtype):
    sizes = SIZES["odd"]
    values, metadata, b, wanted = operands(mode, sizes, dtype=dtype)
    found = scales(mode, len(sizes))
    rows, columns = (np.asarray(found[name], np.float64) for name in ("row_scale", "column_scale"))
    if mode == "columns":  # each group's columns have the scales of its own rows
        for group, (start, end) in zip(rows.reshape(4, -1), bounds(sizes, TOKENS, dtype), strict=True):
            wanted[:, start:end] *= group[:, None]
    else:
        wanted = wanted * rows.reshape(*wanted.shape[:-1], 1)
    options = found | {"implementation": "reference", "out_dtype": jnp.float32, "transpose_out": transpose_out}
    assert relative_error(run(mode, values, metadata, b, sizes, **options), wanted * columns) < LIMIT["float32"]


def test_bounds_round_up_and_stop_at_the_end():
    assert bounds((1, 65, 0, 2000), 256) == [(0, 64), (64, 192), (192, 192), (192, 256)]
    assert bounds((1, 129, 0, 2000), 512, E4M3) == [(0, 128), (128, 384), (384, 384), (384, 512)]


def test_groups_of_8_bits_start_at_whole_tiles():
    values, metadata = pack(normal(0, 192, 256, dtype=E4M3))
    with pytest.raises(ValueError, match="tokens=192 must be a multiple of 128: groups start there"):
        api.rows(values, metadata, normal(1, 64, 2, 256, dtype=E4M3), jnp.array([64, 128]), b_k_major=True)
    with pytest.raises(ValueError, match="b_k_major=False: of 8 bits"):
        api.rows(values, metadata, normal(1, 2, 256, 64, dtype=E4M3), jnp.array([64, 128]))
    values, metadata = pack(normal(0, 64, 192, dtype=E4M3))
    with pytest.raises(ValueError, match="k=192 must be a positive multiple of 128"):
        api.contraction(values, metadata, normal(1, 64, 192, dtype=E4M3), jnp.array([64, 128]), b_k_major=True)


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("rows", {"b": normal(1, 4, 128, 64)}, r"k=256.*\[4, 128, 64\]"),
        ("rows", {"b": normal(1, 4, 256, 72)}, r"n=72 must be a positive multiple of 64"),
        ("rows", {"group_sizes": jnp.zeros(3, jnp.int32)}, r"int32\[3\]; want integers \[4\]"),
        ("columns", {"group_sizes": jnp.zeros(5, jnp.int32)}, r"768 rows.*groups=5"),
        ("contraction", {"b": normal(1, 512, 320)}, r"1024 tokens.*512"),
    ],
)
def test_errors_carry_values(mode, change, message):
    values, metadata, b, _ = operands(mode, SIZES["equal"])
    arguments = {"b": b, "group_sizes": jnp.asarray(SIZES["equal"], jnp.int32)} | change
    with pytest.raises(ValueError, match=message):
        MODES[mode](values, metadata, arguments["b"], arguments["group_sizes"])


@pytest.mark.parametrize("mode", MODES)
def test_a_named_kernel_never_falls_back(mode, monkeypatch):
    values, metadata, b, _ = operands(mode, SIZES["equal"])
    monkeypatch.setattr(device, "current", lambda: None)
    with pytest.raises(NotImplementedError, match="no GPU"):
        run(mode, values, metadata, b, SIZES["equal"], implementation="hopper")


# -------------------------------------------------------------------------------------------- on a Hopper GPU


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("b_k_major", "transpose_out", "dtype"),
    [(False, False, "bfloat16"), (True, True, "bfloat16"), (True, False, E4M3), (True, True, E4M3)],
)
def test_kernels_agree_with_f64(mode, sizes, b_k_major, transpose_out, dtype):
    values, metadata, b, wanted = operands(mode, SIZES[sizes], dtype=dtype)
    out = run(
        mode, values, metadata, b, SIZES[sizes], b_k_major=b_k_major, transpose_out=transpose_out,
        implementation="hopper",
    )  # fmt: skip
    assert relative_error(out, wanted) < limit("bfloat16", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "config",
    [TileConfig(128, 128), TileConfig(128, 192), TileConfig(64, 64, 1, 1, 3, 1),
     TileConfig(64, 128, stages=3, store_slots=1, raster_m=2, raster_n=2), TileConfig(stages=4, deferred=True),
     TileConfig(128, 128, store_slots=1, deferred=True), TileConfig(64, 64, 1, 1, 3, 1, deferred=True)],
    ids=tune.label,
)  # fmt: skip
@pytest.mark.parametrize("dtype", KINDS)
def test_every_tile_serves_every_mode(mode, config, dtype):
    values, metadata, b, wanted = operands(mode, SIZES["ragged"], dtype=dtype)
    options = {"promote": 0} if is_fp8(dtype) else {}
    out = run(mode, values, metadata, b, SIZES["ragged"], implementation="hopper", config=config, **options)
    assert relative_error(out, wanted) < limit("bfloat16", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", tune.PROMOTING, ids=tune.label)
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_tiles_that_promote_serve_every_mode(mode, config, out_dtype):
    values, metadata, b, wanted = operands(mode, SIZES["odd"], k=1280, dtype=E4M3)
    options = {"out_dtype": out_dtype, "promote": PROMOTE, "config": config, "implementation": "hopper"}
    out = run(mode, values, metadata, b, SIZES["odd"], **options)
    assert relative_error(out, wanted) < limit(out_dtype, E4M3)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", ["ragged", "rest", "empty", "equal"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("dtype", KINDS)
def test_many_more_tiles_than_multiprocessors(mode, sizes, deferred, dtype):
    values, metadata, b, wanted = operands(mode, SIZES[sizes], m=832, n=1088, k=256, dtype=dtype)
    config = TileConfig(64, 64, 1, 1, stages=3, store_slots=1, raster_m=3, raster_n=2, deferred=deferred)
    options = {"promote": 0} if is_fp8(dtype) else {}
    out = run(mode, values, metadata, b, SIZES[sizes], implementation="hopper", config=config, **options)
    assert relative_error(out, wanted) < limit("bfloat16", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_sizes_change_without_a_new_compilation(mode):
    values, metadata, b, _ = operands(mode, SIZES["equal"])
    traces = []

    @jax.jit
    def compiled(sizes):
        traces.append(sizes)
        return MODES[mode](values, metadata, b, sizes, implementation="hopper")

    for sizes in SIZES.values():
        wanted = operands(mode, sizes)[3]
        assert relative_error(compiled(jnp.asarray(sizes, jnp.int32)), wanted) < LIMIT["bfloat16"]
    assert len(traces) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transpose_out", [False, True])
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("column_scale", [False, True])
def test_epilogues_agree_with_the_reference(mode, transpose_out, dtype, column_scale):
    values, metadata, b, wanted = operands(mode, SIZES["ragged"], dtype=dtype)
    flat = wanted.reshape(-1, wanted.shape[-1])
    shape = (flat.shape[1], flat.shape[0]) if transpose_out else flat.shape
    options = scales(mode, 4) | {
        "epilogue": Epilogue("relu", "multiply", row_scale=True, alpha=2.0, column_scale=column_scale),
        "operand": normal(2, *shape),
        "transpose_out": transpose_out,
    }
    options = options if column_scale else options | {"column_scale": None}
    out, reference = (
        run(mode, values, metadata, b, SIZES["ragged"], implementation=name, **options)
        for name in ("hopper", "reference")
    )
    assert relative_error(out, reference) < 2 * LIMIT["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("transpose_out", [False, True])
def test_powers_of_two_scale_late_to_the_same_bits(mode, dtype, transpose_out):
    """The tile's result is stored, and scaled, behind the products of the next one."""
    values, metadata, b, _ = operands(mode, SIZES["odd"], m=448, n=640, dtype=dtype)
    options = scales(mode, 4, m=448, n=640)
    options |= {name: 2.0 ** jnp.round(4 * options[name]) for name in ("row_scale", "column_scale")}
    options |= {"config": TileConfig(stages=4, store_slots=1, deferred=True), "transpose_out": transpose_out}
    options |= {"implementation": "hopper"} | ({"promote": 0} if is_fp8(dtype) else {})
    expected = run(mode, values, metadata, b, SIZES["odd"], **options)
    options["epilogue"] = Epilogue(row_scale=True, column_scale=True, powers_of_two=True)
    np.testing.assert_array_equal(run(mode, values, metadata, b, SIZES["odd"], **options), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", KINDS)
def test_a_hundred_runs_give_the_same_bits(mode, dtype):
    values, metadata, b, _ = operands(mode, SIZES["ragged"], dtype=dtype)
    sizes = jnp.asarray(SIZES["ragged"], jnp.int32)
    launch = jax.jit(lambda: run(mode, values, metadata, b, sizes, implementation="hopper"))
    first, same = launch(), jax.jit(jnp.array_equal)
    assert all(bool(same(first, launch())) for _ in range(100))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["rows", "columns"])
@pytest.mark.parametrize("dtype", KINDS)
def test_nan_stays_with_its_token(mode, dtype):
    sizes = SIZES["ragged"]
    values, metadata, b, _ = operands(mode, sizes, dtype=dtype)
    clean = np.asarray(run(mode, values, metadata, b, sizes, implementation="hopper"), np.float32)
    token = 70
    if mode == "rows":
        values = values.at[token, 3].set(jnp.nan)
    else:
        b = b.at[:, token].set(jnp.nan)
    out = np.asarray(run(mode, values, metadata, b, sizes, implementation="hopper"), np.float32)
    axis = 0 if mode == "rows" else 1
    assert not np.isfinite(np.take(out, token, axis)).any()
    np.testing.assert_array_equal(np.delete(out, token, axis), np.delete(clean, token, axis))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KINDS)
def test_nan_in_one_group_of_the_contraction_stays_there(dtype):
    sizes = SIZES["ragged"]
    values, metadata, b, _ = operands("contraction", sizes, dtype=dtype)
    clean = np.asarray(run("contraction", values, metadata, b, sizes, implementation="hopper"), np.float32)
    out = run("contraction", values, metadata, b.at[10].set(jnp.nan), sizes, implementation="hopper")
    out = np.asarray(out, np.float32)
    assert np.isnan(out[0]).any()
    np.testing.assert_array_equal(out[1:], clean[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", ["rest", "empty", "one"])
@pytest.mark.parametrize("dtype", KINDS)
def test_every_element_is_written_over_poison(mode, sizes, dtype):
    values, metadata, b, wanted = operands(mode, SIZES[sizes], dtype=dtype)
    poison = jnp.full((4 * wanted.size,), jnp.nan, jnp.bfloat16)
    jax.block_until_ready(poison)
    poison.delete()
    out = run(mode, values, metadata, b, SIZES[sizes], implementation="hopper")
    assert relative_error(out, wanted) < limit("bfloat16", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_bad_weight_reaches_the_stored_entries_of_its_groups_tokens_only(bad):
    sizes = (192, 64, 512, 256)
    values, metadata, b, _ = operands("rows", sizes)
    clean = np.asarray(run("rows", values, metadata, b, sizes, implementation="hopper"), np.float32)
    out = run("rows", values, metadata, b.at[2, 37, 11].set(bad), sizes, implementation="hopper")
    out = np.asarray(out, np.float32)
    tokens = np.arange(TOKENS)
    stored = (tokens >= 256) & (tokens < 768) & (dense(jnp.ones_like(values), metadata)[:, 37] != 0)
    assert 0 < stored.sum() < 512
    np.testing.assert_array_equal(np.isfinite(out[:, 11]), ~stored)
    out[stored, 11] = clean[stored, 11]
    np.testing.assert_array_equal(out, clean)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_bad_stored_weight_reaches_its_neuron_in_its_group_only(bad):
    sizes, m = (192, 64, 512, 256), 192
    values, metadata, b, _ = operands("columns", sizes, m=m)
    clean = np.asarray(run("columns", values, metadata, b, sizes, implementation="hopper"), np.float32)
    values = values.at[2 * m + 70, 9].set(bad)
    out = np.asarray(run("columns", values, metadata, b, sizes, implementation="hopper"), np.float32)
    assert not np.isfinite(out[70, 256:768]).any()
    out[70, 256:768] = clean[70, 256:768]
    np.testing.assert_array_equal(out, clean)
