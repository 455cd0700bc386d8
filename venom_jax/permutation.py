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
from pallas_kernels.dispatch import Implementation
from pallas_kernels.permute import api as permute
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
      implementation: of `apply` and `undo`.
    """

    token_of_row: Any  # no shape annotations here: transformations rebuild pytrees around batched or absent leaves
    row_of_slot: Any
    group_sizes: Any
    align: int = dataclasses.field(metadata={"static": True})
    blocks: int = dataclasses.field(metadata={"static": True})
    implementation: Implementation = dataclasses.field(default="reference", metadata={"static": True})

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
        return permute.gather_rows(tokens, self.token_of_row, implementation=self.implementation)

    def undo(self, rows: Float[Array, "R D"]) -> Float[Array, "T D"]:
        """tokens[t] = sum over the copies of token t of its rows, always in the same order, in f32, rounded once.

        With one copy a token, `undo(apply(x)) == x`; with k copies it is k x.
        """
        return permute.sum_copies(rows, self.row_of_slot, implementation=self.implementation)


def group_tokens(
    routed: Int[Array, "T k"],
    experts: int,
    *,
    align: int,
    order: TokenOrder = "interleaved",
    blocks: int = 1,
    implementation: Implementation = "reference",
) -> Grouping:
    """Sort tokens into groups by expert; no host synchronisation, static shapes.

    Args:
      routed: the experts of each token, distinct within a row.
      align: rows a group is padded to, a multiple of 4.
      order: rows within a group, see the module's docstring; `natural` keeps batch order.
      blocks: form groups inside this many equal blocks of the batch.
      implementation: of the sort, and of the grouping's `apply` and `undo`. Each gives the same bits.

    Raises:
      ValueError: T is not divisible by `blocks`, or `align` is no multiple of 4.
      NotImplementedError: the implementation does not run on this device.
    """
    tokens = routed.shape[0]
    if tokens % blocks:
        raise ValueError(f"{tokens} tokens do not split into token_blocks = {blocks} equal blocks.")
    group = routed
    if blocks > 1:
        group = routed * blocks + jnp.arange(tokens, dtype=jnp.int32)[:, None] // (tokens // blocks)
    found = permute.sort_into_groups(
        group, experts * blocks, align=align, interleaved=order == "interleaved", implementation=implementation
    )
    return Grouping(*found, align, blocks, implementation)
