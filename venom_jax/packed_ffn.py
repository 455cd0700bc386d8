"""The six products of `venom_jax.ffn` over packed operands: what runs on sparse tensor cores.

The same algorithm with the same signature as the masked form, and the same numbers but for the order of summation.
Where the masked form multiplies zeros, here each sparse operand is packed once and read by the kernels of
`pallas_kernels`; the residuals are the packed activations, 9/16 of the dense array for each of the two copies.

Rows are tokens in one of two orders. Routed (or with groups formed in blocks of the batch) they are gathered into
groups, whose consecutive rows make fours. Otherwise they stay in batch order, and fours are interleaved by the packing.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.array_types import Array
from pallas_kernels.dispatch import Implementation
from pallas_kernels.grouped24 import api as grouped
from pallas_kernels.grouped24 import reference as dense_groups
from pallas_kernels.pack import activations, api, product
from pallas_kernels.pack.activations import Packed
from pallas_kernels.sparse24.api import sparse24
from venom_jax.formats import Sparse24
from venom_jax.masked import of_rows
from venom_jax.pattern import Recipe
from venom_jax.permutation import Grouping

FFN_RESIDUALS = "ffn_residuals"
"""Name of the packed activations for `jax.checkpoint_policies.save_only_these_names`: kernels are no `dot_general`."""


class Residuals(NamedTuple):
    """What the backward needs beside the inputs."""

    grouping: Grouping | None
    dense: Array | None
    """a [R, Fe] where a product reads it dense."""
    features: Packed | None
    """a packed along features."""
    tokens: Packed | None
    """a packed along tokens, where it is kept."""


def granule(recipe: Recipe) -> int:
    """Multiple that D, and a device's or an expert's part of F, must be.

    64 is the tile of 16-bit operands. Of 8 bits a tile is 128 columns wide, and every size is the contraction of some
    product; without sparsity they are XLA's, which takes 16.
    """
    if recipe.in_fp8:
        return 16 if recipe.is_dense else 128
    return 64


def unsupported(recipe: Recipe, d_model: int, d_ffn: int) -> str | None:
    """Why the packed form does not run this recipe at these sizes, or None."""
    if "y3" in recipe.weights or "dx" in recipe.weights:
        return f"weights = {recipe.weights}: weights sparse along d_ffn are an ablation of the reference"
    if recipe.weights and recipe.weight_mask != "threshold":
        return f"weight_mask = {recipe.weight_mask!r} runs in the reference only"
    if recipe.wgrad in ("split95", "mvue"):
        return f"wgrad = {recipe.wgrad!r} runs in the reference only"
    if recipe.hidden == "full" and recipe.routed:
        return "hidden = 'full' with routing is an ablation of the reference"
    if recipe.in_fp8 and not (recipe.is_dense or (recipe.activations and recipe.wgrad == "24")):
        return (
            f"activations = {recipe.activations} with wgrad = {recipe.wgrad!r} and precision = 'fp8' runs in the "
            "reference only: y2 is packed both ways, or nothing is sparse"
        )
    multiple = granule(recipe)
    if d_model % multiple or d_ffn % (multiple * recipe.experts):
        return (
            f"d_model = {d_model} and d_ffn / experts = {d_ffn} / {recipe.experts} must be multiples of {multiple}, "
            f"the tensor core's tile{' of 8-bit operands' if recipe.in_fp8 else ''}"
        )
    return None


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """The order of token rows, and the products over them."""

    recipe: Recipe
    grouping: Grouping | None
    tokens: int
    implementation: Implementation

    @property
    def interleaved(self) -> bool:
        return self.grouping is None

    def enter(self, x: Array) -> Array:
        """[T, D] -> rows [R, D], R a multiple of 64 (in 8 bits of 128); padding rows are zero."""
        if self.grouping is not None:
            return self.grouping.apply(x)
        return jnp.pad(x, ((0, -self.tokens % self.recipe.group_rows), (0, 0)))

    def leave(self, rows: Array, dtype: Any) -> Array:
        """Rows [R, D] -> [T, D], the copies of a token summed in f32."""
        if self.grouping is not None:
            return self.grouping.undo(rows).astype(dtype)
        return rows[: self.tokens].astype(dtype)

    def hidden(self, rows: Array, sparse: Sparse24 | None, dense: Array) -> Array:
        """rows [R, D] times the weight [D, F] of each row's expert: [R, Fe]; `sparse` is it packed along D."""
        options = {"b_k_major": True, "transpose_out": True, "implementation": self.implementation}
        if sparse is None:
            return self._dense(rows, jnp.moveaxis(dense.reshape(dense.shape[0], self.recipe.experts, -1), 1, 0))
        if self.grouping is None:
            return sparse24(sparse.values, sparse.metadata, rows, **options)
        return grouped.columns(sparse.values, sparse.metadata, rows, self.grouping.expert_sizes, **options)

    def pack_hidden(
        self,
        rows: Array,
        sparse: Sparse24 | None,
        dense: Array | None,
        *,
        by_neuron: bool,
        features: bool,
        tokens: bool,
        **scales: Any,
    ) -> api.PackedActivations:
        """`pack_activations` of rows times the weight of each row's expert, [D, F] or, `by_neuron`, [F, D].

        The product is never in memory. scales: of 8-bit operands, as `product.pack_product` takes them.
        """
        weights, options = self._weights(sparse, dense)
        along = {"features": features, "tokens": tokens, "transposed": sparse is None and not by_neuron}
        return product.pack_product(weights, rows, self.sizes, **along, **options, **scales)

    def take_hidden(
        self,
        rows: Array,
        sparse: Sparse24 | None,
        dense: Array | None,
        features: Packed,
        tokens: Packed,
        **scales: Any,
    ) -> api.TakenActivations:
        """`take_activations` of rows times the transposed weight [F, D] of each row's expert; scales as above."""
        weights, options = self._weights(sparse, dense)
        return product.take_product(weights, rows, features, tokens, self.sizes, **options, **scales)

    def _weights(self, sparse: Sparse24 | None, dense: Array | None) -> tuple[Any, dict[str, Any]]:
        options = {"interleaved": self.interleaved, "implementation": self.implementation}
        return dense if sparse is None else Packed(sparse.values, sparse.metadata), options

    def of_rows(self, scale: Array) -> Array:
        """As `masked.of_rows`."""
        return of_rows(scale, self.recipe, self.grouping)

    @property
    def sizes(self) -> Array | None:
        return None if self.grouping is None else self.grouping.expert_sizes

    def back(
        self, packed: Packed | None, dense_rows: Array | None, weight: Array, *, k_major: bool, **options: Any
    ) -> Array:
        """Activations [R, Fe] times the weight of each row's expert, [F, D] or, `k_major`, [D, F]: [R, D].

        options: of the product of packed activations.
        """
        experts = self.recipe.experts
        if packed is None:
            assert dense_rows is not None
            weight = weight.T if k_major else weight
            return self._dense(dense_rows, weight.reshape(experts, -1, weight.shape[1]))
        if self.grouping is None:
            return sparse24(*packed, weight, b_k_major=k_major, implementation=self.implementation, **options)
        b = weight.reshape(weight.shape[0], experts, -1) if k_major else weight.reshape(experts, -1, weight.shape[1])
        options["implementation"] = self.implementation
        return grouped.rows(*packed, b, self.grouping.expert_sizes, b_k_major=k_major, **options)

    def over_tokens(
        self,
        packed: Packed | None,
        dense_rows: Array | None,
        rows: Array,
        dtype: Any,
        *,
        transpose: bool,
        ordered: bool = False,
        **scales: Any,
    ) -> Array:
        """sum over tokens of activations [R, Fe] and rows [R, D]: [F, D], or [D, F] if `transpose`, in `dtype`.

        ordered: rows come as [D, R], in the order of `packed`'s tokens. scales: of 8-bit operands, and `promote`.
        """
        if packed is None:
            assert dense_rows is not None
            out = self._dense_over_tokens(dense_rows, rows, dtype)
            return out.T if transpose else out
        options: dict[str, Any] = {"transpose_out": transpose, "out_dtype": dtype, "b_k_major": ordered, **scales}
        options["implementation"] = self.implementation
        if self.grouping is None:
            return sparse24(*packed, rows, b_interleaved=not ordered, **options)
        out = grouped.contraction(*packed, rows, self.grouping.expert_sizes, **options)
        return out.reshape(out.shape[0], -1) if transpose else out.reshape(-1, out.shape[2])

    def _dense(self, rows: Array, by_expert: Array) -> Array:
        if self.grouping is None:
            return jnp.dot(rows, by_expert[0])  # in rows' dtype, summed in f32 all the same
        out = dense_groups.rows(rows, by_expert, self.grouping.expert_sizes, align=self.grouping.align)
        return out.astype(rows.dtype)

    def _dense_over_tokens(self, a: Array, rows: Array, dtype: Any) -> Array:
        if self.grouping is None:
            return jnp.dot(a.T, rows, preferred_element_type=dtype)
        out = dense_groups.contraction(a, rows, self.grouping.expert_sizes, align=self.grouping.align)
        return out.reshape(-1, out.shape[2]).astype(dtype)


