"""Sparse24: exact round trips, the product with the identity, and what validate refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pack import reference as pack
from pallas_kernels.sparse24.reference import sparse24
from pallas_kernels.tile_order import from_tiles
from tests.helpers import assert_close
from venom_jax import Sparse24

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def random24(shape, axis, dtype=jnp.float32, seed=0):
    a = jax.random.normal(jax.random.key(seed), shape, dtype)
    return jnp.where(pack.select24(a, axis), a, jnp.zeros((), dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), [((64, 64), 1), ((100, 72), 1), ((72, 100), 0), ((4, 1), 0), ((1, 260), 1)])
def test_round_trip_is_exact(shape, axis, dtype):
    a = random24(shape, axis, dtype)
    packed = Sparse24.pack(a, axis)
    packed.validate()
    np.testing.assert_array_equal(packed.to_dense(), a)
    assert packed.to_dense().dtype == dtype


def test_packing_prunes_by_magnitude():
    a = jax.random.normal(jax.random.key(1), (64, 128))
    np.testing.assert_array_equal(Sparse24.pack(a, 1).to_dense(), jnp.where(pack.select24(a, 1), a, 0.0))


def test_product_with_the_identity_returns_the_matrix():
    a = random24((64, 128), 1)
    packed = Sparse24.pack(a, 1)
    np.testing.assert_array_equal(sparse24(from_tiles(packed.values), packed.metadata, jnp.eye(128)), a)


def test_product_agrees_with_dense():
    a = random24((128, 192), 1)
    b = jax.random.normal(jax.random.key(2), (192, 40))
    packed = Sparse24.pack(a, 1)
    expected = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    assert_close(sparse24(from_tiles(packed.values), packed.metadata, b), expected)


def test_is_a_pytree():
    packed = Sparse24.pack(random24((64, 64), 1), 1)
    doubled = jax.jit(lambda p: jax.tree.map(lambda t: t, p))(packed)
    assert doubled.shape == (64, 64)
    assert doubled.axis == 1
    stacked = jax.vmap(lambda a: Sparse24.pack(a, 1))(jnp.stack([random24((64, 64), 1, seed=i) for i in range(3)]))
    assert stacked.values.shape == (3, 1, 1, 8, 256)


def test_validate_names_what_is_wrong():
    packed = Sparse24.pack(random24((64, 64), 1), 1)
    with pytest.raises(ValueError, match=r"values of shape \(1, 1, 8, 256\).*needs \(2, 1, 8, 256\)"):
        dataclasses.replace(packed, shape=(65, 64)).validate()
    with pytest.raises(ValueError, match=r"metadata of shape \(1, 2, 64\)"):
        dataclasses.replace(packed, metadata=packed.metadata.reshape(1, 2, 64)).validate()
    swapped = packed.metadata.at[0, 0, 4].set(jnp.uint32(0x44444441))  # first nibble: positions (1, 0)
    with pytest.raises(ValueError, match=r"group 0 of row 1 stores positions \(1, 0\)"):
        dataclasses.replace(packed, metadata=swapped).validate()


@pytest.mark.parametrize(("shape", "axis"), [((64, 6), 1), ((6, 64), 0)])
def test_length_that_is_no_multiple_of_four_is_refused(shape, axis):
    with pytest.raises(ValueError, match="no multiple of 4"):
        Sparse24.pack(jnp.zeros(shape), axis)


def test_axis_must_exist():
    with pytest.raises(ValueError, match="axis 0 or 1"):
        Sparse24.pack(jnp.zeros((4, 4)), 2)
