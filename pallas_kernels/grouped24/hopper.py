"""grouped24 on Hopper: the problem's description, and one launch."""

import jax.numpy as jnp

from pallas_kernels import device, tuned
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.hopper import kernel
from pallas_kernels.tiles import Mode, Problem, TileConfig


def problem(
    mode: Mode,
    groups: int,
    sizes: dict[str, int],
    b_k_major: bool,
    transpose_out: bool,
    dtype: str,
    out_dtype: str,
    epilogue: Epilogue,
) -> Problem:
    """The kernel's description of a grouped product; `sizes` holds m, n and k of all groups together."""
    return Problem(
        m=sizes["m"],
        n=sizes["n"],
        k=sizes["k"],
        mode=mode,
        groups=groups,
        b_k_major=b_k_major,
        transpose_out=transpose_out,
        dtype=dtype,
        out_dtype=out_dtype,
        epilogue=epilogue,
    )


def grouped24(
    problem: Problem, values, metadata, b, group_sizes, operand=None, row_scale=None, config: TileConfig | None = None
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
    )
