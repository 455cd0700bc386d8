"""The permutation in plain jnp: the specification of the kernels, and what runs without them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float, Int, accumulator

EPSILON = 1e-12
"""Added to norms before dividing by them."""


class Sorted(NamedTuple):
    """Copies of tokens sorted into groups of rows.

    Attributes:
      token_of_row: [R] the token in each row; T marks a padding row.
      row_of_slot: [T, k] the row of each copy of a token.
      group_sizes: [G] rows of each group, padding included.
    """

    token_of_row: Int[Array, "R"]
    row_of_slot: Int[Array, "T k"]
    group_sizes: Int[Array, "G"]


def max_rows(tokens: int, top_k: int, groups: int, align: int) -> int:
    """The most rows that `groups` groups of tokens * top_k copies can take, each padded to `align`."""
    return (tokens * top_k + groups * (align - 1)) // align * align


def sort_into_groups(group: Int[Array, "T k"], groups: int, *, align: int, interleaved: bool) -> Sorted:
    """Rows group after group, each padded to `align` rows; inside a group tokens in order, or in fours far apart.

    With a group's tokens in order and padded to n', interleaved rows are 0, n'/4, n'/2, 3n'/4, 1, n'/4 + 1, ...

    Args:
      group: of each copy of a token, distinct within a token.
      align: a multiple of 4.
    """
    tokens, top_k = group.shape
    group = group.reshape(-1)
    copies = jnp.argsort(group, stable=True).astype(jnp.int32)  # copies of tokens, by group and then by batch position
    group = group[copies]
    ends = jnp.searchsorted(group, jnp.arange(groups), side="right").astype(jnp.int32)
    counts = jnp.diff(ends, prepend=0)
    sizes = (counts + align - 1) // align * align
    rank = jnp.arange(tokens * top_k, dtype=jnp.int32) - (ends - counts)[group]
    if interleaved:
        quarter = jnp.maximum(sizes[group] // 4, 1)
        rank = rank % quarter * 4 + rank // quarter
    row = (jnp.cumsum(sizes) - sizes)[group] + rank
    empty = jnp.full(max_rows(tokens, top_k, groups, align), tokens, jnp.int32)
    token_of_row = empty.at[row].set(copies // top_k, unique_indices=True)
    row_of_slot = jnp.zeros(tokens * top_k, jnp.int32).at[copies].set(row, unique_indices=True)
    return Sorted(token_of_row, row_of_slot.reshape(tokens, top_k), sizes)


def gather_rows(
    tokens: Float[Array, "T D"], token_of_row: Int[Array, "R"], weights: Float[Array, "R"] | None = None
) -> Float[Array, "R D"]:
    """rows[r] = tokens[token_of_row[r]] (times weights[r], in f32, rounded once); zero where that is T."""
    rows = tokens.at[token_of_row].get(mode="fill", fill_value=0)
    if weights is None:
        return rows
    scaled = rows.astype(accumulator(rows.dtype)) * weights[:, None]
    # A padding row stays +0.0 whatever its weight.
    return jnp.where((token_of_row < tokens.shape[0])[:, None], scaled.astype(rows.dtype), 0)


def sum_copies(
    rows: Float[Array, "R D"], row_of_slot: Int[Array, "T k"], weights: Float[Array, "T k"] | None = None
) -> Float[Array, "T D"]:
    """tokens[t] = rows[row_of_slot[t, 0]] + rows[row_of_slot[t, 1]] + ..., from left to right in f32, rounded once.

    With weights each row is multiplied by its copy's first, in f32.
    """
    copies = rows[row_of_slot]
    if copies.shape[1] == 1 and weights is None:
        return copies[:, 0]
    copies = copies.astype(accumulator(rows.dtype))
    copies = copies if weights is None else copies * weights[:, :, None]
    total = copies[:, 0]
    for slot in range(1, copies.shape[1]):
        total = total + copies[:, slot]
    return total.astype(rows.dtype)


def score_experts(x: Float[Array, "T D"], means: Float[Array, "E D"], *, cosine: bool) -> Float[Array, "T E"]:
    """<x, mean_e>, or <x / |x|, mean_e>, in f32."""
    x = x.astype(jnp.float32)
    if cosine:
        x = x / (jnp.linalg.norm(x, axis=1, keepdims=True) + EPSILON)
    return jnp.dot(x, means.T, precision="highest")


def choose_top(scores: Float[Array, "T E"], bias: Float[Array, "E"] | None, top_k: int) -> Int[Array, "T k"]:
    """The `top_k` largest scores + bias of each token, ascending by index; ties go to the lower index."""
    _, chosen = jax.lax.top_k(scores if bias is None else scores + bias[None], top_k)
    return jnp.sort(chosen, axis=1).astype(jnp.int32)
