"""V:N:M products on Hopper: pad the output to what the copy engine can store, choose a tile, and launch."""

from pallas_kernels import device
from pallas_kernels.hopper import kernel
from pallas_kernels.tiles import GRANULE, Problem, TileConfig

_TALL = 1 << 10
"""Tiles down a strip of columns: the strip of B that all multiprocessors gather from stays in L2."""
TILES = {
    64: TileConfig(64, 128, 1, 2, stages=5, store_slots=1, raster_m=_TALL, raster_n=1),
    128: TileConfig(64, 256, 2, 1, stages=5, store_slots=1, raster_m=_TALL, raster_n=1),
    256: TileConfig(128, 128, 2, 1, stages=5, store_slots=1, raster_m=_TALL, raster_n=1),
}
"""The tile for each v: those that ran on a GPU; `python -m pallas_kernels.measure.vnm --search` times others."""


def vnm(values, metadata, columns, b, transpose_out: bool, out_dtype: str, config: TileConfig | None = None):
    """Arguments as in api.py, validated there.

    The copy engine stores rows of 64 elements, so the output's last dimension is padded and cut off again where it is
    no multiple of 64; B is read as it is.
    """
    rows, n = values.shape[0] * GRANULE, b.shape[1]
    problem = problem_of(
        rows, n, values.shape[1] * GRANULE, rows // columns.shape[0], b.dtype.name, out_dtype, transpose_out
    )
    out = kernel.matmul(
        values,
        metadata,
        b,
        problem=problem,
        config=config or choose(problem),
        num_sms=device.sm_count(),
        columns=columns,
    )
    return out[:n] if transpose_out else out[:, :n]


def problem_of(
    rows: int, n: int, compressed: int, v: int, dtype="bfloat16", out_dtype="bfloat16", transpose_out=False
) -> Problem:
    """The kernel's description of a product with a stored matrix [rows, compressed]."""
    return Problem(
        m=rows,
        n=n if transpose_out else -(-n // GRANULE) * GRANULE,
        k=compressed,
        transpose_out=transpose_out,
        dtype=dtype,
        out_dtype=out_dtype,
        v=v,
    )


def choose(problem: Problem) -> TileConfig:
    """The tile for a problem."""
    return TILES[problem.v]
