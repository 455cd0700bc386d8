"""The casting kernels on Hopper: blocks.py through the machine of the packing kernels."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cast8 import blocks
from pallas_kernels.cast8.blocks import Rows
from pallas_kernels.cast8.reference import E4M3, Both, Cast, gradient_factor, inverse, largest, scale_of
from pallas_kernels.pack import hopper
from pallas_kernels.pack.blocks import Matrix
from pallas_kernels.tiles import GRANULE


def by_row(x: jax.Array) -> Cast:
    """As `reference.by_row`, of what `takes_rows`: one read, one row a block."""
    rows = Rows(x.shape[0], x.shape[1], x.dtype.itemsize)
    out = {"values": jax.ShapeDtypeStruct(x.shape, E4M3), "scale": jax.ShapeDtypeStruct((rows.count,), jnp.float32)}
    body = functools.partial(blocks.by_row, rows=rows)
    return Cast(**hopper.launch(body, rows.count, jnp.bfloat16, {"x": x}, out, shared=1))


def by_column(x: jax.Array, *, interleaved: bool) -> Cast:
    """As `reference.by_column`, of what `takes_blocks`: XLA's pass for the scales, then one of casts."""
    return _over(x, scale_of(largest(x, 0)), interleaved)


def both_ways(x: jax.Array, *, interleaved: bool) -> tuple[Cast, Cast]:
    """As `by_row` and `by_column` of bf16, reading x twice: the first pass finds the scales of the second."""
    rows = Rows(x.shape[0], x.shape[1], x.dtype.itemsize)
    strips = -(-rows.count // blocks.STRIP)
    out = {
        "values": jax.ShapeDtypeStruct(x.shape, E4M3),
        "scale": jax.ShapeDtypeStruct((rows.count,), jnp.float32),
        "maxima": jax.ShapeDtypeStruct((strips, rows.columns), x.dtype),
    }
    body = functools.partial(blocks.by_row_and_maxima, rows=rows)
    found = hopper.launch(body, strips, x.dtype, {"x": x}, out, shared=1)
    return Cast(found["values"], found["scale"]), _over(x, scale_of(largest(found["maxima"], 0)), interleaved)


def _over(x: jax.Array, scale: jax.Array, interleaved: bool) -> Cast:
    arrays = {"x": x, "factor": hopper.bf16(inverse(scale))}
    matrix = Matrix(x.shape[0], x.shape[1], interleaved, x.dtype.itemsize)
    shared = x.dtype.itemsize // 2
    return Cast(_launch(blocks.by_column, matrix, arrays, ("columns",), shared=shared)["columns"], scale)


def fold(a: Cast, factor: jax.Array) -> Cast:
    """As `reference.fold`."""
    scales = factor * a.scale
    scale = largest(scales, 0)
    arrays = {"a": a.values, "factor": hopper.bf16(scales * inverse(scale))}
    return Cast(_launch(blocks.fold, _matrix(a.values), arrays, ("columns",))["columns"], scale)


def activate(y: jax.Array, scale: jax.Array) -> Both:
    """As `reference.activate`."""
    arrays = {"y": y, "factor": hopper.bf16(inverse(scale))}
    return Both(**_launch(blocks.activate, _matrix(y), arrays, ("rows", "columns")))


def differentiate(dy2: jax.Array, squared: jax.Array, squared_scale: jax.Array, scale: jax.Array) -> Both:
    """As `reference.differentiate`."""
    arrays = {"y": dy2, "squared": squared, "factor": hopper.bf16(gradient_factor(squared_scale, scale))}
    return Both(**_launch(blocks.differentiate, _matrix(dy2), arrays, ("rows", "columns"), shared=2))


def takes_rows(x: jax.Array) -> bool:
    """Whether `by_row` takes an array."""
    return x.dtype in (jnp.bfloat16, jnp.float32) and 0 < x.shape[1] <= blocks.MAX_COLUMNS and not x.shape[1] % 16


def takes_blocks(x: jax.Array, *types) -> bool:
    """Whether the other kernels take an array of one of these types."""
    return x.dtype in types and not any(size % GRANULE or size == 0 for size in x.shape)


def _matrix(x: jax.Array) -> Matrix:
    return Matrix(x.shape[0], x.shape[1])


def _launch(body, matrix: Matrix, arrays: dict, names: tuple[str, ...], *, shared: int = 1) -> dict[str, jax.Array]:
    shapes = {"rows": (matrix.rows, matrix.columns), "columns": (matrix.columns, matrix.rows)}
    out = {name: jax.ShapeDtypeStruct(shapes[name], E4M3) for name in names}
    body = functools.partial(body, matrix=matrix)
    return hopper.launch(body, matrix.blocks, jnp.bfloat16, arrays, out, shared=shared)
