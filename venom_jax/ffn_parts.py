"""What the two forms of `venom_jax.general_ffn` share: its arrays, and what is done to rows between products."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Bool, Float, Int, accumulator
from venom_jax.dispatch import Kernels
from venom_jax.formats import Sparse24
from venom_jax.nonlinearity import Activation
from venom_jax.pattern import Recipe
from venom_jax.permutation import Grouping
from venom_jax.router import Axis
from venom_jax.sharded_ffn import gather


class Weights(NamedTuple):
    """The masters of one layer, or of all experts one after the other along F."""

    w1: Array
    """[D, F], of the gate where there is one."""
    w2: Array
    """[F, D]."""
    up: Array | None = None
    """[D, F] Wu, with a gate."""
    b1: Array | None = None
    """[F]."""
    b_up: Array | None = None
    """[F]."""


@dataclasses.dataclass(frozen=True)
class Form:
    """All that is static of one call."""

    recipe: Recipe
    kernels: Kernels | None
    activation: Activation
    clamp: float
    dropout: float
    axis: Axis | None
    partial: bool = False


class Operands(NamedTuple):
    """Whole weights as one pass reads them: the first of the pass (W1, Wu) along D or F, and W2; dense or packed."""

    w1: Array
    w2: Array
    up: Array | None
    sparse_w1: Sparse24 | None = None
    sparse_up: Sparse24 | None = None
    sparse_w2: Sparse24 | None = None


@dataclasses.dataclass(frozen=True)
class Opening:
    """What happens to g and u between the product and the activation: biases, dropout, zeros in padding rows."""

    form: Form
    grouping: Grouping | None
    tokens: int
    weights: Weights
    key_data: Array | None

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return self.weights.b1 is not None or self.weights.b_up is not None or self.key_data is not None

    def gate(self, g: Float[Array, "R Fe"]) -> Float[Array, "R Fe"]:
        """g + b1, and 0 where dropout or padding closes the gate: h, dg and du are then zero by themselves."""
        if not self.changes:
            return g
        g = self._biased(g, self.weights.b1)
        return jnp.where(self._open(g.shape), g, 0)

    def up(self, u: Float[Array, "R Fe"]) -> Float[Array, "R Fe"]:
        """u + bu."""
        return self._biased(u, self.weights.b_up)

    def _biased(self, y, bias):
        if bias is None:
            return y
        if self.form.axis is not None:
            bias = gather(bias, self.form.axis, 0)
        by_expert = bias.reshape(self.form.recipe.experts, -1)
        of_row = by_expert[0] if len(by_expert) == 1 else by_expert[self.grouping.expert_of_row]
        return (y.astype(accumulator(y.dtype)) + of_row).astype(y.dtype)

    def _open(self, shape: tuple[int, ...]) -> Bool[Array, "R Fe"]:
        rows = shape[0]
        if self.grouping is None:
            real, slot = jnp.arange(rows) < self.tokens, jnp.minimum(jnp.arange(rows), self.tokens - 1)
        else:
            real, slot = self.grouping.token_of_row < self.tokens, slots_of_rows(self.grouping)
        if self.key_data is None:
            return jnp.broadcast_to(real[:, None], shape)
        slots = self.tokens * self.form.recipe.top_k
        key = jax.random.wrap_key_data(self.key_data)
        kept = jax.random.bernoulli(key, 1 - self.form.dropout, (slots, shape[1]))
        return kept[slot] & real[:, None]


def slots_of_rows(grouping: Grouping) -> Int[Array, "R"]:
    """Which of the T k copies each row holds; 0 in padding rows."""
    slots = grouping.row_of_slot.reshape(-1)
    empty = jnp.zeros(grouping.token_of_row.shape, jnp.int32)
    return empty.at[slots].set(jnp.arange(len(slots), dtype=jnp.int32), unique_indices=True)


def weights_of_rows(grouping: Grouping, p: Float[Array, "T k"]) -> Float[Array, "R"]:
    """p of each row, 0 in padding rows."""
    empty = jnp.zeros(grouping.token_of_row.shape, p.dtype)
    return empty.at[grouping.row_of_slot.reshape(-1)].set(p.reshape(-1), unique_indices=True)


def sum_by_expert(recipe: Recipe, grouping: Grouping | None, g):
    """The sum over each expert's rows: [E, Fe], f32."""
    wide = g.astype(accumulator(g.dtype))
    if grouping is None or recipe.experts == 1:
        return jnp.sum(wide, axis=0, keepdims=True)
    return jax.ops.segment_sum(wide, grouping.expert_of_row, num_segments=recipe.experts)
