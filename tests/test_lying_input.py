"""Metadata and group sizes that lie: no kernel reads or writes outside its arrays, and what comes out is defined.

Group sizes: negative ones count as 0, groups end with the tokens (`pallas_kernels.grouped24.api`).
Metadata: a row tile whose positions are equal or out of order gives numbers of no meaning, but finite for finite
operands; every other row is what it is without the lie.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped24 import api as grouped
from pallas_kernels.pack import api as packing
from pallas_kernels.pack.activations import Packed
from pallas_kernels.schedule import Schedule
from pallas_kernels.sparse24 import sparse24
from pallas_kernels.tiles import Problem, TileConfig
from tests.kernels import bounds
from tests.sanitize import normal, packed

ROWS, GROUPS = 384, 3
CONFIG = TileConfig(64, 64, 2, 1)  # tiles of 128 x 64
PROBLEMS = {
    "rows": Problem(m=ROWS, n=128, k=64, mode="rows", groups=GROUPS),
    "columns": Problem(m=GROUPS * 192, n=ROWS, k=64, mode="columns", groups=GROUPS),
}
EXTREME = (-(2**31), -1, 0, 1, 63, 64, 65, ROWS, 2**30, 2**31 - 64, 2**31 - 1)
SIZES = st.lists(st.one_of(st.sampled_from(EXTREME), st.integers(-(2**31), 2**31 - 1), st.integers(0, ROWS)),
                 min_size=GROUPS, max_size=GROUPS)  # fmt: skip


@functools.cache
def tiles_of(mode: str):
    """sizes -> the number of tiles, and the first of them, one after another as one block would take them."""

    @jax.jit
    def tiles(sizes):
        schedule = Schedule(PROBLEMS[mode], CONFIG, sizes)
        start = schedule.start()
        count = schedule.count()
        _, found = jax.lax.scan(schedule.locate, start, jnp.minimum(jnp.arange(40), count - 1))
        return count, found

    return tiles


@pytest.mark.parametrize("mode", PROBLEMS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=SIZES)
def test_tiles_cover_the_output_once_whatever_the_sizes(mode, sizes):
    """Rows and columns that a tile owns lie inside the output; what it reads starts inside the operands."""
    problem = PROBLEMS[mode]
    count, tiles = jax.device_get(tiles_of(mode)(jnp.asarray(sizes, jnp.int32)))
    assert 0 < count <= 40
    covered = np.zeros(problem.out_shape, int)
    for i in range(count):
        tile = type(tiles)(*(int(np.broadcast_to(field, 40)[i]) for field in tiles))
        rows = slice(tile.out_m, min(tile.out_m + CONFIG.tile_m, tile.m_end))
        columns = slice(tile.out_n, min(tile.out_n + CONFIG.tile_n, tile.n_end))
        assert 0 <= rows.start < rows.stop <= problem.out_shape[0]
        assert 0 <= columns.start < columns.stop <= problem.out_shape[1]
        covered[rows, columns] += 1
        if tile.steps:  # else nothing is read
            group = tile.b_k // problem.k if mode == "rows" else tile.a_row // 192
            first, end = bounds(sizes, ROWS)[group]
            token = rows if mode == "rows" else columns
            assert first <= token.start < token.stop <= end
            assert 0 <= tile.a_row < problem.m
            assert 0 <= tile.b_n < problem.n
    assert (covered == 1).all()


def product(mode: str):
    """A grouped product of fixed operands, as a function of sizes."""
    b = {"rows": (GROUPS, 128, 64), "columns": (128, ROWS), "contraction": (ROWS, 64)}[mode]
    a = {"rows": (ROWS, 128), "columns": (GROUPS * 64, 128), "contraction": (64, ROWS)}[mode]
    return functools.partial(getattr(grouped, mode), *packed(*a), normal(1, *b), out_dtype=jnp.float32)


@functools.cache
def reference(mode: str):
    return jax.jit(functools.partial(product(mode), implementation="reference"))


@pytest.mark.parametrize("mode", ["rows", "columns", "contraction"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=SIZES)
def test_the_reference_takes_lying_sizes_for_what_is_left_of_them(mode, sizes):
    honest = [end - start for start, end in bounds(sizes, ROWS)]
    out = reference(mode)(jnp.asarray(sizes, jnp.int32))
    np.testing.assert_array_equal(out, reference(mode)(jnp.asarray(honest, jnp.int32)))


# -------------------------------------------------------------------------------------------- on a Hopper GPU

LIES = ([2**31 - 1, 64, 64], [-(2**31), 65, 2**30], [300, 300, -5], [2**31 - 64, 2**31 - 1, 2**31 - 1], [0, 0, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", LIES, ids=str)
@pytest.mark.parametrize("mode", ["rows", "columns", "contraction"])
def test_lying_sizes_on_the_gpu(mode, sizes):
    honest = jnp.asarray([end - start for start, end in bounds(sizes, ROWS)], jnp.int32)
    kernel = functools.partial(product(mode), implementation="hopper")
    out = np.asarray(kernel(jnp.asarray(sizes, jnp.int32)))
    np.testing.assert_array_equal(out, np.asarray(kernel(honest)))
    np.testing.assert_allclose(out, reference(mode)(honest), rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
def test_lying_metadata_reaches_its_own_rows_only():
    values, metadata = packed(192, 256)
    lies = metadata.at[1].set(packed(192, 256, honest=False)[1][1])  # rows 64 to 127
    b = normal(1, 256, 136)
    clean, out = (np.asarray(sparse24(values, words, b, implementation="hopper")) for words in (metadata, lies))
    np.testing.assert_array_equal(np.delete(out, range(64, 128), 0), np.delete(clean, range(64, 128), 0))
    bound = np.abs(np.asarray(values, np.float32)).sum(1, keepdims=True) * np.abs(np.asarray(b, np.float32)).max()
    assert (np.abs(out.astype(np.float32)) <= 1.01 * bound).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["sparse24", *("rows", "columns", "contraction"), "take"])
def test_nothing_is_written_outside_the_output(kernel):
    """The output is made to lie between two arrays of known content, on either side without a gap."""
    dirty = functools.partial(packed, honest=False)
    sizes = jnp.asarray([2**31 - 1, 65, -7], jnp.int32)
    work = {
        "sparse24": lambda: sparse24(*dirty(ROWS, 256), normal(1, 256, 256), implementation="hopper"),
        "rows": lambda: grouped.rows(
            *dirty(ROWS, 128), normal(1, GROUPS, 128, 256), sizes, implementation="hopper"
        ),
        "columns": lambda: grouped.columns(
            *dirty(GROUPS * 256, 128), normal(1, 128, ROWS), sizes, implementation="hopper"
        ),
        "contraction": lambda: grouped.contraction(
            *dirty(256, ROWS), normal(1, ROWS, 256), sizes, implementation="hopper"
        ),
        "take": lambda: jax.tree.leaves(packing.take_activations(
            normal(1, ROWS, 256), Packed(*dirty(ROWS, 256, tiles=True)), None, interleaved=True,
            implementation="hopper",
        ))[0],
    }[kernel]  # fmt: skip
    run = jax.jit(work)
    shape = jax.eval_shape(run)
    size = shape.size * shape.dtype.itemsize
    jax.block_until_ready(run())
    # The allocator gives equal sizes out one after another; every other one is given back, and the output takes one.
    guards = [jnp.full(size // 4, 0x5EED0000 + i, jnp.int32) for i in range(64)]
    jax.block_until_ready(guards)
    for i in range(33, 63, 2):  # the first ones may lie in what was left over elsewhere
        guards[i].delete()
    outputs = jax.block_until_ready([run() for _ in range(12)])  # what a run needs besides may take a hole too
    kept = {guard.unsafe_buffer_pointer(): (i, guard) for i, guard in enumerate(guards) if not guard.is_deleted()}
    between = [
        {address - size, address + size} <= kept.keys() for address in (out.unsafe_buffer_pointer() for out in outputs)
    ]
    assert any(between), "no output lies between two guards"
    for i, guard in kept.values():
        assert (np.asarray(guard) == 0x5EED0000 + i).all()
