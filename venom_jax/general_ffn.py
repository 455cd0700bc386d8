"""The feed-forward layer in general: gates, other activations, biases, dropout, experts whose outputs are weighted.

    g = x S(W1) + b1     u = x S(Wu) + bu     h = phi(g) * u     y = sum over a token's experts of p h W2
    dh = p dy S(W2)^T    du = dh phi(g)       dg = dh phi'(g) u
    dx = dg W1^T + du Wu^T     dW2 = h^T (p dy)     dW1 = x^T dg     dWu = x^T du     dp = <h, dy S(W2)^T>

Without a gate u is 1. phi is one of `venom_jax.nonlinearity`; where the gate is closed h, dg and du are zero, so what
`venom_jax.ffn` says of the squared ReLU holds for all of them: two of each four h are kept by magnitude (without a gate
by that of relu(g)), dg and du live where h does, and for the weight gradients all are pruned once more along tokens.
Without a gate, a bias, dropout and weights p, and with the squared ReLU, this is `venom_jax.sparse_ffn`.

Here in reference form, masked arrays and dense products; `venom_jax.packed_general_ffn` is what runs on kernels.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float, Int, accumulator
from pallas_kernels.grouped24 import reference as grouped
from pallas_kernels.pack import reference as pack
from pallas_kernels.pack.api import pack_thresholded
from pallas_kernels.pack.gated import gated_gradients, gated_product
from venom_jax import nonlinearity as activations
from venom_jax import packed_general_ffn as packed_form
from venom_jax.dispatch import Implementation, Kernels, choose_kernels
from venom_jax.ffn import PackedWeights, weight_operand
from venom_jax.ffn_parts import Form, Opening, Operands, Weights, sum_by_expert, weights_of_rows
from venom_jax.formats import Sparse24
from venom_jax.masked import rows_in_groups, rows_of_kernels
from venom_jax.nonlinearity import Activation
from venom_jax.pattern import WEIGHT_GEMMS, Recipe
from venom_jax.permutation import Grouping
from venom_jax.router import Axis
from venom_jax.sharded_ffn import gather, gather_packed, scatter
from venom_jax.threshold import threshold_gradient

_COLUMNS, _ROWS = 1, 0


class Packed(NamedTuple):
    """The weights that products read 2:4, packed once per optimizer step."""

    w1: Sparse24
    w2: Sparse24
    up: Sparse24 | None = None


def pack_weights(
    weights: Weights,
    beta: Float[Array, "4"],
    beta_up: Float[Array, ""] | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: Kernels | None = None,
) -> Packed:
    """round(beta S(W)) of W1, Wu and W2, 2:4 along D; arguments and errors as `venom_jax.pack_weights`."""

    def pack_one(w: Array, scale: Array, axis: int) -> Sparse24:
        found = pack_thresholded(w, scale, axis=axis, dtype=dtype, implementation=implementation)
        return Sparse24(found.values, found.metadata, (w.shape[0], w.shape[1]), axis)

    up = None
    if weights.up is not None:
        up = pack_one(weights.up, beta[0] if beta_up is None else beta_up, 0)
    packed = Packed(pack_one(weights.w1, beta[0], 0), pack_one(weights.w2, beta[WEIGHT_GEMMS.index("dy2")], 1), up)
    return jax.lax.stop_gradient(packed)


def feed_forward(
    x: Float[Array, "T D"],
    weights: Weights,
    route: Int[Array, "T k"] | None = None,
    route_weights: Float[Array, "T k"] | None = None,
    beta: Float[Array, "4"] | None = None,
    beta_up: Float[Array, ""] | None = None,
    *,
    recipe: Recipe,
    activation: Activation = "relu2",
    clamp: float = activations.CLAMP,
    dropout: float = 0.0,
    key: Array | None = None,
    packed: Packed | PackedWeights | None = None,
    implementation: Implementation | None = None,
    axis: Axis | None = None,
    partial: bool = False,
    return_density: bool = False,
) -> Any:
    """y = sum over each token's experts of p (phi(x W1 + b1) * (x Wu + bu)) W2, with the sparse backward of `recipe`.

    Args:
      x: tokens in the compute dtype.
      weights: masters, of which those that are None are left out. Gradients come back in their dtypes.
      route: the experts of each token, distinct; None without routing.
      route_weights: p, f32, with a gradient; None is 1. The kernels divide by p: where it is 0 they give 0 for dp.
      beta, beta_up: frozen scales of the sparse weights (`venom_jax.sparse_ffn`), and that of Wu; None is 1.
      recipe: what is sparse. What only `venom_jax.sparse_ffn` has is refused: products sparse along F,
        transposable masks, wgrad other than "24" and "dense", token_copy = "rebuilt", hidden = "full",
        precision = "fp8".
      activation, clamp: see `venom_jax.nonlinearity`.
      dropout: the rate at which hidden activations are zeroed, and the others divided by 1 - rate, before anything is
        pruned; needs `key`. A recipe sees the same mask in both forms.
      packed: `pack_weights(...)` of these weights; without a gate `venom_jax.pack_weights` will do.
      implementation: "reference", "hopper", or None to choose.
      axis: inside `jax.shard_map`, the mesh axis over whose devices the neurons (or experts) are cut; the weights are
        then this device's part, and are gathered for each pass.
      partial: entries of route that are equal to the number of experts stand for experts elsewhere, and give zeros.
      return_density: also return the share of computed gates that are open, f32 []; where `partial`, of all copies.

    Raises:
      ValueError: sizes, arrays or options that do not belong together.
      NotImplementedError: the recipe, or the named implementation here.
    """
    form = _form(x, weights, route, route_weights, recipe, activation, clamp, dropout, key, implementation, axis)
    form = dataclasses.replace(form, partial=partial)
    ones = jnp.ones(len(WEIGHT_GEMMS), jnp.float32)
    beta = ones if beta is None else beta
    beta_up = ones[0] if beta_up is None else beta_up
    if isinstance(packed, PackedWeights):
        packed = Packed(packed.w1, packed.w2)
    if packed is not None and (packed.up is None) != (weights.up is None):
        raise ValueError("packed weights and masters disagree about a gate: pack with general_ffn.pack_weights.")
    key_data = None if not dropout or key is None else jax.random.key_data(_typed(key))
    y, density = _layer(form, x, weights, route_weights, beta, beta_up, packed, route, key_data)
    if dropout:
        y = (y.astype(jnp.float32) / (1 - dropout)).astype(y.dtype)
    return (y, jax.lax.stop_gradient(density)) if return_density else y


def _form(x, weights, route, route_weights, recipe, activation, clamp, dropout, key, implementation, axis) -> Form:
    d_model, d_ffn = weights.w1.shape[0], weights.w1.shape[1] * (1 if axis is None else jax.lax.axis_size(axis))
    activations.check(activation, clamp)
    recipe.check(d_model, d_ffn)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout}: use a rate from 0 to below 1.")
    if dropout and key is None:
        raise ValueError(f"dropout = {dropout} draws a mask: give key, a new one for each step, or dropout = 0.")
    if weights.w2.shape != weights.w1.shape[::-1] or x.shape[1] != d_model:
        shapes = f"x {x.shape}, w1 {weights.w1.shape}, w2 {weights.w2.shape}"
        raise ValueError(f"shapes do not fit: {shapes}; want [T, D], [D, F], [F, D].")
    if weights.up is not None and weights.up.shape != weights.w1.shape:
        raise ValueError(f"up has shape {weights.up.shape}; the gate has {weights.w1.shape}.")
    if weights.up is None and weights.b_up is not None:
        raise ValueError("b_up is the bias of up, and there is no up: leave it out, or give a gated layer's weights.")
    for name, bias in (("b1", weights.b1), ("b_up", weights.b_up)):
        if bias is not None and bias.shape != weights.w1.shape[1:]:
            raise ValueError(f"{name} has shape {bias.shape}; want {weights.w1.shape[1:]}, one for each neuron.")
    if recipe.routed != (route is not None) or (route is not None and route.shape != (len(x), recipe.top_k)):
        wanted = f"route of shape {(len(x), recipe.top_k)}" if recipe.routed else "route=None"
        got = None if route is None else f"one of shape {route.shape}"
        raise ValueError(f"recipe with experts = {recipe.experts} takes {wanted}, got {got}.")
    if route_weights is not None and (route is None or route_weights.shape != route.shape):
        raise ValueError(f"route_weights {route_weights.shape} weigh the experts of a route; got route {route}.")
    if reason := _ablation(recipe):
        raise NotImplementedError(f"{reason}: of the plain layer only, `venom_jax.sparse_ffn`; use a recipe without.")
    kernels = choose_kernels(implementation, recipe, d_model, d_ffn, x.dtype, local=axis is not None)
    if recipe.is_dense:
        kernels = None  # nothing is sparse: the masked form is the plain layer
    if kernels is not None and (reason := packed_form.unsupported(x.dtype, gated=weights.up is not None)):
        if implementation is not None:
            raise NotImplementedError(f"implementation = 'hopper': {reason}. Use None or 'reference'.")
        kernels = None
    return Form(recipe, kernels, activation, clamp, dropout, axis)


def _ablation(recipe: Recipe) -> str | None:
    if "y3" in recipe.weights or "dx" in recipe.weights:
        return f"weights = {recipe.weights}"
    if recipe.weights and recipe.weight_mask != "threshold":
        return f"weight_mask = {recipe.weight_mask!r}"
    if recipe.in_fp8:
        return "precision = 'fp8'"
    if recipe.wgrad not in ("24", "dense"):
        return f"wgrad = {recipe.wgrad!r}"
    if recipe.token_copy != "kept":
        return f"token_copy = {recipe.token_copy!r}"
    return "hidden = 'full'" if recipe.routed and recipe.hidden == "full" else None


def _typed(key: Array) -> Array:
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer(form: Form, x, weights, p, beta, beta_up, packed, route, key_data):
    """(y, density), before what dropout divides by."""
    return _forward(form, x, weights, p, beta, beta_up, packed, route, key_data)[0]


def _forward(form, x, weights, p, beta, beta_up, packed, route, key_data):
    grouping = _grouping(form, route, len(x))
    if packed is None and form.recipe.weights and form.kernels is not None:
        packed = pack_weights(weights, beta, beta_up, dtype=x.dtype, implementation=form.kernels)
    run = masked_forward if form.kernels is None else packed_form.forward
    operands = _operands(form, weights, beta, beta_up, packed, x.dtype, ("y1", "y3"))
    y, density, saved = run(form, x, operands, grouping, p, Opening(form, grouping, len(x), weights, key_data))
    return (y, density), (x, weights, p, beta, beta_up, packed, grouping, saved)


def _grouping(form: Form, route: Array | None, tokens: int) -> Grouping | None:
    """The order of rows. What is computed elsewhere makes a last group, of which no product hears."""
    order = rows_in_groups if form.kernels is None else rows_of_kernels
    kernels = form.kernels or "reference"
    if not (form.partial and form.recipe.routed):
        return order(form.recipe, route, tokens, kernels)
    recipe = dataclasses.replace(form.recipe, experts=form.recipe.experts + 1)
    grouping = order(recipe, route, tokens, kernels)
    assert grouping is not None, "a route makes groups"
    return dataclasses.replace(grouping, group_sizes=grouping.group_sizes[: -recipe.token_blocks])


def _backward(form, residuals, cotangents):
    x, weights, p, beta, beta_up, packed, grouping, saved = residuals
    run = masked_backward if form.kernels is None else packed_form.backward
    operands = _operands(form, weights, beta, beta_up, packed, x.dtype, ("dx", "dy2"), after=x)
    dx, found, dp = run(form, x, operands, grouping, p, saved, cotangents[0])
    if "y1" in form.recipe.weights:
        through = functools.partial(threshold_gradient, axis=0, gradient=form.recipe.threshold_grad)
    else:

        def through(w, gradient, beta):
            del w, beta
            return gradient

    def of_master(name: str, scale, dimension: int) -> Any:
        master, gradient = getattr(weights, name), getattr(found, name)
        if master is None:
            return None
        whole = gradient.astype(master.dtype)
        part = whole if form.axis is None else scatter(whole, form.axis, dimension)
        return (part if scale is None else through(master, part, scale)).astype(master.dtype)

    gradient = Weights(
        of_master("w1", beta[0], _COLUMNS),
        of_master("w2", None, _ROWS),
        of_master("up", beta_up, _COLUMNS),
        of_master("b1", None, 0),
        of_master("b_up", None, 0),
    )
    return dx, gradient, dp, None, None, None, None, None


_layer.defvjp(_forward, _backward)


def _operands(form, weights, beta, beta_up, packed, dtype, gemms, after=None) -> Operands:
    """The operands of the forward's products, or of the backward's, gathered where devices hold parts."""

    def whole(part, dimension) -> Any:
        return part if form.axis is None or part is None else gather(part, form.axis, dimension, after=after)

    def whole_packed(part):
        return part if form.axis is None or part is None else gather_packed(part, form.axis, after=after)

    first, second = gemms
    recipe = form.recipe
    if form.kernels is None:
        up = own = own_up = None
        if packed is not None:
            own, own_up = (PackedWeights(first_packed, packed.w2) for first_packed in (packed.w1, packed.up))
        if weights.up is not None:
            up = weight_operand(first, recipe, weights.up, beta.at[0].set(beta_up), own_up, dtype)
        w1 = weight_operand(first, recipe, weights.w1, beta, own, dtype)
        w2 = weight_operand(second, recipe, weights.w2, beta, own, dtype)
        return Operands(whole(w1, _COLUMNS), whole(w2, _ROWS), whole(up, _COLUMNS))
    w1, w2 = weights.w1.astype(dtype), weights.w2.astype(dtype)
    up = None if weights.up is None else weights.up.astype(dtype)
    reads_sparse_w1, reads_sparse_w2 = (gemm in recipe.weights for gemm in (first, second))
    sparse_w1 = sparse_up = sparse_w2 = None
    if reads_sparse_w1:  # where the packed operand stands in, the dense one is not read
        sparse_w1, sparse_up = whole_packed(packed.w1), whole_packed(packed.up)
    else:
        w1, up = whole(w1, _COLUMNS), whole(up, _COLUMNS)
    if reads_sparse_w2:
        sparse_w2 = whole_packed(packed.w2)
    else:
        w2 = whole(w2, _ROWS)
    return Operands(w1, w2, up, sparse_w1, sparse_up, sparse_w2)


class _Saved(NamedTuple):
    """a = relu(g) and u, where h is kept."""

    a: Array
    u: Array | None


def masked_forward(form: Form, x, operands: Operands, grouping: Grouping | None, p, opening: Opening):
    """(y, density, what the backward needs)."""
    recipe, rows = form.recipe, x if grouping is None else grouping.apply(x)
    a = jax.nn.relu(opening.gate(_forth(recipe, grouping, rows, operands.w1).astype(x.dtype)))
    density = jnp.sum(a > 0, dtype=jnp.float32) / (len(x) * recipe.top_k * a.shape[1])
    u = None
    if operands.up is not None:
        u = opening.up(_forth(recipe, grouping, rows, operands.up).astype(x.dtype))
    if recipe.activations:
        kept = pack.select24(_magnitude(form, a, u))
        a, u = jnp.where(kept, a, 0), None if u is None else jnp.where(kept, u, 0)
    y = _over_features(grouping, _hidden(form, a, u), operands.w2.reshape(recipe.experts, -1, x.shape[1]))
    if grouping is None:
        y = y.astype(x.dtype)
    elif p is None:
        y = grouping.undo(y).astype(x.dtype)
    else:
        y = jnp.sum(y[grouping.row_of_slot] * p[:, :, None], axis=1).astype(x.dtype)
    return y, density, _Saved(a, u)


def masked_backward(form: Form, x, operands: Operands, grouping: Grouping | None, p, saved: _Saved, dy):
    """(dx, gradients before any threshold's, dp)."""
    recipe, (a, u) = form.recipe, saved
    c = activations.squashed(a, form.activation, form.clamp)
    rows, dy_rows = (t if grouping is None else grouping.apply(t) for t in (x, dy))
    dp = None
    if p is not None and grouping is not None:
        of_row = weights_of_rows(grouping, p)
        unweighted = _forth(recipe, grouping, dy_rows, operands.w2.T)
        dots = jnp.sum(_hidden(form, a, u).astype(unweighted.dtype) * unweighted, axis=1)
        dp = dots[grouping.row_of_slot].astype(p.dtype)
        dy_rows = (dy_rows.astype(accumulator(x.dtype)) * of_row[:, None]).astype(x.dtype)
    dh = _forth(recipe, grouping, dy_rows, operands.w2.T).astype(x.dtype)
    if u is None:
        dg, du = 2 * dh * activations.half_slope(c, form.activation), None
    else:
        dg, du = gated_gradients(dh, c, u, squared=form.activation != "relu")
    factor = activations.clamp_factor(c, form.activation, form.clamp)
    dg = dg if factor is None else dg * factor
    biases = [None if g is None else sum_by_expert(recipe, grouping, g).reshape(-1) for g in (dg, du)]

    by_neuron = [None if w is None else w.T.reshape(recipe.experts, -1, len(w)) for w in (operands.w1, operands.up)]
    dx = _over_features(grouping, dg, by_neuron[0])
    dx = dx if du is None else dx + _over_features(grouping, du, by_neuron[1])
    dx = (dx if grouping is None else grouping.undo(dx)).astype(x.dtype)

    h = _hidden(form, a, u)
    if recipe.wgrad == "24":
        kept = pack.select24(_magnitude(form, a, u), axis=0)
        h, dg, du = (None if t is None else jnp.where(kept, t, 0) for t in (h, dg, du))
    found = Weights(
        _into_w1(grouping, rows, dg),
        _over_tokens(grouping, h, dy_rows).reshape(-1, x.shape[1]),
        None if du is None else _into_w1(grouping, rows, du),
        *biases,
    )
    return dx, found, dp


def _hidden(form: Form, a, u):
    """h, of a kept entry or of all."""
    c = activations.squashed(a, form.activation, form.clamp)
    if u is None:
        return activations.value(c, form.activation)
    return gated_product(c, u, squared=form.activation != "relu")


def _magnitude(form: Form, a, u):
    """What two of four are kept by."""
    return a if u is None else _hidden(form, a, u)


def _forth(recipe: Recipe, grouping: Grouping | None, rows, w):
    """Rows [R, D] times the columns of [D, F] of each row's expert: [R, Fe], as summed."""
    return _over_features(grouping, rows, jnp.moveaxis(w.reshape(len(w), recipe.experts, -1), 1, 0))


def _over_features(grouping: Grouping | None, rows, by_expert):
    if grouping is None:
        return jnp.dot(rows, by_expert[0], preferred_element_type=accumulator(rows.dtype))
    return grouped.rows(rows, by_expert, grouping.expert_sizes, align=grouping.align)


def _over_tokens(grouping: Grouping | None, a, b):
    if grouping is None:
        return jnp.dot(a.T, b, preferred_element_type=accumulator(a.dtype))[None]
    return grouped.contraction(a, b, grouping.expert_sizes, align=grouping.align)


def _into_w1(grouping: Grouping | None, rows, dg):
    return jnp.moveaxis(_over_tokens(grouping, rows, dg), 0, 1).reshape(rows.shape[1], -1)
