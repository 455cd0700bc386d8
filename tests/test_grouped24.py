"""grouped24: the reference against loops over groups everywhere; on a Hopper GPU the kernels against f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import device
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.grouped24 import api
from pallas_kernels.measure import tune
from pallas_kernels.tiles import TileConfig
from tests.helpers import relative_error
from tests.kernels import LIMIT, bounds, dense, normal, oracle, pack

MODES = {"rows": api.rows, "columns": api.columns, "contraction": api.contraction}
TOKENS = 1024
SIZES = {
    "equal": (256, 256, 256, 256),
    "ragged": (64, 0, 704, 256),
    "one": (1, 1, 0, 1),
    "single": (0, 0, 1024, 0),
    "empty": (0, 0, 0, 0),
    "rest": (128, 192, 64, 65),
    "too many": (512, 512, 512, 64),
    "negative": (128, -64, 128, 3),
}


def operands(mode: str, sizes, m=192, n=320, k=256, dtype="bfloat16"):
    """values, metadata, the dense operand b, and the product in f64."""
    groups = len(sizes)
    a_shape = {"rows": (TOKENS, k), "columns": (groups * m, k), "contraction": (m, TOKENS)}[mode]
    b_shape = {"rows": (groups, k, n), "columns": (k, TOKENS), "contraction": (TOKENS, n)}[mode]
    values, metadata = pack(normal(0, *a_shape, dtype=dtype))
    b = normal(1, *b_shape, dtype=dtype)
    return values, metadata, b, oracle(mode, dense(values, metadata), np.asarray(b, np.float64), sizes)


def run(mode: str, values, metadata, b, sizes, *, b_k_major=False, transpose_out=False, **options):
    if b_k_major:
        b = jnp.transpose(b, (2, 0, 1)) if mode == "rows" else b.T
    group_sizes = jnp.asarray(sizes, jnp.int32)
    out = MODES[mode](
        values, metadata, b, group_sizes, b_k_major=b_k_major, transpose_out=transpose_out, **options
    )  # fmt: skip
    if transpose_out:
        out = jnp.transpose(out, (1, 2, 0)) if mode == "contraction" else out.T
    return out


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_reference_agrees_with_a_loop_over_groups(mode, sizes):
    values, metadata, b, wanted = operands(mode, SIZES[sizes])
    out = run(mode, values, metadata, b, SIZES[sizes], implementation="reference", out_dtype=jnp.float32)
    assert relative_error(out, wanted) < LIMIT["float32"]
    other = run(
        mode, values, metadata, b, SIZES[sizes], implementation="reference", out_dtype=jnp.float32, b_k_major=True,
        transpose_out=True,
    )  # fmt: skip
    assert relative_error(other, wanted) < LIMIT["float32"]


def test_bounds_round_up_and_stop_at_the_end():
    assert bounds((1, 65, 0, 2000), 256) == [(0, 64), (64, 192), (192, 192), (192, 256)]


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
@pytest.mark.parametrize(("b_k_major", "transpose_out"), [(False, False), (True, True)])
def test_kernels_agree_with_f64(mode, sizes, b_k_major, transpose_out):
    values, metadata, b, wanted = operands(mode, SIZES[sizes])
    out = run(
        mode, values, metadata, b, SIZES[sizes], b_k_major=b_k_major, transpose_out=transpose_out,
        implementation="hopper",
    )  # fmt: skip
    assert relative_error(out, wanted) < LIMIT["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "config",
    [TileConfig(128, 128), TileConfig(128, 192), TileConfig(64, 64, 1, 1, 3, 1),
     TileConfig(64, 128, stages=3, store_slots=1, raster_m=2, raster_n=2), TileConfig(stages=4, deferred=True),
     TileConfig(128, 128, store_slots=1, deferred=True), TileConfig(64, 64, 1, 1, 3, 1, deferred=True)],
    ids=tune.label,
)  # fmt: skip
def test_every_tile_serves_every_mode(mode, config):
    values, metadata, b, wanted = operands(mode, SIZES["ragged"])
    out = run(mode, values, metadata, b, SIZES["ragged"], implementation="hopper", config=config)
    assert relative_error(out, wanted) < LIMIT["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", ["ragged", "rest", "empty", "equal"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("deferred", [False, True])
def test_many_more_tiles_than_multiprocessors(mode, sizes, deferred):
    values, metadata, b, wanted = operands(mode, SIZES[sizes], m=832, n=1088, k=192)
    config = TileConfig(64, 64, 1, 1, stages=3, store_slots=1, raster_m=3, raster_n=2, deferred=deferred)
    out = run(mode, values, metadata, b, SIZES[sizes], implementation="hopper", config=config)
    assert relative_error(out, wanted) < LIMIT["bfloat16"]


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
def test_epilogues_agree_with_the_reference(mode, transpose_out):
    values, metadata, b, wanted = operands(mode, SIZES["ragged"])
    flat = wanted.reshape(-1, wanted.shape[-1])
    shape = (flat.shape[1], flat.shape[0]) if transpose_out else flat.shape
    options = {
        "epilogue": Epilogue("relu", "multiply", row_scale=True, alpha=2.0),
        "operand": normal(2, *shape),
        "row_scale": normal(3, flat.shape[0], dtype="float32"),
        "transpose_out": transpose_out,
    }
    out, reference = (
        run(mode, values, metadata, b, SIZES["ragged"], implementation=name, **options)
        for name in ("hopper", "reference")
    )
    assert relative_error(out, reference) < 2 * LIMIT["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_hundred_runs_give_the_same_bits(mode):
    values, metadata, b, _ = operands(mode, SIZES["ragged"])
    sizes = jnp.asarray(SIZES["ragged"], jnp.int32)
    launch = jax.jit(lambda: MODES[mode](values, metadata, b, sizes, implementation="hopper"))
    first, same = launch(), jax.jit(jnp.array_equal)
    assert all(bool(same(first, launch())) for _ in range(100))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_nan_stays_with_its_token(mode):
    sizes = SIZES["ragged"]
    values, metadata, b, _ = operands(mode, sizes)
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
def test_nan_in_one_group_of_the_contraction_stays_there():
    sizes = SIZES["ragged"]
    values, metadata, b, _ = operands("contraction", sizes)
    clean = np.asarray(run("contraction", values, metadata, b, sizes, implementation="hopper"), np.float32)
    out = run("contraction", values, metadata, b.at[10].set(jnp.nan), sizes, implementation="hopper")
    out = np.asarray(out, np.float32)
    assert np.isnan(out[0]).any()
    np.testing.assert_array_equal(out[1:], clean[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", ["rest", "empty", "one"])
def test_every_element_is_written_over_poison(mode, sizes):
    values, metadata, b, wanted = operands(mode, SIZES[sizes])
    poison = jnp.full((4 * wanted.size,), jnp.nan, jnp.bfloat16)
    jax.block_until_ready(poison)
    poison.delete()
    out = run(mode, values, metadata, b, SIZES[sizes], implementation="hopper")
    assert relative_error(out, wanted) < LIMIT["bfloat16"]


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
