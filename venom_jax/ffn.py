"""The sparse FFN: six matrix products, forward and backward, each with exactly one sparse operand.

    y1 = x S(W1)      y2 = relu(y1)^2      y3 = y2 W2
    dy2 = dy3 S(W2)^T     dy1 = 2 dy2 a        dx = dy1 W1^T     dW2 = y2^T dy3     dW1 = x^T dy1

Here in reference form: pruned operands are masked arrays, products are dense within a group. The backward is this
algorithm, not the derivative of the forward: the forward reads W2 dense and the backward reads it sparse, W1 the other
way round, and the weight gradients prune the activations once more, along tokens.

Source: arXiv 2602.06183, algorithms 1 and 2; docs/method.md says what is ours.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float, Int
from pallas_kernels.pack import reference as pack
from pallas_kernels.pack.api import pack_thresholded
from venom_jax import fp8, masked, mvue, packed_ffn
from venom_jax.dispatch import Implementation, Kernels, choose_kernels
from venom_jax.formats import Sparse24
from venom_jax.fp8 import EightBitWeights
from venom_jax.fp8 import packed as packed_fp8
from venom_jax.fp8 import reference as reference_fp8
from venom_jax.masked import rows_in_groups, rows_of_kernels
from venom_jax.pattern import WEIGHT_GEMMS, Recipe, WeightGemm
from venom_jax.permutation import Grouping
from venom_jax.threshold import sparse_weight, threshold_gradient

# The axis of the weight along which each product is 2:4: its contraction.
_THRESHOLD_AXIS: dict[WeightGemm, int] = {"y1": 0, "y3": 0, "dy2": 1, "dx": 1}


class PackedWeights(NamedTuple):
    """The two packed weights of a layer: data without gradient, made once per optimizer step."""

    w1: Sparse24
    """beta1 S(W1) along D, for y1."""
    w2: Sparse24
    """beta2 S(W2) along D, for dy2."""


class _Residuals(NamedTuple):
    x: Array
    w1: Array
    w2: Array
    beta: Array
    packed: PackedWeights | None
    grouping: Grouping | None
    a: Array


def pack_weights(
    w1: Float[Array, "D F"],
    w2: Float[Array, "F D"],
    beta: Float[Array, "4"],
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    recipe: Recipe | None = None,
    implementation: Kernels | None = None,
) -> PackedWeights | EightBitWeights:
    """round(beta_y1 S(W1)) and round(beta_dy2 S(W2)), both 2:4 along D, packed for the tensor core.

    With a recipe in eight bits all that its products read of the weights, dense where it says so.

    Args:
      w1, w2: f32 masters.
      beta: the frozen scales of y1, y3, dy2, dx (`venom_jax.threshold.optimal_scale`).
      dtype: of the stored values; 8-bit ones are e4m3.
      recipe: needed where its precision is "fp8".
      implementation: "reference", "hopper", or None to choose by device, sizes and dtypes.

    Raises:
      ValueError, NotImplementedError: as `pallas_kernels.pack.api.pack_thresholded`.
    """

    if recipe is not None and recipe.in_fp8:
        return fp8.pack_weights(w1, w2, beta, recipe, implementation)

    def pack_one(gemm: WeightGemm, w) -> Sparse24:
        axis, scale = _THRESHOLD_AXIS[gemm], beta[WEIGHT_GEMMS.index(gemm)]
        found = pack_thresholded(w, scale, axis=axis, dtype=dtype, implementation=implementation)
        return Sparse24(found.values, found.metadata, (w.shape[0], w.shape[1]), axis)

    return jax.lax.stop_gradient(PackedWeights(pack_one("y1", w1), pack_one("dy2", w2)))


def sparse_ffn(
    x: Float[Array, "T D"],
    w1: Float[Array, "D F"],
    w2: Float[Array, "F D"],
    route: Int[Array, "T k"] | None = None,
    beta: Float[Array, "4"] | None = None,
    *,
    recipe: Recipe,
    packed: PackedWeights | EightBitWeights | None = None,
    implementation: Implementation | None = None,
    return_density: bool = False,
) -> Any:
    """y3 = relu(x S(W1))^2 W2 over the neurons of each token's experts, with the sparse backward of `recipe`.

    Args:
      x: tokens, in the compute dtype (f32 or bf16); products accumulate in f32.
      w1, w2: master weights; cast to x's dtype after thresholding. Gradients come back in their dtype.
      route: the experts of each token (`venom_jax.router.route`); None without routing.
      beta: frozen scales of the weight-sparse products in the order y1, y3, dy2, dx; None is all 1.
      recipe: what is sparse.
      packed: `pack_weights(...)`, to threshold (in eight bits: to cast) once per optimizer step instead of once per
        call. The caller keeps it in step with w1, w2 and beta. Not for transposable masks.
      implementation: "reference", "hopper", or None to choose (`venom_jax.dispatch.choose_kernels`). A named one never
        falls back.
      return_density: also return the share of the computed hidden activations that are positive, f32 [].

    Returns:
      y3 [T, D] in x's dtype, or (y3, density).

    Raises:
      ValueError: sizes that the recipe cannot split, or a route that is missing or not asked for.
      NotImplementedError: the named implementation does not run here, or not this recipe.
    """
    recipe.check(*w1.shape)
    d_model, d_ffn = w1.shape
    kernels = choose_kernels(implementation, recipe, d_model, d_ffn, x.dtype)
    if w2.shape != w1.shape[::-1] or x.shape[1] != w1.shape[0]:
        raise ValueError(f"shapes do not fit: x {x.shape}, w1 {w1.shape}, w2 {w2.shape}; want [T,D], [D,F], [F,D].")
    if recipe.routed != (route is not None):
        wanted = f"route of shape ({x.shape[0]}, {recipe.top_k})" if recipe.routed else "route=None"
        raise ValueError(f"recipe with experts = {recipe.experts} takes {wanted}, got {route}.")
    if route is not None and route.shape != (x.shape[0], recipe.top_k):
        raise ValueError(f"route has shape {route.shape}; the recipe takes {(x.shape[0], recipe.top_k)}.")
    if packed is not None and recipe.weight_mask != "threshold":
        raise ValueError(f"packed weights are soft-thresholded, weight_mask = {recipe.weight_mask!r}; use packed=None.")
    fp8.check_packed(recipe, packed)
    if recipe.is_dense and not recipe.in_fp8:
        # Results in x's dtype (accumulated in f32 all the same): f32 results would give f32 operands to the backward.
        a = jax.nn.relu(x @ w1.astype(x.dtype))
        y, density = (a * a) @ w2.astype(x.dtype), masked.sampled_density(a)
    else:
        beta = jnp.ones(len(WEIGHT_GEMMS), jnp.float32) if beta is None else beta
        y, density = _sparse(recipe, kernels, x, w1, w2, beta, packed, route)
    return (y, jax.lax.stop_gradient(density)) if return_density else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sparse(recipe: Recipe, kernels: Kernels | None, x, w1, w2, beta, packed, route):
    """(y3, density); `kernels` None is the masked form, else the packed one over these kernels."""
    return _forward(recipe, kernels, x, w1, w2, beta, packed, route)[0]


def _forward(recipe, kernels, x, w1, w2, beta, packed, route):
    if recipe.in_fp8:
        return _fp8_forward(recipe, kernels, x, w1, w2, beta, packed, route)
    if kernels is not None:
        return _packed_forward(recipe, kernels, x, w1, w2, beta, packed, route)
    grouping = rows_in_groups(recipe, route, x.shape[0])
    first = weight_operand("y1", recipe, w1, beta, packed, x.dtype)
    second = weight_operand("y3", recipe, w2, beta, packed, x.dtype)
    y3, density, a = masked_forward(recipe, x, first, second, grouping)
    return (y3, density), _Residuals(x, w1, w2, beta, packed, grouping, a)


def masked_forward(recipe: Recipe, x, w1, w2, grouping: Grouping | None):
    """(y3, density, a); w1, w2: the operands of y1 and y3, thresholded where the recipe says so, in x's dtype."""
    a = jax.nn.relu(masked.hidden(recipe, grouping, x, w1))
    density = jnp.sum(a > 0, dtype=jnp.float32) / (x.shape[0] * recipe.top_k * (w1.shape[1] // recipe.experts))
    if recipe.activations and "y3" not in recipe.weights:
        a = jnp.where(pack.select24(a), a, 0)
    y3 = masked.over_features(grouping, a * a, masked.by_neuron(w2, recipe))
    y3 = (y3 if grouping is None else grouping.undo(y3)).astype(x.dtype)
    return y3, density, a


def _backward(recipe, kernels, residuals, cotangents):
    dy3 = cotangents[0]
    if recipe.in_fp8:
        return _fp8_backward(recipe, kernels, residuals, dy3)
    if kernels is not None:
        return _packed_backward(recipe, kernels, residuals, dy3)
    x, w1, w2, beta, packed, grouping, a = residuals
    second = weight_operand("dy2", recipe, w2, beta, packed, x.dtype)
    first = weight_operand("dx", recipe, w1, beta, packed, x.dtype)
    dx, dw1, dw2 = masked_backward(recipe, x, second, first, grouping, a, dy3)
    return through_thresholds(recipe, w1, w2, beta, dx, dw1, dw2)


def masked_backward(recipe: Recipe, x, w2, w1, grouping: Grouping | None, a, dy3):
    """(dx, dW1 [D, F], dW2 [F, D]) before any threshold's gradient; w2, w1: the operands of dy2 and dx."""
    dy2 = masked.hidden(recipe, grouping, dy3, w2.T)
    dy1 = 2 * dy2 * a
    sparse_dy1 = recipe.activations and "dx" not in recipe.weights
    dy1_dx = jnp.where(pack.select24(a), dy1, 0) if sparse_dy1 else dy1
    dx = masked.over_features(grouping, dy1_dx, masked.by_neuron(w1.T, recipe))
    dx = (dx if grouping is None else grouping.undo(dx)).astype(x.dtype)

    y2_w, dy1_w = _operands_over_tokens(recipe, grouping, a, dy1, dy3)
    x_rows, dy3_rows = (t if grouping is None else grouping.apply(t) for t in (x, dy3))
    dw2 = masked.over_tokens(grouping, y2_w, dy3_rows).reshape(w2.shape)
    dw1 = jnp.moveaxis(masked.over_tokens(grouping, x_rows, dy1_w), 0, 1).reshape(w1.shape)
    return dx, dw1, dw2


def through_thresholds(recipe: Recipe, w1, w2, beta, dx, dw1, dw2):
    """Through the thresholds of the forward, and to the masters' dtype; beta, packed and route get none."""
    if "y1" in recipe.weights:
        dw1 = threshold_gradient(w1, dw1, beta[0], 0, recipe.threshold_grad)
    if "y3" in recipe.weights:
        dw2 = threshold_gradient(w2, dw2, beta[1], 0, recipe.threshold_grad)
    return dx, dw1.astype(w1.dtype), dw2.astype(w2.dtype), None, None, None


_sparse.defvjp(_forward, _backward)


def _packed_forward(recipe, kernels, x, w1, w2, beta, packed, route):
    grouping = rows_of_kernels(recipe, route, x.shape[0], kernels)
    if packed is None and recipe.weights:
        packed = pack_weights(w1, w2, beta, dtype=x.dtype, implementation=kernels)
    sparse_w1 = packed.w1 if packed is not None and "y1" in recipe.weights else None
    y3, density, saved = packed_ffn.forward(recipe, kernels, x, w1, w2, sparse_w1, grouping)
    return (y3, density), (x, w1, w2, beta, packed, saved)


def _packed_backward(recipe, kernels, residuals, dy3):
    x, w1, w2, beta, packed, saved = residuals
    sparse_w2 = packed.w2 if packed is not None and "dy2" in recipe.weights else None
    dx, dw1, dw2 = packed_ffn.backward(recipe, kernels, x, w1, w2, sparse_w2, saved, dy3)
    return through_thresholds(recipe, w1, w2, beta, dx, dw1, dw2)


def _fp8_forward(recipe, kernels, x, w1, w2, beta, packed, route):
    if packed is None:
        packed = fp8.pack_weights(w1, w2, beta, recipe, kernels or "reference")
    form, order = (reference_fp8, rows_in_groups) if kernels is None else (packed_fp8, rows_of_kernels)
    grouping = order(recipe, route, x.shape[0], kernels or "reference")
    y3, density, saved = form.forward(recipe, kernels, x, packed.y1(recipe), packed.w2, grouping)
    return (y3, density), (w1, w2, beta, packed, saved)


def _fp8_backward(recipe, kernels, residuals, dy3):
    w1, w2, beta, packed, saved = residuals
    form = reference_fp8 if kernels is None else packed_fp8
    dtypes = (w1.dtype, w2.dtype)
    dx, dw1, dw2 = form.backward(recipe, kernels, packed.dy2(recipe), packed.w1, saved, dy3, dtypes)
    return through_thresholds(recipe, w1, w2, beta, dx, dw1, dw2)


def weight_operand(gemm: WeightGemm, recipe: Recipe, w, beta, packed: PackedWeights | None, dtype) -> Array:
    """The weight as product `gemm` reads it: round(beta S(w)), or round(w)."""
    if gemm not in recipe.weights:
        return w.astype(dtype)
    if packed is not None and gemm in ("y1", "dy2"):
        return (packed.w1 if gemm == "y1" else packed.w2).to_dense().astype(dtype)
    s = sparse_weight(w.astype(jnp.float32), _THRESHOLD_AXIS[gemm], recipe.weight_mask)
    return (beta[WEIGHT_GEMMS.index(gemm)] * s).astype(dtype)


def _operands_over_tokens(recipe: Recipe, grouping: Grouping | None, a, dy1, dy3):
    """y2 and dy1 as the weight gradients read them, pruned along tokens where the recipe says so."""
    if recipe.wgrad == "mvue":
        first, second = jax.random.split(mvue.key_of_bits(dy3))
        return mvue.unbiased24(a * a, first), mvue.unbiased24(dy1, second)
    kept = masked.kept_along_tokens(recipe, grouping, a)
    a_w, dy1_w = (a, dy1) if kept is None else (jnp.where(kept, a, 0), jnp.where(kept, dy1, 0))
    return a_w * a_w, dy1_w
