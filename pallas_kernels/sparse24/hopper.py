"""sparse24 on Hopper: pad what the copy engine cannot take, and launch."""

import jax.numpy as jnp

from pallas_kernels import device, tile_order, tuned
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.hopper import kernel
from pallas_kernels.tiles import GRANULE, Problem, TileConfig


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
    config: TileConfig | None = None,
    b_interleaved: bool = False,
    column_scale=None,
    promote: int = 0,
):
    """Arguments as in api.py, validated there.

    The copy engine moves swizzled rows of 64 elements, so the last dimension of each matrix in memory is padded to a
    multiple of 64 where it is none (a copy of that matrix); rows need no padding, reads past the end give zeros. Of 8
    bits rows along k are whole stages already.
    """
    m, n = (values.shape[0] * (1 if values.ndim == 2 else GRANULE)), b.shape[0 if b_k_major else 1]
    columns = tile_order.columns(values.dtype)
    if values.ndim == 2:
        values = _pad(values, values.shape[1], columns // 2)
    b = _pad(b, b.shape[1], GRANULE)
    if operand is not None:
        operand = _pad(operand, operand.shape[1], GRANULE)
    padded_m, padded_n = padded(m, n, transpose_out)
    problem = Problem(
        m=padded_m,
        n=padded_n,
        k=values.shape[1] * (2 if values.ndim == 2 else columns),
        b_k_major=b_k_major,
        transpose_out=transpose_out,
        dtype=values.dtype.name,
        b_type=b.dtype.name if b.dtype != values.dtype else "",
        out_dtype=out_dtype,
        epilogue=epilogue,
        b_interleaved=b_interleaved,
        promote=promote,
    )
    out = kernel.matmul(
        values,
        metadata,
        b,
        problem=problem,
        config=config or tuned.choose(problem),
        num_sms=device.sm_count(),
        operand=operand,
        row_scale=row_scale,
        column_scale=column_scale,
    )
    return out[:n, :m] if transpose_out else out[:m, :n]


def padded(m: int, n: int, transpose_out: bool) -> tuple[int, int]:
    """Sizes of the kernel's problem: what is last in the output is a multiple of 64."""
    return (-(-m // GRANULE) * GRANULE, n) if transpose_out else (m, -(-n // GRANULE) * GRANULE)


def _pad(array, size: int, multiple: int):
    return jnp.pad(array, ((0, 0), (0, -size % multiple))) if size % multiple else array
