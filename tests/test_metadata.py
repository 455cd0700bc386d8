"""Hardware order of the positions: hand-computed words, then the round trip."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.metadata import pack_positions, unpack_positions

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def first_two(rows, columns):
    return np.broadcast_to(np.array([0, 1], np.int32), (rows, columns // 4, 2)).copy()


def test_uniform_positions_fill_every_nibble():
    words = pack_positions(jnp.asarray(first_two(64, 64)))
    np.testing.assert_array_equal(words, np.full((1, 1, 128), 0x44444444, np.uint32))  # 0 | 1 << 2 = 4
    words = pack_positions(jnp.asarray(first_two(64, 64) + 2))
    np.testing.assert_array_equal(words, np.full((1, 1, 128), 0xEEEEEEEE, np.uint32))  # 2 | 3 << 2 = 14


@pytest.mark.parametrize(
    ("row", "column", "tile", "thread", "bit"),
    [
        (0, 0, (0, 0), 0, 0),
        (8, 0, (0, 0), 0, 16),  # the high half word is eight rows down
        (1, 12, (0, 0), 4, 12),  # g = 1; the fourth nibble
        (0, 16, (0, 0), 1, 0),  # h = 1
        (0, 32, (0, 0), 2, 0),  # s = 1: the second k32 step
        (17, 52, (0, 0), 39, 4),  # w = 1, g = 1, s = 1, h = 1, second nibble: thread 32 + 4 + 2 + 1
        (63, 60, (0, 0), 127, 28),
        (64 + 24, 64 + 4, (1, 1), 32, 20),  # w = 1, g = 0, high half, second nibble
    ],
)
def test_one_group_sets_one_nibble(row, column, tile, thread, bit):
    check_one_nibble(row, column, tile, thread, bit, jnp.bfloat16)


@pytest.mark.parametrize(
    ("row", "column", "tile", "thread", "bit"),
    [
        (0, 0, (0, 0), 0, 0),
        (8, 0, (0, 0), 1, 0),  # r = 1
        (1, 28, (0, 0), 4, 28),  # g = 1; the eighth nibble of the same word
        (0, 32, (0, 0), 2, 0),  # h = 1
        (25, 52, (0, 0), 39, 20),  # w = 1, g = 1, r = 1, h = 1, sixth nibble: thread 32 + 4 + 2 + 1
        (63, 60, (0, 0), 127, 28),
        (64 + 24, 64 + 4, (1, 1), 33, 4),
    ],
)
def test_one_group_of_8_bits_sets_one_nibble(row, column, tile, thread, bit):
    check_one_nibble(row, column, tile, thread, bit, jnp.float8_e4m3fn)


def check_one_nibble(row, column, tile, thread, bit, dtype):
    positions = first_two(128, 128)
    positions[row, column // 4] = (1, 3)  # nibble 1 | 3 << 2 = 13
    expected = np.full((2, 2, 128), 0x44444444, np.uint32)
    expected[*tile, thread] ^= np.uint32((4 ^ 13) << bit)
    np.testing.assert_array_equal(pack_positions(jnp.asarray(positions), dtype), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_round_trip_is_exact(dtype):
    rng = np.random.default_rng(0)
    pairs = np.array([(i, j) for i in range(4) for j in range(i + 1, 4)], np.int32)
    positions = pairs[rng.integers(0, 6, (192, 128 // 4))]
    words = pack_positions(jnp.asarray(positions), dtype)
    assert words.dtype == jnp.uint32
    np.testing.assert_array_equal(unpack_positions(words, dtype), positions)


@pytest.mark.parametrize(("rows", "columns"), [(63, 64), (64, 60)])
def test_partial_tiles_are_refused(rows, columns):
    with pytest.raises(ValueError, match=f"{rows} rows and {columns} columns.*multiple of 64"):
        pack_positions(jnp.asarray(first_two(rows, columns)))
