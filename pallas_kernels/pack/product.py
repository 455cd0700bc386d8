"""Weights times tokens, packed at once: y1 and dy2 of the FFN without y1 and dy2.

The same results, to the bit, as the product (`sparse24`, `grouped24.columns`) followed by `pack.api`: on Hopper in the
product's epilogue (hopper/packing.py), elsewhere one after the other.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import device, dispatch, tuned
from pallas_kernels.array_types import Array, Float, Int
from pallas_kernels.grouped24 import api as grouped
from pallas_kernels.hopper import kernel
from pallas_kernels.pack import api
from pallas_kernels.pack.activations import Packed
from pallas_kernels.pack.api import PackedActivations, TakenActivations
from pallas_kernels.sparse24.api import sparse24
from pallas_kernels.tiles import GRANULE, AForm, Packing, Problem, TileConfig


def pack_product(
    weights: Packed | Float[Array, "_ _"],
    rows: Float[Array, "R K"],
    group_sizes: Int[Array, "G"] | None = None,
    *,
    transposed: bool = False,
    features: bool,
    tokens: bool,
    interleaved: bool,
    implementation: dispatch.Implementation | None = None,
    config: TileConfig | None = None,
) -> PackedActivations:
    """`pack.api.pack_activations` of y[r, c] = sum_k A[g C + c, k] rows[r, k], g the group of row r.

    Args:
      weights: A [G C, K], packed 2:4 along K or dense.
      transposed: dense weights are given as A^T [K, G C].
      rows: tokens; R, C and K multiples of 64.
      group_sizes: rows of each group (grouped24/api.py), or None for one group of all rows.
      features, tokens, interleaved: as `pack_activations`.

    Raises:
      ValueError: shapes or dtypes that do not belong together, sizes that are no multiples of 64, nothing to pack.
      NotImplementedError: the named implementation does not take this device or these dtypes.
    """
    along = {"features": features, "tokens": tokens, "interleaved": interleaved}
    if not (features or tokens):
        raise ValueError("features=False and tokens=False: nothing is to be packed; use the product alone")
    _check(weights, rows, group_sizes, transposed)
    chosen = dispatch.resolve(implementation)
    if chosen != "hopper":
        y = _product(weights, rows, group_sizes, transposed, chosen)
        return api.pack_activations(y, **along, implementation=chosen)
    return api.packed_of(_launch(Packing(False, **along), weights, rows, group_sizes, transposed, {}, config))


def take_product(
    weights: Packed | Float[Array, "_ _"],
    rows: Float[Array, "R K"],
    features: Packed | None,
    tokens: Packed | None,
    group_sizes: Int[Array, "G"] | None = None,
    *,
    transposed: bool = False,
    interleaved: bool,
    implementation: dispatch.Implementation | None = None,
    config: TileConfig | None = None,
) -> TakenActivations:
    """`pack.api.take_activations` of dy2[r, c] = sum_k A[g C + c, k] rows[r, k]; arguments as `pack_product`."""
    if features is None and tokens is None:
        raise ValueError("features=None and tokens=None: nothing is to be taken; use the product alone")
    _check(weights, rows, group_sizes, transposed)
    chosen = dispatch.resolve(implementation)
    if chosen != "hopper":
        dy2 = _product(weights, rows, group_sizes, transposed, chosen)
        return api.take_activations(dy2, features, tokens, interleaved=interleaved, implementation=chosen)
    kept = {}
    if features is not None:
        kept |= {"features": features.values, "feature_metadata": features.metadata}
    if tokens is not None:
        kept |= {"tokens": tokens.values, "token_metadata": tokens.metadata}
    packing = Packing(True, features is not None, tokens is not None, interleaved)
    found = _launch(packing, weights, rows, group_sizes, transposed, kept, config)
    return api.taken_of(found, features, tokens)


def _product(weights, rows, group_sizes, transposed: bool, implementation: dispatch.Implementation) -> Array:
    if isinstance(weights, Packed):
        options = {"b_k_major": True, "transpose_out": True, "implementation": implementation}
        if group_sizes is None:
            return sparse24(*weights, rows, **options)
        return grouped.columns(*weights, rows, group_sizes, **options)
    by_row = weights if transposed else weights.T
    if group_sizes is None:
        return jnp.dot(rows, by_row)
    by_expert = jnp.moveaxis(by_row.reshape(by_row.shape[0], group_sizes.shape[0], -1), 1, 0)
    return grouped.dense_rows(rows, by_expert, group_sizes).astype(rows.dtype)


def _check(weights, rows, group_sizes, transposed: bool) -> int:
    """The rows of A; raise ValueError for what does not belong together."""
    n, k = rows.shape
    if isinstance(weights, Packed):
        m, a_k = dispatch.check_packed(*weights, rows)
    else:
        m, a_k = weights.shape[::-1] if transposed else weights.shape
    groups = 1 if group_sizes is None else group_sizes.shape[0]
    if a_k != k:
        raise ValueError(f"weights [{m}, {a_k}] and rows {list(rows.shape)} differ in k")
    dispatch.check_multiple(GRANULE, rows=n, k=k)
    if m % (groups * GRANULE):
        raise ValueError(f"{m} rows of weights do not split into {groups=} parts of multiples of {GRANULE}")
    return m


def _launch(packing: Packing, weights, rows, group_sizes, transposed: bool, kept: dict, config) -> dict[str, jax.Array]:
    form: AForm = "sparse" if isinstance(weights, Packed) else "m_major" if transposed else "k_major"
    dispatch.check_kernel_dtypes(rows.dtype, rows.dtype)
    problem = Problem(
        m=_check(weights, rows, group_sizes, transposed),
        n=rows.shape[0],
        k=rows.shape[1],
        mode="dense" if group_sizes is None else "columns",
        groups=1 if group_sizes is None else group_sizes.shape[0],
        b_k_major=True,
        transpose_out=True,
        dtype=rows.dtype.name,
        out_dtype=rows.dtype.name,
        packing=packing,
        a=form,
    )
    return kernel.matmul_packed(
        tuple(weights) if isinstance(weights, Packed) else (weights,),
        rows,
        problem=problem,
        config=config or tuned.choose(problem),
        num_sms=device.sm_count(),
        groups=None if group_sizes is None else group_sizes.astype(jnp.int32),
        kept=kept,
    )