def forward(
    recipe: Recipe,
    implementation: Implementation,
    x: Array,
    w1: Array,
    w2: Array,
    sparse_w1: Sparse24 | None,
    grouping: Grouping | None,
    *,
    by_neuron: bool = False,
) -> tuple[Array, Array, Residuals]:
    """y3 [T, D], the density of a, and residuals.

    w1, w2: the masters; w1 is [F, D] if `by_neuron`. sparse_w1: given where y1 reads W1 2:4.
    """
    order = TokenRows(recipe, grouping, x.shape[0], implementation)
    rows, dense = order.enter(x), None
    along = {"features": recipe.activations, "tokens": recipe.wgrad == "24" and recipe.token_copy == "kept"}
    if recipe.activations:
        packed = order.pack_hidden(rows, sparse_w1, w1.astype(x.dtype), by_neuron=by_neuron, **along)
    else:
        y1 = order.hidden(rows, sparse_w1, (w1.T if by_neuron else w1).astype(x.dtype))
        packed = api.pack_activations(y1, **along, interleaved=order.interleaved, implementation=implementation)
        dense = jax.nn.relu(y1)
    density = packed.positives / (x.shape[0] * recipe.top_k * (w2.shape[0] // recipe.experts))
    dense_y2 = None if dense is None else dense * dense
    y3 = order.leave(order.back(packed.squared, dense_y2, w2.astype(x.dtype), k_major=False), x.dtype)
    saved = Residuals(grouping, dense, packed.features, packed.tokens)
    return y3, density, checkpoint_name(saved, FFN_RESIDUALS)


def backward(
    recipe: Recipe,
    implementation: Implementation,
    x: Array,
    w1: Array,
    w2: Array,
    sparse_w2: Sparse24 | None,
    residuals: Residuals,
    dy3: Array,
    *,
    by_neuron: bool = False,
) -> tuple[Array, Array, Array]:
    """dx in x's dtype, and dW1 [D, F], dW2 [F, D] in the masters' dtypes, before any gradient through the threshold.

    w1, w2: the masters. by_neuron: w1 and dW1 are [F, D].
    """
    grouping, dense, features, tokens = residuals
    order = TokenRows(recipe, grouping, x.shape[0], implementation)
    if recipe.wgrad == "24" and tokens is None:
        tokens = _along_tokens(order, dense, features)
    rows, dy3_rows = order.enter(x), order.enter(dy3)
    if dense is None and tokens is None:
        assert features is not None
        dense = activations.unpack(features)
    dense_dy1 = None
    if dense is None:
        assert features is not None
        assert tokens is not None
        taken = order.take_hidden(dy3_rows, sparse_w2, w2.astype(x.dtype), features, tokens)
    else:
        dy2, options = order.hidden(dy3_rows, sparse_w2, w2.astype(x.dtype).T), {"interleaved": order.interleaved}
        taken = api.take_activations(dy2, features, tokens, **options, implementation=implementation)
        dense_dy1 = 2 * dy2 * dense
    dx = order.leave(order.back(taken.features, dense_dy1, w1.astype(x.dtype), k_major=not by_neuron), x.dtype)

    if tokens is None:
        assert dense is not None
        dw2 = order.over_tokens(None, dense * dense, dy3_rows, w2.dtype, transpose=False)
        dw1 = order.over_tokens(None, dense_dy1, rows, w1.dtype, transpose=not by_neuron)
    else:
        dw2 = order.over_tokens(taken.squared, None, dy3_rows, w2.dtype, transpose=False)
        dw1 = order.over_tokens(taken.tokens, None, rows, w1.dtype, transpose=not by_neuron)
    return dx, dw1, dw2


def _along_tokens(order: TokenRows, dense: Array | None, features: Packed | None) -> Packed | None:
    """What the forward would have packed along tokens: a, or what is left of it along features."""
    if dense is None:
        assert features is not None
        dense = activations.unpack(features)
    options = {"interleaved": order.interleaved, "implementation": order.implementation}
    return api.pack_activations(dense, features=False, tokens=True, **options).tokens
