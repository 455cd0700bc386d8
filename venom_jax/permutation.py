"""Tokens -> groups of rows padded to the tensor core's tile, and back.

A group holds the tokens of one expert (and of one block of the batch, if groups are formed within blocks). Groups lie
expert after expert, each padded with zero rows to a multiple of pattern.v. No token is ever dropped.

Inside a group, row order decides which tokens form the fours of the 2:4 pruning along tokens. Neighbouring tokens fire
together, so fours are made of tokens far apart: with the group's tokens in batch order and padded to n', a four is
p, p + n'/4, p + n'/2, p + 3n'/4.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float, Int
from venom_jax.pattern import TokenOrder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grouping:
    """Where each token's copies lie among the grouped rows.

    Attributes:
      token_of_row: [R] the token in each row; T marks a padding row.
      row_of_slot: [T, k] the row of each copy of a token.
      group_sizes: [G] rows of each group, padding included: multiples of `align`. G = experts * blocks.
      align: the multiple.
      blocks: groups per expert.
    """

    token_of_row: Any  # no shape annotations here: transformations rebuild pytrees around batched or absent leaves
    row_of_slot: Any
    group_sizes: Any
    align: int = dataclasses.field(metadata={"static": True})
    blocks: int = dataclasses.field(metadata={"static": True})

    @property
    def expert_sizes(self) -> Int[Array, "E"]:
        """Rows of each expert, its batch blocks together."""
        return self.group_sizes.reshape(-1, self.blocks).sum(axis=1)

    @property
    def group_of_row(self) -> Int[Array, "R"]:
        """The group of each row; rows beyond the last group get the last index."""
        ends = jnp.cumsum(self.group_sizes)
        rows = jnp.arange(self.token_of_row.shape[0])
        return jnp.minimum(jnp.searchsorted(ends, rows, side="right"), self.group_sizes.shape[0] - 1)

    @property
    def expert_of_row(self) -> Int[Array, "R"]:
        return self.group_of_row // self.blocks

    def apply(self, tokens: Float[Array, "T D"]) -> Float[Array, "R D"]:
        """rows[r] = tokens[token_of_row[r]], zero in padding rows."""
        return tokens.at[self.token_of_row].get(mode="fill", fill_value=0)

    def undo(self, rows: Float[Array, "R D"]) -> Float[Array, "T D"]:
        """tokens[t] = sum over the copies of token t of its rows, always in the same order.

        With one copy a token, `undo(apply(x)) == x`; with k copies it is k x.
        """
        copies = rows[self.row_of_slot]
        total = copies[:, 0]
        for slot in range(1, copies.shape[1]):
            total = total + copies[:, slot]
        return total


def max_rows(tokens: int, top_k: int, groups: int, align: int) -> int:
    """The most rows that `groups` groups of tokens * top_k copies can take, each padded to `align`."""
    return (tokens * top_k + groups * (align - 1)) // align * align


def group_tokens(
    routed: Int[Array, "T k"],
    experts: int,
    *,
    align: int,
    order: TokenOrder = "interleaved",
    blocks: int = 1,
) -> Grouping:
    """Sort tokens into groups by expert; no host synchronisation, static shapes.

    Args:
      routed: the experts of each token, distinct within a row.
      align: rows a group is padded to, a multiple of 4.
      order: rows within a group, see the module's docstring; `natural` keeps batch order.
      blocks: form groups inside this many equal blocks of the batch.

    Raises:
      ValueError: T is not divisible by `blocks`, or `align` is no multiple of 4.
    """
    tokens, top_k = routed.shape
    if tokens % blocks:
        raise ValueError(f"{tokens} tokens do not split into token_blocks = {blocks} equal blocks.")
    if align % 4:
        raise ValueError(f"groups of rows are padded to {align=}, which is no multiple of 4.")
    groups = experts * blocks
    block = jnp.arange(tokens, dtype=jnp.int32) // (tokens // blocks) if blocks > 1 else 0
    group = (routed * blocks + jnp.broadcast_to(jnp.asarray(block), (tokens,))[:, None]).reshape(-1)
    copies = jnp.argsort(group, stable=True).astype(jnp.int32)  # copies of tokens, by group and then by batch position
    group = group[copies]
    ends = jnp.searchsorted(group, jnp.arange(groups), side="right").astype(jnp.int32)
    counts = jnp.diff(ends, prepend=0)
    sizes = (counts + align - 1) // align * align
    rank = jnp.arange(tokens * top_k, dtype=jnp.int32) - (ends - counts)[group]
    if order == "interleaved":
        quarter = jnp.maximum(sizes[group] // 4, 1)
        rank = rank % quarter * 4 + rank // quarter
    row = (jnp.cumsum(sizes) - sizes)[group] + rank
    empty = jnp.full(max_rows(tokens, top_k, groups, align), tokens, jnp.int32)
    token_of_row = empty.at[row].set(copies // top_k, unique_indices=True)
    row_of_slot = jnp.zeros(tokens * top_k, jnp.int32).at[copies].set(row, unique_indices=True)
    return Grouping(token_of_row, row_of_slot.reshape(tokens, top_k), sizes, align, blocks)
