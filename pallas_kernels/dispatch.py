"""Which implementation of an op runs, and the checks that the ops share."""

from typing import Literal, get_args

import jax.numpy as jnp

from pallas_kernels import device, tile_order
from pallas_kernels.array_types import Array
from pallas_kernels.tiles import FP8, GRANULE

Implementation = Literal["reference", "hopper"]

KERNEL_DTYPES = ("bfloat16", "float16")
"""Operands of 16 bits; of 8 bits, `tiles.FP8`."""
OUT_DTYPES = ("bfloat16", "float16", "float32")


def resolve(implementation: Implementation | None, dtype=jnp.bfloat16) -> Implementation:
    """The implementation to run: a named one or none, never another; None takes "hopper" on a Hopper GPU.

    Args:
      dtype: of the operands. On a GPU that has no kernels for 8 bits nobody wants the reference, unless by name.

    Raises:
      ValueError: no such implementation.
      NotImplementedError: "hopper" without a Hopper GPU, or operands of 8 bits on another GPU.
    """
    gpu = device.current()
    if implementation is None:
        if gpu is not None and not gpu.is_hopper and is_fp8(dtype):
            raise NotImplementedError(
                f"operands in {jnp.dtype(dtype).name} need a GPU of compute capability {device.HOPPER} (H100, H200); "
                f"this process has {gpu.name} of compute capability {gpu.compute_capability}. Use bfloat16, or "
                "implementation='reference', which multiplies in float32."
            )
        return "hopper" if device.hopper_available() else "reference"
    if implementation not in get_args(Implementation):
        raise ValueError(f"{implementation=}; use one of {get_args(Implementation)} or None")
    if implementation == "hopper" and not device.hopper_available():
        found = "no GPU" if gpu is None else f"{gpu.name} of compute capability {gpu.compute_capability}"
        raise NotImplementedError(
            f"{implementation=} needs a GPU of compute capability {device.HOPPER} (H100, H200); this process has "
            f"{found}. Use None or 'reference'."
        )
    return implementation


def is_fp8(dtype) -> bool:
    """Whether operands of this type are multiplied by the tensor core's 8-bit instructions."""
    return jnp.dtype(dtype).name in FP8


def check_kernel_dtypes(dtype, out_dtype) -> None:
    """Raise NotImplementedError for types the tensor core or the store does not take."""
    if jnp.dtype(dtype).name not in (*KERNEL_DTYPES, *FP8) or jnp.dtype(out_dtype).name not in OUT_DTYPES:
        raise NotImplementedError(
            f"the Hopper kernels take operands in {(*KERNEL_DTYPES, *FP8)} and give {OUT_DTYPES}; got "
            f"{jnp.dtype(dtype).name} and {jnp.dtype(out_dtype).name}. Cast, or use implementation='reference'."
        )


def refuse_fp8(dtype, what: str, remedy: str) -> None:
    """Raise NotImplementedError for operands of 8 bits where there is no product of them."""
    if is_fp8(dtype):
        raise NotImplementedError(f"{what} takes operands of 16 bits, not {jnp.dtype(dtype).name}: {remedy}")


def out_dtype_of(b: Array, out_dtype):
    """The output's dtype where the caller names none: b's, or bfloat16 for operands of 8 bits."""
    if out_dtype is not None:
        return jnp.dtype(out_dtype)
    return jnp.dtype(jnp.bfloat16) if is_fp8(b.dtype) else b.dtype


def widened(*operands: Array) -> tuple[Array, ...]:
    """Operands as the reference multiplies them: of 8 bits in f32, which holds each value and each product."""
    return tuple(a.astype(jnp.float32) if is_fp8(a.dtype) else a for a in operands)


def check_packed(values: Array, metadata: Array, b: Array) -> tuple[int, int]:
    """The logical sizes [R, C] of packed values, in rows [R, C/2] or in tiles (tile_order.py).

    Raises:
      ValueError: values, metadata [R/64, C/64, 128] and b's dtype do not belong together.
    """
    columns = tile_order.columns(values.dtype)
    if not (_of_one_kind(values, b) and (values.ndim == 2 or values.shape[2:] == tile_order.shape(values.dtype))):
        wanted = f"one of {FP8}" if is_fp8(b.dtype) else f"b's dtype, {b.dtype}"
        shape = ", ".join(map(str, tile_order.shape(b.dtype)))
        raise ValueError(
            f"values are {values.dtype}{list(values.shape)}, b is {b.dtype}; want {wanted}, in rows [R, C/2] or in "
            f"tiles [R/{GRANULE}, C/{tile_order.columns(b.dtype)}, {shape}] (tile_order.py)"
        )
    unit = 1 if values.ndim == 2 else GRANULE
    rows, columns = values.shape[0] * unit, values.shape[1] * (2 if values.ndim == 2 else columns)
    words = (-(-rows // GRANULE), -(-columns // GRANULE), 128)
    if metadata.dtype != jnp.uint32 or metadata.shape != words:
        raise ValueError(
            f"metadata is {metadata.dtype}{list(metadata.shape)}; values {list(values.shape)} take "
            f"uint32{list(words)}: one word per thread of a warpgroup and {GRANULE} x {GRANULE} tile (metadata.py)"
        )
    return rows, columns


def _of_one_kind(a: Array, b: Array) -> bool:
    """One type, or any two of 8 bits."""
    return a.dtype == b.dtype or (is_fp8(a.dtype) and is_fp8(b.dtype))


def check_fp8(dtype, promote: int | None, *, b_k_major: bool, k: int, **sizes: int) -> None:
    """Raise ValueError for what products of 8-bit operands do not take, or what those of 16 bits do not."""
    if not is_fp8(dtype):
        if promote:
            raise ValueError(
                f"{promote=}: sums of operands in {jnp.dtype(dtype).name} are f32 from the first product on"
            )
        return
    if not b_k_major:
        raise ValueError(
            f"{b_k_major=}: of 8 bits the tensor core reads B along k only. Give b transposed and b_k_major=True"
        )
    check_multiple(FP8_COLUMNS, k=k)
    check_multiple(FP8_SIZES, **sizes)
    if promote is not None and (promote < 0 or promote % (2 * FP8_COLUMNS)):
        raise ValueError(f"{promote=} must be 0 or a multiple of {2 * FP8_COLUMNS} columns, two stages of the kernel")


FP8_COLUMNS = 128
"""The contraction of 8-bit operands is a multiple of this: the columns of a tile."""
FP8_SIZES = 16
"""... and other sizes of this, as rows of memory must have whole pieces of 16 bytes."""


def in_rows(values: Array) -> Array:
    """Values [R, C/2], whichever order they come in."""
    return values if values.ndim == 2 else tile_order.from_tiles(values)


def check_multiple(of: int, **sizes: int) -> None:
    """Raise ValueError naming the first size that is no positive multiple."""
    for name, size in sizes.items():
        if size % of or size <= 0:
            raise ValueError(f"{name}={size} must be a positive multiple of {of}; pad with zeros")
