"""dense8: errors and the reference everywhere; on a Hopper GPU the kernel against f64."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dense8 import dense8
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.tiles import PROMOTE, TileConfig
from tests.helpers import relative_error
from tests.kernels import E4M3, E5M2, LIMIT, limit, normal

SCALES = Epilogue("relu", row_scale=True, column_scale=True)


def problem(m: int, n: int, k: int, transpose_out: bool, dtype=E4M3, b_dtype=E4M3):
    """Operands, options, and the result in f64."""
    a, b = normal(0, m, k, dtype=dtype), normal(1, n, k, dtype=b_dtype)
    rows, columns = normal(2, m, dtype="float32"), normal(3, n, dtype="float32")
    options: dict[str, Any] = {"epilogue": SCALES, "row_scale": rows, "column_scale": columns}
    product = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    wanted = np.maximum(product * np.asarray(rows)[:, None] * np.asarray(columns), 0)
    return a, b, options | {"transpose_out": transpose_out}, wanted.T if transpose_out else wanted


@pytest.mark.parametrize("transpose_out", [False, True])
@pytest.mark.parametrize(("dtype", "b_dtype"), [(E4M3, E4M3), (E5M2, E4M3)])
def test_reference(transpose_out, dtype, b_dtype):
    a, b, options, wanted = problem(80, 48, 128, transpose_out, dtype, b_dtype)
    out = dense8(a, b, implementation="reference", out_dtype=jnp.float32, **options)
    assert relative_error(out, wanted) < LIMIT["float32"]
    assert dense8(a, b, implementation="reference", **options).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": normal(0, 64, 256, dtype=E4M3)}, r"\[64, 256\].*\[64, 128\] differ in k"),
        ({"a": normal(0, 64, 128)}, "a is bfloat16; want e4m3"),
        ({"b": normal(0, 40, 128, dtype=E4M3)}, "n=40 must be a positive multiple of 16"),
        ({"epilogue": SCALES, "row_scale": jnp.ones(64)}, "column_scale=None contradict"),
    ],
)
def test_errors_carry_values(change, message):
    arguments = {"a": normal(0, 64, 128, dtype=E4M3), "b": normal(1, 64, 128, dtype=E4M3)} | change
    with pytest.raises(ValueError, match=message):
        dense8(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("transpose_out", [False, True])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 128), (1008, 528, 384), (16, 2064, 1152)])
@pytest.mark.parametrize(
    "config",
    [None, TileConfig(128, 128, stages=3, store_slots=1, deferred=True), TileConfig(64, 192, stages=4, promote=256)],
)
def test_kernel(m, n, k, config, out_dtype, transpose_out):
    a, b, options, wanted = problem(m, n, k, transpose_out)
    out = dense8(a, b, implementation="hopper", config=config, out_dtype=out_dtype, **options)
    assert relative_error(out, wanted) < limit(out_dtype, E4M3)


@pytest.mark.gpu
def test_promoted_and_added_up():
    a, b, options, _ = problem(512, 768, 8192, False)
    options |= {"epilogue": dataclasses.replace(SCALES, activation=None, operand="add"), "out_dtype": jnp.float32}
    options["operand"] = normal(4, 512, 768, dtype="float32")
    out, wanted = (dense8(a, b, implementation=which, promote=PROMOTE, **options) for which in ("hopper", "reference"))
    assert relative_error(out, wanted) < limit("float32", E4M3)
