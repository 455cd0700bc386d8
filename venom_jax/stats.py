"""What the method reports about itself: cheap numbers every step, and a diagnosis now and then."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float
from pallas_kernels.pack import reference as pack
from venom_jax import router
from venom_jax.ffn import weight_operand
from venom_jax.pattern import Recipe, WeightMask
from venom_jax.permutation import group_tokens
from venom_jax.threshold import transposable_mask


class FFNStats(NamedTuple):
    """Statistics of one call, of the same structure for every recipe.

    Attributes:
      density: share of the computed hidden activations that are positive, before any pruning.
      load: [E_max] tokens each expert got; zeros where nothing is routed.
    """

    density: Float[Array, ""]
    load: Float[Array, "E_max"]


class WeightMasks(NamedTuple):
    """Which entries of the weights S keeps, eight to a byte; for the flip rate between two diagnoses."""

    w1: Array
    w2: Array


def weight_masks(w1: Float[Array, "D F"], w2: Float[Array, "F D"], mask: WeightMask = "threshold") -> WeightMasks:
    """The masks of S(W1) and S(W2) along D."""

    def kept(w: Array, axis: int) -> Array:
        w = w.astype(jnp.float32)
        return pack.soft_threshold_mask(w, axis) if mask == "threshold" else transposable_mask(w)

    return WeightMasks(jnp.packbits(kept(w1, 0)), jnp.packbits(kept(w2, 1)))


def flip_rate(masks: WeightMasks, previous: WeightMasks) -> Float[Array, ""]:
    """Share of all mask entries that differ.

    Source: arXiv 2404.01847, where it is the measure of a stable sparse training.
    """
    flipped = [jnp.sum(jnp.bitwise_count(a ^ b), dtype=jnp.float32) for a, b in zip(masks, previous, strict=True)]
    return jnp.stack(flipped).sum() / sum(8 * a.size for a in masks)


def diagnose(
    x: Float[Array, "T D"],
    w1: Float[Array, "D F"],
    w2: Float[Array, "F D"],
    beta: Float[Array, "4"],
    bias: Float[Array, "E_max"],
    recipe: Recipe,
    previous: WeightMasks | None = None,
    *,
    learned: Float[Array, "E_max D"] | None = None,
) -> tuple[dict[str, Float[Array, ""]], WeightMasks]:
    """Everything worth knowing about one layer, at several times the cost of its forward.

    Energy is the sum of squares of y2 = relu(y1)^2. Returned, as f32 scalars:
      density: share of all F activations that are positive.
      dropped_features, dropped_tokens: share of the energy that 2:4 along neurons, or along interleaved tokens,
        removes (of the routed activations where the recipe routes).
      crowded: share of fours along neurons with more than two positives, so that 2:4 drops something.
      density_routed, kept_router, kept_oracle: among routed neurons, and the share of all energy in the experts that
        the router, or the best choice in hindsight, picks (1 without routing).
      flip_rate: share of weight-mask entries that changed since `previous`; absent without it.
    and the weight masks for the next call.
    """
    operand = weight_operand("y1", recipe, w1, beta, None, x.dtype)
    a = jax.nn.relu(jnp.dot(x, operand, preferred_element_type=jnp.float32))
    total = _energy(a)
    routed = oracle = a
    result = {"density": jnp.mean(a > 0, dtype=jnp.float32)}
    route = jnp.zeros((x.shape[0], 1), jnp.int32)
    if recipe.routed:
        route = router.route(x, w1, recipe, bias=bias, learned=learned)
        wanted = jnp.square(a).reshape(x.shape[0], recipe.experts, -1).sum(-1)
        best = jax.lax.top_k(wanted.at[:, : recipe.shared].set(jnp.inf), recipe.top_k)[1]
        routed, oracle = (_only(a, chosen, recipe.experts) for chosen in (route, best))
    result["kept_router"] = _ratio(_energy(routed), total)
    result["kept_oracle"] = _ratio(_energy(oracle), total)
    share = recipe.top_k / recipe.experts
    result["density_routed"] = jnp.mean(routed > 0, dtype=jnp.float32) / share
    result["dropped_features"] = 1 - _ratio(_energy(jnp.where(pack.select24(routed), routed, 0)), _energy(routed))
    fours = routed.reshape(routed.shape[0], -1, 4)
    result["crowded"] = jnp.mean(jnp.sum(fours > 0, axis=-1) > 2, dtype=jnp.float32) / share
    grouping = group_tokens(
        route, recipe.experts, align=recipe.group_rows, order=recipe.token_order, blocks=recipe.token_blocks
    )
    rows = grouping.apply(routed).reshape(grouping.token_of_row.shape[0], recipe.experts, -1)
    own = jnp.take_along_axis(rows, grouping.expert_of_row[:, None, None], axis=1)[:, 0]
    result["dropped_tokens"] = 1 - _ratio(_energy(jnp.where(pack.select24(own, 0), own, 0)), _energy(own))
    masks = weight_masks(w1, w2, recipe.weight_mask)
    if previous is not None:
        result["flip_rate"] = flip_rate(masks, previous)
    return result, masks


def _energy(a: Array) -> Array:
    return jnp.sum(jnp.square(jnp.square(a.astype(jnp.float32))))


def _ratio(part: Array, whole: Array) -> Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 1)


def _only(a: Array, chosen: Array, experts: int) -> Array:
    """The activations of the chosen experts, zero elsewhere."""
    keep = jax.nn.one_hot(chosen, experts, dtype=bool).any(axis=1)
    return jnp.where(jnp.repeat(keep, a.shape[1] // experts, axis=1), a, 0)
