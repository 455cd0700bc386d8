"""out = A B and out = A^T B, A V:N:M sparse: validate, choose the implementation, run it."""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.array_types import Array, Float, Int, Metadata, accumulator
from pallas_kernels.sparse24 import dense_wins, sparse24
from pallas_kernels.tiles import GRANULE, TileConfig
from pallas_kernels.vnm import hopper, reference
from pallas_kernels.vnm.shapes import BLOCK_ROWS

Form = Literal["vnm", "sparse24", "dense"]


def vnm(
    values: Float[Array, "R_64 K_64 8 256"],
    metadata: Metadata,
    columns: Int[Array, "blocks K"],
    b: Float[Array, "_k _n"],
    *,
    as_24: tuple[Float[Array, "..."], Metadata] | None = None,
    transpose_out: bool = False,
    out_dtype=None,
    implementation: dispatch.Implementation | None = None,
    config: TileConfig | None = None,
) -> Float[Array, "_R _n"]:
    """out[r, n] = sum_j A[r, j] b[columns[block of r, j], n], accumulated in f32; A is the compressed matrix [R, K].

    A position that is not stored is never multiplied on the hardware, and a row of b that no block names is never
    read. The kernel reads zeros for an index outside 0 .. k - 1, whatever it is: the padding's index, k, relies on it.

    Args:
      values, metadata: the compressed matrix in tiles, 2:4 along its K columns (`tile_order`, `metadata`).
      columns: the row of b for each compressed column, one list for each R / blocks = 64, 128 or 256 rows.
      b: [k, n], n a multiple of 8, in values' dtype.
      as_24: values and metadata of the same matrix as plain 2:4 [R, k], where the caller keeps both; taken on a
        Hopper GPU where `best_form` says so.
      transpose_out: give out^T [n, R].
      out_dtype: bfloat16, float16 or float32; None is b's.
      implementation: "reference", "hopper", or None to choose by device and, on Hopper, by `best_form`.
      config: a tile to use instead of the chosen one (hopper).

    Returns:
      out [R, n], or [n, R]; R with the padding of the stored matrix.

    Raises:
      ValueError: shapes or dtypes that do not belong together.
      NotImplementedError: the named implementation does not take this device or these dtypes.
    """
    chosen = dispatch.resolve(implementation)
    rows, compressed = _check(values, metadata, columns, b)
    k, n = b.shape
    dispatch.check_multiple(8, n=n)
    out_dtype = jnp.dtype(b.dtype if out_dtype is None else out_dtype)
    if chosen == "hopper":
        dispatch.check_kernel_dtypes(b.dtype, out_dtype)
        v = rows // columns.shape[0]
        form: Form = "vnm"
        if implementation is None and config is None:
            form = best_form(rows, n, k, v=v, compressed=compressed, has_24=as_24 is not None)
        if form == "vnm":
            return hopper.vnm(values, metadata, columns, b, transpose_out, out_dtype.name, config)
        if form == "sparse24" and as_24 is not None:
            return sparse24(*as_24, b, transpose_out=transpose_out, out_dtype=out_dtype, implementation="hopper")
        a = reference.to_dense(values, metadata, columns, k)
        out = jnp.dot(a, b, preferred_element_type=jnp.float32)
    else:
        out = reference.vnm(values, metadata, columns, b, out_dtype=accumulator(b.dtype))
    return (out.T if transpose_out else out).astype(out_dtype)


def vnm_transposed(
    values: Float[Array, "R_64 K_64 8 256"],
    metadata: Metadata,
    columns: Int[Array, "blocks K"],
    b: Float[Array, "_R _n"],
    num_columns: int,
    *,
    out_dtype=None,
) -> Float[Array, "_k _n"]:
    """out[k, n] = sum_r A[r, k] b[r, n] for A [R, k = num_columns], accumulated in f32: the gradient of b.

    Exact: it multiplies by every stored entry and by nothing else. It is a dense product of the unpacked matrix on
    every device: A^T is not 2:4 along R, so the sparse tensor core cannot take it, and what column sparsity could
    still save (m / 4 of the work) would end in adding the blocks' rows up.

    Raises:
      ValueError: shapes or dtypes that do not belong together.
    """
    rows, _ = _check(values, metadata, columns, b)
    if b.shape[0] != rows:
        raise ValueError(f"b {list(b.shape)} has {b.shape[0]} rows; the stored matrix has {rows}, padding included")
    out_dtype = jnp.dtype(b.dtype if out_dtype is None else out_dtype)
    if dispatch.resolve(None) == "reference":
        return reference.transposed(values, metadata, columns, b, num_columns, out_dtype=out_dtype)
    a = reference.to_dense(values, metadata, columns, num_columns)
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32).astype(out_dtype)


def best_form(m: int, n: int, k: int, *, v: int, compressed: int, has_24: bool = False) -> Form:
    """The fastest way to multiply a V:N:M matrix [m, k] of `compressed` stored columns with b [k, n] on an H100.

    Where the product is so small that XLA's dense one beats plain 2:4 (`sparse24.dense_wins`), dense. Otherwise the
    V:N:M kernel, unless the caller has plain 2:4 too and that is predicted to be faster: the V:N:M kernel takes
    compressed / k of its stages, each of which costs `_COST` times as much.
    """
    if dense_wins(m, n, k):
        return "dense"
    cost = compressed * _COST[v]
    return "sparse24" if has_24 and k <= cost else "vnm"


_COST = {64: 2.7, 128: 1.7, 256: 1.7}
"""Time of the V:N:M kernel for a stage over that of plain 2:4, by v.

From docs/results/h100/vnm.json, (16384, 4096, 4096): M = 8 and 16 give 2.7 and 2.7 at v = 64, 1.65 and 1.75 at v = 128.
v = 256 was not timed; it is taken to cost what v = 128 does.
"""


def _check(values: Array, metadata: Array, columns: Array, b: Array) -> tuple[int, int]:
    """Rows and columns of the compressed matrix, if everything belongs together."""
    if values.ndim != 4:
        raise ValueError(
            f"values are {values.dtype}{list(values.shape)}; want tiles [R/64, K/64, 8, 256] (tile_order.py)"
        )
    dispatch.refuse_fp8(
        b.dtype,
        "a V:N:M product",
        "it gathers rows of b [k, n], and of 8 bits the tensor core reads b along k. Use bfloat16, or sparse24 with "
        "the columns of b [n, k] gathered before",
    )
    rows, compressed = dispatch.check_packed(values, metadata, b)
    if columns.ndim != 2 or columns.shape[1] != compressed or columns.dtype != jnp.int32:
        raise ValueError(
            f"columns are {columns.dtype}{list(columns.shape)}; values {list(values.shape)} take "
            f"int32[blocks, {compressed}]"
        )
    blocks = columns.shape[0]
    if not blocks or rows % blocks or rows // blocks not in BLOCK_ROWS:
        raise ValueError(
            f"{rows} rows in {blocks} blocks: a block has {', '.join(map(str, BLOCK_ROWS))} rows "
            f"(R padded to a multiple of it, and of {GRANULE})"
        )
    return rows, compressed
