"""Packing and permutation through jax-triton: the signatures of `pack.api` and `permute.api`, for bf16 on a Hopper GPU.

`triton_call` cannot be batched; under `jax.vmap` these functions run once for each element, one after the other.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, tile_order
from pallas_kernels.array_types import Array, Float, Int
from pallas_kernels.pack.activations import Packed
from pallas_kernels.pack.api import PackedActivations
from pallas_kernels.tiles import GRANULE
from pallas_kernels.triton import extra

COMPUTE_CAPABILITY = 90


def pack_activations(y: Float[Array, "R C"], *, interleaved: bool) -> PackedActivations:
    """`pack.api.pack_activations` along features and along tokens.

    Raises:
      ImportError: Triton or jax-triton is missing or broken, see `extra`.
      ValueError: R or C is no multiple of 64.
    """
    dispatch.check_multiple(GRANULE, rows=y.shape[0], columns=y.shape[1])
    row_tiles, column_tiles = y.shape[0] // GRANULE, y.shape[1] // GRANULE
    values, words = _packed(row_tiles, column_tiles, y.dtype)
    other_values, other_words = _packed(column_tiles, row_tiles, y.dtype)
    counts = jax.ShapeDtypeStruct((row_tiles * column_tiles,), jnp.int32)
    sizes = {"row_tiles": row_tiles, "column_tiles": column_tiles, "interleaved": interleaved}
    out = (values, values, words, other_values, other_words, counts)
    features, squared, positions, tokens, token_positions, positives = _call(
        "pack_activations", (y,), out, row_tiles * column_tiles, **sizes
    )
    total = jnp.sum(positives, dtype=jnp.float32)
    return PackedActivations(
        Packed(features, positions), Packed(squared, positions), Packed(tokens, token_positions), total
    )


def pack_thresholded(w: Float[Array, "R C"], beta: Float[Array, ""], *, axis: int, dtype: Any) -> Packed:
    """`pack.api.pack_thresholded`.

    Raises:
      ImportError, ValueError: as `pack_activations`.
    """
    dispatch.check_multiple(GRANULE, rows=w.shape[0], columns=w.shape[1])
    row_tiles, column_tiles = w.shape[0] // GRANULE, w.shape[1] // GRANULE
    out = _packed(column_tiles, row_tiles, dtype) if axis == 0 else _packed(row_tiles, column_tiles, dtype)
    sizes = {"row_tiles": row_tiles, "column_tiles": column_tiles, "along_rows": axis == 0}
    beta = jnp.asarray(beta, jnp.float32).reshape(1)
    return Packed(*_call("pack_thresholded", (w, beta), out, row_tiles * column_tiles, **sizes))


def gather_rows(tokens: Float[Array, "T D"], token_of_row: Int[Array, "R"]) -> Float[Array, "R D"]:
    """`permute.api.gather_rows`.

    Raises:
      ImportError: as `pack_activations`.
    """
    count, width = tokens.shape
    out = (jax.ShapeDtypeStruct((token_of_row.shape[0], width), tokens.dtype),)
    sizes = {"tokens": count, "width": width, "block": _power_of_two(width)}
    return _call("gather_rows", (tokens, token_of_row), out, token_of_row.shape[0], **sizes)[0]


def sum_copies(rows: Float[Array, "R D"], row_of_slot: Int[Array, "T k"]) -> Float[Array, "T D"]:
    """`permute.api.sum_copies`.

    Raises:
      ImportError: as `pack_activations`.
    """
    (tokens, top_k), width = row_of_slot.shape, rows.shape[1]
    out = (jax.ShapeDtypeStruct((tokens, width), rows.dtype),)
    sizes = {"top_k": top_k, "width": width, "block": _power_of_two(width)}
    return _call("sum_copies", (rows, row_of_slot), out, tokens, **sizes)[0]


def _call(kernel: str, arguments: tuple, out: tuple, programs: int, **sizes: int) -> list[Array]:
    triton_call = extra.jax_triton().triton_call
    from pallas_kernels.triton import kernels  # its decorators need Triton

    call = functools.partial(
        triton_call,
        kernel=getattr(kernels, kernel),
        out_shape=out,
        grid=(programs,),
        num_warps=4,
        compute_capability=COMPUTE_CAPABILITY,
        **sizes,
    )
    return list(jax.custom_batching.sequential_vmap(call)(*arguments))


def _packed(row_tiles: int, column_tiles: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    tiles = (row_tiles, column_tiles)
    return jax.ShapeDtypeStruct((*tiles, *tile_order.SHAPE), dtype), jax.ShapeDtypeStruct((*tiles, 128), jnp.uint32)


def _power_of_two(width: int) -> int:
    return 1 << (width - 1).bit_length()
