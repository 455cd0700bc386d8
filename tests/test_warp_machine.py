"""The warp kernel's threads in numpy: addresses, order and barriers, bank conflicts, and results to the bit."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.epilogue import Epilogue, apply
from pallas_kernels.metadata import pack_positions
from pallas_kernels.pack.reference import decompress24
from pallas_kernels.tile_order import to_tiles
from pallas_kernels.tiles import Problem
from pallas_kernels.warp.copies import Layout, Place
from pallas_kernels.warp.main_loop import Warp
from pallas_kernels.warp.result import Region, Result
from pallas_kernels.warp.tiles import WarpTile
from tests.warp_machine import NumpyMachine

SMALL, WIDE = WarpTile(2, 2, stages=2, ahead=2), WarpTile(4, 2, stages=3)
PAIRS = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])


@dataclasses.dataclass
class Product:
    """Operands of small integers, so that sums are exact in any order, and the tiles of one block."""

    problem: Problem
    in_rows: bool = False
    tile: WarpTile = SMALL
    tiles: list[tuple[tuple[int, int, int, int], tuple[int, int, int, int], int]] = dataclasses.field(
        default_factory=list
    )
    """(a_row, a_k, b_k, b_n), (m, n, m_end, n_end), stages: as `schedule.Tile` names them."""

    def arrays(self):
        p, rng = self.problem, np.random.default_rng(0)
        positions = jnp.asarray(PAIRS[rng.integers(0, 6, (p.m, p.k // 4))])
        values = jnp.asarray(rng.integers(-2, 3, (p.m, p.k // 2)), p.dtype)
        rows = -p.m % 64
        padded = jnp.pad(positions, ((0, rows), (0, 0), (0, 0))).at[p.m :, :, 1].set(1)
        b = jnp.asarray(rng.integers(-2, 3, (p.k * (p.groups if p.mode == "rows" else 1), p.n)), p.dtype)
        arrays = {"values": values if self.in_rows else to_tiles(values), "metadata": pack_positions(padded)}
        arrays["b"] = b.T if p.b_k_major else b
        if p.v:  # one beyond the rows of b, and any other such index, stands for a row of zeros
            arrays["columns"] = jnp.asarray(rng.integers(0, p.k + 3, (p.m // p.v, p.k)), jnp.int32)
        extra = max(self.tile.tile_m, self.tile.tile_n)
        arrays["row_scale"] = jnp.asarray(rng.integers(1, 3, p.out_shape[p.transpose_out] + extra), jnp.float32)
        arrays["operand"] = jnp.asarray(rng.integers(-2, 3, p.out_shape), p.out_dtype)
        arrays["out"] = jnp.full(p.out_shape, -77, p.out_dtype)
        return decompress24(values, positions), b, {name: np.asarray(array) for name, array in arrays.items()}

    def run(self, late: bool):
        """The output and the operands in plain form."""
        p, c = self.problem, self.tile
        assert c.violation(p) is None
        a, b, arrays = self.arrays()
        m = NumpyMachine(c.threads, c.smem_bytes, arrays, p.dtype, p.out_dtype, late=late)
        layout = Layout(p, c, self.in_rows, p.m, p.n, b.shape[0])
        warp, step, filled = Warp(m, layout), 0, 0
        for (place, region, steps), following in zip(self.tiles, [*self.tiles[1:], None], strict=True):
            prefetch = int(following is not None and steps >= c.stages)
            here, there = ((*t[0], t[2]) for t in ((place, region, steps), following or (place, region, steps)))
            slot = step % c.stages * c.stage_bytes
            words = [m.constant(value) for value in (*here, *there, *region, region[0], slot)]
            sums = warp.multiply(
                Place(*words[:5]), Place(*words[5:10]), words[15], m.constant(filled), m.constant(prefetch)
            )
            Result(warp, Region(*words[10:15])).store(sums)
            step, filled = step + steps, prefetch
        assert not +m.conflicts
        return m.array("out"), np.asarray(a, np.float64), np.asarray(b, np.float64), arrays


def check(product: Product, expected, late: bool):
    """expected(a, b): the sums, not transposed; NaN where nothing is to be written."""
    p = product.problem
    out, a, b, arrays = product.run(late)
    sums = jnp.asarray(expected(a, b), jnp.float32)
    want = apply(
        p.epilogue,
        sums.T if p.transpose_out else sums,
        jnp.asarray(arrays["operand"]) if p.epilogue.operand else None,
        jnp.asarray(arrays["row_scale"])[: sums.shape[0]] if p.epilogue.row_scale else None,
        row_axis=1 if p.transpose_out else 0,
        out_dtype=p.out_dtype,
    )
    want = np.where(np.isnan(np.asarray(want, np.float32)), -77, np.asarray(want, np.float32))
    np.testing.assert_array_equal(np.asarray(out, np.float32), want)


def whole(m: int, n: int, k: int, tile: WarpTile):
    return [((i, 0, 0, j), (i, j, m, n), k // 64) for i in range(0, m, tile.tile_m) for j in range(0, n, tile.tile_n)]


def dense(m, n, k, *, in_rows=False, tile=SMALL, **options):
    return Product(Problem(m, n, k, **options), in_rows, tile, whole(m, n, k, tile))


DENSE = {
    "several tiles": dense(256, 128, 192),
    "ragged, k-major, in rows": dense(136, 200, 128, b_k_major=True, in_rows=True),
    "fewer stages than the ring has": dense(128, 192, 64),
    "wide": dense(320, 128, 256, tile=WIDE, b_k_major=True),
    "transposed float16": dense(192, 192, 128, transpose_out=True, dtype="float16", out_dtype="float16"),
    "f32": dense(128, 136, 128, out_dtype="float32", epilogue=Epilogue("relu2", "add", True, 0.5)),
    "f32 transposed": dense(
        136, 128, 128, out_dtype="float32", transpose_out=True, epilogue=Epilogue(operand="add", row_scale=True)
    ),
    "operand": dense(192, 128, 128, epilogue=Epilogue("relu", "multiply", alpha=2.0)),
    "operand transposed": dense(136, 192, 128, transpose_out=True, epilogue=Epilogue(None, "multiply", True)),
    "interleaved": dense(128, 192, 192, b_interleaved=True),
}


@pytest.mark.parametrize(("name", "late"), [*((name, True) for name in DENSE), ("wide", False), ("operand", False)])
def test_whole_products(name, late):
    product = DENSE[name]
    k = product.problem.k
    rows = np.arange(k) % 4 * (k // 4) + np.arange(k) // 4 if product.problem.b_interleaved else np.arange(k)
    check(product, lambda a, b: a @ b[rows], late)


@pytest.mark.parametrize(
    ("v", "tile"), [(64, WarpTile(1, 4, stages=2)), (128, SMALL), (128, WarpTile(2, 2, stages=3, ahead=5))]
)
def test_gathered_rows(v, tile):
    m, n, k = 2 * v, 136, 192
    product = dense(m, n, k, tile=tile, v=v)
    _, _, arrays = product.arrays()

    def expected(a, b):
        rows = np.concatenate([b, np.zeros((3, n))])[arrays["columns"]]
        return np.concatenate([a[i * v : (i + 1) * v] @ rows[i] for i in range(2)])

    check(product, expected, late=True)


def test_groups_of_rows():
    """A group of 64 rows, one of 192, and 64 rows of none; B of one group under another."""
    problem = Problem(320, 128, 128, mode="rows", groups=2)
    tiles = [
        ((0, 0, 0, 0), (0, 0, 64, 128), 2),
        ((64, 0, 128, 0), (64, 0, 256, 128), 2),
        ((192, 0, 128, 0), (192, 0, 256, 128), 2),
        ((256, 0, 256, 0), (256, 0, 320, 128), 0),
    ]

    def expected(a, b):
        return np.concatenate([a[:64] @ b[:128], a[64:256] @ b[128:], np.zeros((64, 128))])

    check(Product(problem, tiles=tiles), expected, late=True)


def test_groups_of_columns():
    problem = Problem(256, 192, 64, mode="columns", groups=2, b_k_major=True, transpose_out=True)
    tiles = [((0, 0, 0, 0), (0, 0, 128, 64), 1), ((128, 0, 0, 64), (0, 64, 128, 192), 1)]

    def expected(a, b):
        return np.concatenate([a[:128] @ b[:, :64], a[128:] @ b[:, 64:]], 1)

    check(Product(problem, tiles=tiles), expected, late=True)


def test_groups_of_the_contraction():
    """Groups of three, no and two stages, the largest first; then a round's gap, which writes nothing."""
    problem = Problem(128, 128, 320, mode="contraction", groups=3, out_dtype="float32")
    tiles = [
        ((0, 0, 0, 0), (0, 0, 128, 128), 3),
        ((0, 192, 192, 0), (256, 0, 384, 128), 2),
        ((0, 192, 192, 0), (128, 0, 256, 128), 0),
        ((0, 0, 0, 0), (0, 0, 0, 128), 0),
    ]

    def expected(a, b):
        return np.concatenate([a[:, :192] @ b[:192], np.zeros((128, 128)), a[:, 192:] @ b[192:]])

    check(Product(problem, tile=WarpTile(2, 2, stages=3), tiles=tiles), expected, late=False)
