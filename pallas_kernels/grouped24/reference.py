"""Products over ragged groups of rows, in plain jnp: the specification, the CPU path and the oracle.

Rows lie group after group; `group_sizes` [G] says how many belong to each, and rows beyond their sum belong to none
and give zeros. `align` promises that every size is a multiple of it. Then the rows split into tiles of `align`
rows with one group each, and the product is a batched one over tiles: 1/G of the arithmetic of `ragged_dot`, which
XLA expands to the full dense product on CPUs and does not speed up on GPUs either (docs/log.md).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float, Int, accumulator


def tile_groups(group_sizes: Int[Array, "G"], num_tiles: int, align: int) -> Int[Array, "tiles"]:
    """The group of each tile of `align` rows; tiles beyond the last group get G (no group)."""
    ends = jnp.cumsum(group_sizes) // align
    return jnp.searchsorted(ends, jnp.arange(num_tiles), side="right").astype(jnp.int32)


def rows(
    a: Float[Array, "R k"], b: Float[Array, "G k n"], group_sizes: Int[Array, "G"], *, align: int = 1
) -> Float[Array, "R n"]:
    """out[r] = a[r] b[group of r], accumulated and returned in f32 (f64 for f64 operands)."""
    accumulate = accumulator(a.dtype)
    if b.shape[0] == 1:
        return jnp.dot(a, b[0], preferred_element_type=accumulate)
    if align == 1:
        return jax.lax.ragged_dot(a, b, group_sizes, preferred_element_type=accumulate)
    tiles = _tiles(a, align)
    group = tile_groups(group_sizes, tiles.shape[0], align)
    # Tiles beyond the groups hold zero rows by contract of the callers; whichever slice they meet gives zeros.
    weights = b[jnp.minimum(group, b.shape[0] - 1)]
    out = jnp.einsum("tvk,tkn->tvn", tiles, weights, preferred_element_type=accumulate)
    return out.reshape(a.shape[0], b.shape[2])


def contraction(
    a: Float[Array, "R m"], b: Float[Array, "R n"], group_sizes: Int[Array, "G"], *, align: int = 1
) -> Float[Array, "G m n"]:
    """out[g] = sum over the rows r of group g of a[r]^T b[r], in f32 (f64 for f64 operands).

    With `align` > 1 a NaN or inf of any row reaches every group's result (as 0 * NaN).
    """
    accumulate = accumulator(a.dtype)
    if group_sizes.shape[0] == 1:
        return jnp.einsum("rm,rn->mn", a, b, preferred_element_type=accumulate)[None]
    if align == 1:
        over_rows = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        return jax.lax.ragged_dot_general(a, b, group_sizes, over_rows, preferred_element_type=accumulate)
    tiles_a, tiles_b = _tiles(a, align), _tiles(b, align)
    group = tile_groups(group_sizes, tiles_a.shape[0], align)
    parts = jnp.einsum("tvm,tvn->tmn", tiles_a, tiles_b, preferred_element_type=accumulate)
    # A product with the indicator instead of segment_sum: for thousands of tiles XLA's scatter of whole matrices takes
    # minutes to compile on a GPU, and its atomics add in any order. Tiles of no group carry the index G: no column.
    member = jax.nn.one_hot(group, group_sizes.shape[0], dtype=accumulate)
    return jnp.einsum("tg,tmn->gmn", member, parts, precision="highest")


def _tiles(a: Array, align: int) -> Array:
    if a.shape[0] % align:
        raise ValueError(f"{a.shape[0]} rows do not split into tiles of align={align}; pad the last group.")
    return a.reshape(a.shape[0] // align, align, a.shape[1])
