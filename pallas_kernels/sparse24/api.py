"""out = epilogue(A B), A 2:4 sparse along k: validate, choose the implementation, run it."""

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.array_types import Array, Float, Metadata, accumulator
from pallas_kernels.epilogue import Epilogue, apply
from pallas_kernels.metadata import TILE
from pallas_kernels.pack.reference import contraction_order
from pallas_kernels.sparse24 import hopper, reference
from pallas_kernels.tiles import TileConfig

_PLAIN = Epilogue()


def sparse24(
    values: Float[Array, "..."],
    metadata: Metadata,
    b: Float[Array, "_k _n"],
    *,
    b_k_major: bool = False,
    b_interleaved: bool = False,
    transpose_out: bool = False,
    out_dtype=None,
    epilogue: Epilogue = _PLAIN,
    operand: Float[Array, "_m _n"] | None = None,
    row_scale: Float[Array, "_m"] | None = None,
    column_scale: Float[Array, "_n"] | None = None,
    promote: int | None = None,
    implementation: dispatch.Implementation | None = None,
    config: TileConfig | None = None,
) -> Float[Array, "_m _n"]:
    """out[m, n] = epilogue(sum_k A[m, k] b[k, n]), accumulated in f32.

    A pruned position of A is never multiplied on the hardware: inf or NaN of b reaches an output only through a
    stored value, a stored zero included. The reference multiplies pruned positions as zeros.

    Operands of 8 bits (e4m3 and e5m2, any two): b is [n, k], k a multiple of 128, m and n of 16. The tensor core keeps
    13 fractional bits of their sums and cuts the rest, which biases long sums of numbers with a mean (`promote`); the
    reference multiplies and adds in f32.

    Args:
      values: stored entries of A, two of each four along k: rows [m, k/2], or tiles [m/64, k/64, 8, 256], of 8 bits
        [m/64, k/128, 16, 256] (`pallas_kernels.tile_order`). The kernel reads either as it is.
      metadata: their positions (`pallas_kernels.metadata.pack_positions`, for values' dtype), padded to tiles of
        64 x 64.
      b: [k, n], or [n, k] if `b_k_major`, in values' dtype; of 8 bits in either.
      b_interleaved: row k of the product's B is row k mod 4 * K/4 + k div 4 of b, tokens as
        `pack.reference.contraction_order` sorts them. Not with `b_k_major`; K is then a multiple of 64.
        Not of 8 bits, where a copy of the tokens is made anyway: transposed, and in this order.
      transpose_out: give out^T [n, m]; `operand` then has that shape too.
      out_dtype: bfloat16, float16 or float32; None is b's, or bfloat16 for operands of 8 bits.
      epilogue, operand, row_scale, column_scale: see `Epilogue`.
      promote: of 8 bits, columns of A within which sums must reach f32, a multiple of 256; None or 0: the tensor core
        sums up all of them. Weight gradients want `tiles.PROMOTE`.
      implementation: "reference", "hopper", or None to choose by device and, on Hopper, by `dense_wins`.
      config: a tile to use instead of the tuned one (hopper).

    Returns:
      out [m, n], or [n, m] if `transpose_out`.

    Raises:
      ValueError: shapes or dtypes that do not belong together, or sizes that are no multiples of 8 (of 8 bits see
        above).
      NotImplementedError: the implementation does not take this device or these dtypes.
    """
    chosen, fp8 = dispatch.resolve(implementation, b.dtype), dispatch.is_fp8(b.dtype)
    (m, a_k), (n, k) = dispatch.check_packed(values, metadata, b), b.shape if b_k_major else b.shape[::-1]
    if a_k != k:
        raise ValueError(f"values {list(values.shape)} have k={a_k}, b {list(b.shape)} has {k=} ({b_k_major=})")
    dispatch.check_multiple(8, m=m, n=n, k=k)
    if b_interleaved and (b_k_major or fp8 or k % TILE):
        raise ValueError(
            f"b_interleaved takes b [k, n] of 16 bits, k a multiple of {TILE}; got {b.dtype}, {b_k_major=}, {k=}. Of 8 "
            "bits transpose a copy in the contraction's order (pack.reference.contraction_order) and set b_k_major"
        )
    dispatch.check_fp8(b.dtype, promote, b_k_major=b_k_major, k=k, m=m, n=n)
    out_dtype = dispatch.out_dtype_of(b, out_dtype)
    out_shape = (n, m) if transpose_out else (m, n)
    epilogue.check(operand, row_scale, column_scale, out_shape=out_shape, rows=m, columns=n, out_dtype=out_dtype)
    if chosen == "hopper":
        dispatch.check_kernel_dtypes(b.dtype, out_dtype)
        # The reference multiplies 8 bits in f32: no kernel is so small that it would lose.
        if implementation == "hopper" or fp8 or not dense_wins(m, n, k):
            options = (b_k_major, transpose_out, out_dtype.name, epilogue, operand, row_scale, config, b_interleaved)
            return hopper.sparse24(values, metadata, b, *options, column_scale, promote or 0)
    if b_interleaved:
        b = contraction_order(b, interleaved=True)
    values = jnp.pad(dispatch.in_rows(values), ((0, -m % TILE), (0, -k % TILE // 2)))
    b = jnp.pad(b.T if b_k_major else b, ((0, -k % TILE), (0, 0)))
    acc = reference.sparse24(values, metadata, b, out_dtype=accumulator(b.dtype))[:m]
    acc = acc.T if transpose_out else acc
    row_axis = 1 if transpose_out else 0
    return apply(epilogue, acc, operand, row_scale, column_scale, row_axis=row_axis, out_dtype=out_dtype)


def dense_wins(m: int, n: int, k: int) -> bool:
    """Whether XLA's dense product of the same shape is faster than the sparse kernel on an H100.

    Measured at (1024, 4096, 4096), where the kernel is ahead, and at (512, 4096, 4096), where they are level
    (docs/kernels.md, "Small sizes"). The limits, far below those sizes, are estimates: 512 x 512 outputs make 32 tiles
    of the smallest kind, work for a quarter of the multiprocessors, and a k below 256 ends before the pipeline is full.
    """
    return m * n < _MIN_OUTPUT or k < _MIN_K


_MIN_OUTPUT = 512 * 512
_MIN_K = 256
