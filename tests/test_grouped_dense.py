"""Dense products over ragged groups against a loop over groups in f64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped24 import dense
from tests.helpers import relative_error
from tests.kernels import LIMIT, bounds, normal

SIZES = {"ragged": (128, 0, 64, 192), "one": (0, 0, 512, 0), "rounded": (70, 1, 130, 0), "none": (0, 0, 0, 0)}
ROWS, K, N = 512, 128, 192


def parts(name):
    return bounds(SIZES[name], ROWS)


def check_rows(name, b_k_major, dtype, **options):
    a, b = normal(0, ROWS, K, dtype=dtype), normal(1, 4, K, N, dtype=dtype)
    expected = np.zeros((ROWS, N))
    for g, (start, end) in enumerate(parts(name)):
        expected[start:end] = np.asarray(a[start:end], np.float64) @ np.asarray(b[g], np.float64)
    given = jnp.moveaxis(b, 2, 0) if b_k_major else b
    out = dense.rows(a, given, jnp.array(SIZES[name]), b_k_major=b_k_major, **options)
    assert relative_error(out, expected) < LIMIT[dtype]


def check_columns(name, transposed, dtype, **options):
    weights, tokens = normal(0, 4 * N, K, dtype=dtype), normal(1, ROWS, K, dtype=dtype)
    expected = np.zeros((ROWS, N))
    for g, (start, end) in enumerate(parts(name)):
        own = np.asarray(weights[g * N : (g + 1) * N], np.float64)
        expected[start:end] = np.asarray(tokens[start:end], np.float64) @ own.T
    given = weights.T if transposed else weights
    out = dense.columns(given, tokens, jnp.array(SIZES[name]), transposed=transposed, **options)
    assert relative_error(out, expected) < LIMIT[dtype]


def check_contraction(name, dtype, **options):
    a, b = normal(0, ROWS, K, dtype=dtype), normal(1, ROWS, N, dtype=dtype)
    wide = [np.asarray(t, np.float64) for t in (a, b)]
    expected = np.stack([wide[0][start:end].T @ wide[1][start:end] for start, end in parts(name)])
    out = dense.contraction(a, b, jnp.array(SIZES[name]), **options)
    assert relative_error(out, expected) < LIMIT["float32"]


@pytest.mark.parametrize("name", SIZES)
def test_against_a_loop(name):
    for flag in (False, True):
        check_rows(name, flag, "float32")
        check_columns(name, flag, "float32")
    check_contraction(name, "float32")


@pytest.mark.gpu
@pytest.mark.parametrize("name", SIZES)
def test_hopper(name):
    for flag in (False, True):
        check_rows(name, flag, "bfloat16", implementation="hopper")
        check_columns(name, flag, "bfloat16", implementation="hopper")
    check_contraction(name, "bfloat16", implementation="hopper")


def test_bad_sizes_are_named():
    sizes = jnp.array([64, 64])
    with pytest.raises(ValueError, match="do not fit"):
        dense.rows(jnp.zeros((128, 64)), jnp.zeros((3, 64, 64)), sizes)
    with pytest.raises(ValueError, match="100 rows of weights do not split into groups=2"):
        dense.columns(jnp.zeros((100, 64)), jnp.zeros((128, 64)), sizes)
    with pytest.raises(ValueError, match="rows=100 must be a positive multiple of 64"):
        dense.contraction(jnp.zeros((100, 64)), jnp.zeros((100, 64)), sizes)
