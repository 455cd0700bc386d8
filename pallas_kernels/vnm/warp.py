"""V:N:M products by single warps: choose a tile, and launch."""

import dataclasses

from pallas_kernels import device
from pallas_kernels.tiles import GRANULE
from pallas_kernels.vnm.hopper import problem_of
from pallas_kernels.warp import kernel, tiles
from pallas_kernels.warp.tiles import WarpTile


def vnm(values, metadata, columns, b, transpose_out: bool, out_dtype: str, config: WarpTile | None = None):
    """Arguments as in api.py, validated there."""
    tiles.check_types(values.dtype.name, b.dtype.name)
    rows, n = values.shape[0] * GRANULE, b.shape[1]
    problem = problem_of(
        rows, n, values.shape[1] * GRANULE, rows // columns.shape[0], b.dtype.name, out_dtype, transpose_out
    )
    problem = dataclasses.replace(problem, n=n)  # no copy engine, no padding
    return kernel.matmul(
        values,
        metadata,
        b,
        problem=problem,
        tile=config or tiles.choose(problem),
        num_sms=device.sm_count(),
        columns=columns,
    )
