"""grouped24 by single warps: one launch."""

import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.tiles import Problem
from pallas_kernels.warp import kernel, tiles
from pallas_kernels.warp.tiles import WarpTile


def grouped24(
    problem: Problem,
    values,
    metadata,
    b,
    group_sizes,
    operand=None,
    row_scale=None,
    config: WarpTile | None = None,
    column_scale=None,
):
    """Arguments as in api.py, flattened to matrices and validated there."""
    tiles.check_types(values.dtype.name, b.dtype.name)
    return kernel.matmul(
        values,
        metadata,
        b,
        problem=problem,
        tile=config or tiles.choose(problem),
        num_sms=device.sm_count(),
        groups=group_sizes.astype(jnp.int32),
        operand=operand,
        row_scale=row_scale,
        column_scale=column_scale,
    )
