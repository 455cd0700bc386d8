"""Choosing two of four: against brute force, at every corner of floating point."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pack import reference as pack
from tests import brute_force

pytestmark = pytest.mark.usefixtures("strict_dtypes")

inf, nan = np.inf, np.nan

# Few distinct values: ties, zeros of both signs and non-finite entries meet in every combination.
corner_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -3.5, 1e-40, inf, -inf, nan])
corner_matrices = hnp.arrays(np.float32, (8, 16), elements=corner_values)
# One shape, so that everything compiles once; values are what varies.
examples = hypothesis.settings(max_examples=60, deadline=None)

select24, soft_threshold, mask_of = (
    jax.jit(f, static_argnums=1) for f in (pack.select24, pack.soft_threshold, pack.soft_threshold_mask)
)


@examples
@hypothesis.given(corner_matrices)
def test_select24_agrees_with_sorting(a):
    expected = brute_force.along(brute_force.keep_two, a, 1)
    np.testing.assert_array_equal(select24(jnp.asarray(a), 1), expected)
    np.testing.assert_array_equal(select24(jnp.asarray(a.T), 0), expected.T)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_select24_ties_in_every_dtype(dtype):
    a = jnp.array([[1, 1, 1, 1], [-0.0, 0.0, -0.0, 0.0], [1, -2, 2, -1], [nan, inf, nan, 1]], dtype)
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0]]
    np.testing.assert_array_equal(select24(a, 1), np.array(expected, bool))


@pytest.mark.parametrize(
    ("four", "expected"),
    [
        ([1, -2, 3, -4], [0, 0, 1, -2]),
        ([5, 0, 0, -7], [5, 0, 0, -7]),  # already 2:4: t = 0, nothing changes
        ([2, 2, 2, 2], [0, 0, 0, 0]),
        ([-3, 3, 3, 1], [0, 0, 0, 0]),  # t = 3
        ([0, 0, 0, 4], [0, 0, 0, 4]),
        ([-0.0, 0.0, -0.0, 0.0], [0, 0, 0, 0]),
        ([inf, 1, 2, 3], [inf, 0, 0, 1]),
        ([-inf, 1, 2, inf], [-inf, 0, 0, inf]),
        ([inf, -inf, inf, 1], [0, 0, 0, 0]),  # t = inf: three equals; inf - inf is never formed
        ([nan, 1, 2, 3], [nan, 0, 0, 1]),
        ([nan, nan, nan, inf], [nan, nan, 0, 0]),
        ([nan, nan, nan, nan], [nan, nan, 0, 0]),
    ],
)
def test_soft_threshold_by_hand(four, expected):
    out = np.asarray(soft_threshold(jnp.array([four], jnp.float32), 1))[0]
    np.testing.assert_array_equal(out, np.array(expected, np.float32))
    assert not np.signbit(out[out == 0]).any(), "zeros are +0.0"


@examples
@hypothesis.given(hnp.arrays(np.float32, (8, 16), elements=st.floats(-1e3, 1e3, width=32)))
def test_soft_threshold_agrees_with_sorting(a):
    expected = brute_force.along(brute_force.soft_threshold, a.astype(np.float64), 1)
    out = soft_threshold(jnp.asarray(a), 1)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-30)
    np.testing.assert_array_equal(mask_of(jnp.asarray(a), 1), expected != 0)
    assert (np.count_nonzero(np.asarray(out).reshape(8, 4, 4), axis=-1) <= 2).all()


@examples
@hypothesis.given(corner_matrices)
def test_pack_and_unpack_are_inverse_to_the_bit(a):
    mask = select24(jnp.asarray(a), 1)
    values, positions = jax.jit(pack.compress24)(jnp.asarray(a), mask)
    assert (positions[..., 0] < positions[..., 1]).all()
    dense = np.asarray(jax.jit(pack.decompress24)(values, positions))
    expected = np.where(mask, a, np.float32(0))
    np.testing.assert_array_equal(dense.view(np.uint32), expected.view(np.uint32))


def test_keep_densest_opens_the_densest_features_of_each_group():
    mask = jnp.zeros((3, 4), bool)
    density = jnp.array([[0.1, 0.5, 0.5, 0.2], [0.9, 0.0, 0.0, 0.0]])
    opened = pack.keep_densest(mask, density, jnp.array([0, 1, 0]), 1)
    np.testing.assert_array_equal(opened, [[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(pack.keep_densest(mask, density, jnp.array([0, 1, 0]), 0), mask)


def test_lengths_that_are_no_multiple_of_four_are_refused():
    with pytest.raises(ValueError, match=r"axis 1 of shape \(2, 6\) is no multiple of 4"):
        pack.select24(jnp.zeros((2, 6)), 1)
