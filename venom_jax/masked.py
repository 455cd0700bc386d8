"""What the two reference forms of the FFN share: rows in groups, and products of masked arrays in them.

`venom_jax.ffn` has the form in x's dtype, `venom_jax.fp8.reference` the one in eight bits.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Bool, Float, accumulator
from pallas_kernels.dispatch import Implementation
from pallas_kernels.grouped24 import reference as grouped
from pallas_kernels.pack import reference as pack
from venom_jax.pattern import Recipe
from venom_jax.permutation import Grouping, group_tokens


def rows_in_groups(recipe: Recipe, route, tokens: int, kernels: Implementation = "reference") -> Grouping | None:
    """The order of rows that the recipe needs; None is the batch as it comes."""
    if route is None:
        if recipe.wgrad == "dense":
            return None
        route = jnp.zeros((tokens, 1), jnp.int32)
    options = {"order": recipe.token_order, "blocks": recipe.token_blocks, "implementation": kernels}
    return group_tokens(route, recipe.experts, align=recipe.group_rows, **options)


def rows_of_kernels(recipe: Recipe, route, tokens: int, kernels: Implementation) -> Grouping | None:
    """As `rows_in_groups`, for the packed form, which interleaves a batch itself where that is all there is to do."""
    in_batch_order = route is None and recipe.token_order == "interleaved" and recipe.token_blocks == 1
    return None if in_batch_order else rows_in_groups(recipe, route, tokens, kernels)


def hidden(recipe: Recipe, grouping: Grouping | None, tokens, w) -> Array:
    """[T, D] x [D, F] for each token's own neurons: rows [R, Fe], in the compute dtype."""
    if recipe.hidden == "full" and recipe.routed and grouping is not None:
        slices = dot(tokens, w).reshape(tokens.shape[0], recipe.experts, -1)
        slices = slices.astype(tokens.dtype)
        return slices.at[grouping.token_of_row, grouping.expert_of_row].get(mode="fill", fill_value=0)
    rows = tokens if grouping is None else grouping.apply(tokens)
    by_expert = jnp.moveaxis(w.reshape(w.shape[0], recipe.experts, -1), 1, 0)
    return over_features(grouping, rows, by_expert).astype(tokens.dtype)


def over_features(grouping: Grouping | None, rows, by_expert) -> Array:
    """Rows [R, K] times the matrix [K, N] of each row's expert, of [E, K, N]: [R, N], as summed."""
    if grouping is None:
        return dot(rows, by_expert[0])
    return grouped.rows(rows, by_expert, grouping.expert_sizes, align=grouping.align)


def over_tokens(grouping: Grouping | None, a, b) -> Array:
    """sum over each expert's rows of a [R, M] and b [R, N]: [E, M, N], as summed."""
    if grouping is None:
        return dot(a.T, b)[None]
    return grouped.contraction(a, b, grouping.expert_sizes, align=grouping.align)


def by_neuron(w, recipe: Recipe) -> Array:
    """[F, D] -> [E, Fe, D]."""
    return w.reshape(recipe.experts, -1, w.shape[1])


def kept_along_tokens(recipe: Recipe, grouping: Grouping | None, a) -> Bool[Array, "R Fe"] | None:
    """Which activations the weight gradients read: two of four along tokens, by magnitude; None is all."""
    if recipe.wgrad == "dense" or grouping is None:
        return None
    kept = pack.select24(a, axis=0)
    if recipe.wgrad == "24":
        return kept
    features = a.shape[1]
    num_dense = features // 20 // 128 * 128
    group, groups = grouping.group_of_row, grouping.group_sizes.shape[0]
    density = jax.ops.segment_sum((a > 0).astype(jnp.float32), group, num_segments=groups)
    return pack.keep_densest(kept, density, group, num_dense)


def dot(a, b) -> Array:
    return jnp.dot(a, b, preferred_element_type=accumulator(a.dtype))


def of_rows(of_neurons: Array, recipe: Recipe, grouping: Grouping | None) -> Array:
    """Numbers of neurons [F] as they apply to rows: [F], or [R, Fe] where each row has its own expert."""
    return of_neurons if grouping is None else of_neurons.reshape(recipe.experts, -1)[grouping.expert_of_row]


def sampled_density(a: Float[Array, "T F"]) -> Float[Array, ""]:
    """Share of positive activations of at most 2,048 tokens, evenly spaced.

    The sparse forms count as they pack; reading all of `a` once more would be 2 % of a dense layer's time.
    """
    return jnp.mean(a[:: -(-a.shape[0] // 2048)] > 0, dtype=jnp.float32)
