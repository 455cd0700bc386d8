"""grouped24 on Hopper: one launch."""

import jax.numpy as jnp

from pallas_kernels import device, tuned
from pallas_kernels.hopper import kernel
from pallas_kernels.tiles import Problem, TileConfig


def grouped24(
    problem: Problem,
    values,
    metadata,
    b,
    group_sizes,
    operand=None,
    row_scale=None,
    config: TileConfig | None = None,
    column_scale=None,
):
    """Arguments as in api.py, flattened to matrices and validated there."""
    return kernel.matmul(
        values,
        metadata,
        b,
        problem=problem,
        config=config or tuned.choose(problem),
        num_sms=device.sm_count(),
        groups=group_sizes.astype(jnp.int32),
        operand=operand,
        row_scale=row_scale,
        column_scale=column_scale,
    )
