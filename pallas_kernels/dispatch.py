"""Which implementation of an op runs, and the checks that the ops share."""

from typing import Literal, get_args

import jax.numpy as jnp

from pallas_kernels import device, tile_order
from pallas_kernels.array_types import Array
from pallas_kernels.tiles import GRANULE

Implementation = Literal["reference", "hopper", "warp"]
"""jnp; the kernels of Hopper (`wgmma.sp`, the copy engine); those of single warps (`mma.sp`, sm_80 and later)."""

KERNEL_DTYPES = ("bfloat16", "float16")
OUT_DTYPES = ("bfloat16", "float16", "float32")


def resolve(implementation: Implementation | None) -> Implementation:
    """The implementation to run: a named one or none, never another; None chooses by the GPU's family.

    Raises:
      ValueError: no such implementation.
      NotImplementedError: "hopper" without a Hopper GPU, "warp" without a GPU that has sparse tensor cores.
    """
    if implementation is None:
        family = device.family()
        return family if family in ("hopper", "warp") else "reference"
    if implementation not in get_args(Implementation):
        raise ValueError(f"{implementation=}; use one of {get_args(Implementation)} or None")
    if implementation == "hopper" and not device.hopper_available():
        gpu = device.current()
        found = "no GPU" if gpu is None else f"{gpu.name} of compute capability {gpu.compute_capability}"
        raise NotImplementedError(
            f"{implementation=} needs a GPU of compute capability {device.HOPPER} (H100, H200); this process has "
            f"{found}. Use None or 'reference'."
        )
    if implementation == "warp" and device.family() is None:
        gpu = device.current()
        found = "no GPU" if gpu is None else f"{gpu.name} of compute capability {gpu.compute_capability}"
        raise NotImplementedError(
            f"{implementation=} needs sparse tensor cores, a GPU of compute capability 8.0 or later (A100 and all "
            f"since); this process has {found}. Use None or 'reference'."
        )
    return implementation


def check_kernel_dtypes(dtype, out_dtype) -> None:
    """Raise NotImplementedError for types the tensor core or the store does not take."""
    if jnp.dtype(dtype).name not in KERNEL_DTYPES or jnp.dtype(out_dtype).name not in OUT_DTYPES:
        raise NotImplementedError(
            f"the Hopper kernels take operands in {KERNEL_DTYPES} and give {OUT_DTYPES}; got {jnp.dtype(dtype).name} "
            f"and {jnp.dtype(out_dtype).name}. Cast, or use implementation='reference'."
        )


def check_packed(values: Array, metadata: Array, b: Array) -> tuple[int, int]:
    """The logical sizes [R, C] of packed values, in rows [R, C/2] or in tiles [R/64, C/64, 8, 256].

    Raises:
      ValueError: values, metadata [R/64, C/64, 128] and b's dtype do not belong together.
    """
    if values.dtype != b.dtype or not (values.ndim == 2 or values.shape[2:] == tile_order.SHAPE):
        raise ValueError(
            f"values are {values.dtype}{list(values.shape)}; want b's dtype, {b.dtype}, in rows [R, C/2] or in tiles "
            f"[R/{GRANULE}, C/{GRANULE}, 8, 256] (tile_order.py)"
        )
    unit = 1 if values.ndim == 2 else GRANULE
    rows, columns = values.shape[0] * unit, values.shape[1] * (2 if values.ndim == 2 else GRANULE)
    words = (-(-rows // GRANULE), -(-columns // GRANULE), 128)
    if metadata.dtype != jnp.uint32 or metadata.shape != words:
        raise ValueError(
            f"metadata is {metadata.dtype}{list(metadata.shape)}; values {list(values.shape)} take "
            f"uint32{list(words)}: one word per thread of a warpgroup and {GRANULE} x {GRANULE} tile (metadata.py)"
        )
    return rows, columns


def in_rows(values: Array) -> Array:
    """Values [R, C/2], whichever order they come in."""
    return values if values.ndim == 2 else tile_order.from_tiles(values)


def check_tile(implementation: Implementation, config: object | None) -> None:
    """Raise ValueError for a tile of another implementation's kernels."""
    kinds = {"hopper": "TileConfig", "warp": "WarpTile"}
    if config is not None and type(config).__name__ != kinds[implementation]:
        raise ValueError(f"{config=} is no tile of the {implementation} kernels, which take a {kinds[implementation]}")


def check_multiple(of: int, **sizes: int) -> None:
    """Raise ValueError naming the first size that is no positive multiple."""
    for name, size in sizes.items():
        if size % of or size <= 0:
            raise ValueError(f"{name}={size} must be a positive multiple of {of}; pad with zeros")
