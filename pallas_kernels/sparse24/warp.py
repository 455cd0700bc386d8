"""sparse24 by single warps: pad the contraction to whole stages, and launch."""

import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.tiles import GRANULE, TILE_K, Problem
from pallas_kernels.warp import kernel, tiles
from pallas_kernels.warp.tiles import WarpTile


def sparse24(
    values,
    metadata,
    b,
    b_k_major: bool,
    transpose_out: bool,
    out_dtype: str,
    epilogue: Epilogue,
    operand=None,
    row_scale=None,
    config: WarpTile | None = None,
    b_interleaved: bool = False,
    column_scale=None,
    promote: int = 0,
):
    """Arguments as in api.py, validated there.

    A stage is 64 logical columns: a contraction that is no multiple of it is padded with zeros, a copy of the operands.
    """
    del promote  # of 8 bits only
    tiles.check_types(values.dtype.name, b.dtype.name)
    in_rows = values.ndim == 2
    m, n = values.shape[0] * (1 if in_rows else GRANULE), b.shape[0 if b_k_major else 1]
    k = values.shape[1] * (2 if in_rows else GRANULE)
    b_axis = 1 if b_k_major else 0
    if in_rows and k % TILE_K:
        values = jnp.pad(values, ((0, 0), (0, -k % TILE_K // 2)))
        k += -k % TILE_K
    if b.shape[b_axis] != k:
        b = jnp.pad(b, [(0, k - b.shape[axis] if axis == b_axis else 0) for axis in range(2)])
    problem = Problem(
        m=m,
        n=n,
        k=k,
        b_k_major=b_k_major,
        transpose_out=transpose_out,
        dtype=b.dtype.name,
        out_dtype=out_dtype,
        epilogue=epilogue,
        b_interleaved=b_interleaved,
    )
    return kernel.matmul(
        values,
        metadata,
        b,
        problem=problem,
        tile=config or tiles.choose(problem),
        num_sms=device.sm_count(),
        operand=operand,
        row_scale=row_scale,
        column_scale=column_scale,
    )
