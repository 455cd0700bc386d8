"""The sparse FFN where several devices share its weights: for use inside `jax.shard_map`.

Each device holds F / n neurons, columns of W1 and rows of W2, and computes all F for its own tokens. Weights come
together for one pass and are let go: the forward gathers the operands of y1 and y3, the backward those of dy2 and dx.
What a pass reads 2:4 travels packed, 9/16 of its dense bytes in bf16, and each weight is sparse in one of two products:

    forward: S(W1) packed, W2 dense      backward: S(W2) packed, W1 dense      (9/16 + 1) / 2 = 25/32 of dense

Both run along neurons, so a device packs its part alone and the parts lie one behind the other. dW1 and dW2 are summed
in the masters' dtype and scattered at once: nothing of a whole weight outlives a pass.

Groups of tokens and fours of tokens form among one device's tokens, see `local_recipe`. In eight bits every weight
travels as a byte an entry, 2:4 ones as 5/8, and each device samples and scales its own tokens: the number of devices
changes results as roundings do.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels.array_types import Array, Float, Int
from venom_jax import packed_ffn
from venom_jax.dispatch import Implementation, Kernels, choose_kernels, warn_reference
from venom_jax.ffn import (
    PackedWeights,
    masked_backward,
    masked_forward,
    pack_weights,
    through_thresholds,
    weight_operand,
)
from venom_jax.formats import Sparse24
from venom_jax.fp8 import EightBitWeights, check_packed
from venom_jax.fp8 import packed as packed_fp8
from venom_jax.fp8 import reference as reference_fp8
from venom_jax.fp8.operands import SparseCast, Weight
from venom_jax.masked import rows_in_groups, rows_of_kernels, sampled_density
from venom_jax.pattern import WEIGHT_GEMMS, Recipe
from venom_jax.router import Axis

_COLUMNS, _ROWS = 1, 0  # where the neurons of W1 and of W2 run


def local_recipe(recipe: Recipe, parts: int) -> Recipe:
    """The recipe for one of `parts` equal parts of the batch: token_blocks counts blocks of the whole batch.

    A part is what one device computes at a time: of D devices and A microbatches there are D A. With the default of one
    block a part is the block, and the fours of tokens depend on their number.

    Raises:
      ValueError: blocks that the parts would have to share.
    """
    if recipe.token_blocks == 1:
        return recipe
    if recipe.token_blocks % parts:
        raise ValueError(
            f"Recipe.token_blocks = {recipe.token_blocks} blocks of the batch do not divide among {parts} parts "
            f"(devices x microbatches); use a multiple of {parts}, or 1 for a block per part."
        )
    return dataclasses.replace(recipe, token_blocks=recipe.token_blocks // parts)


def sharded_sparse_ffn(
    x: Float[Array, "T D"],
    w1: Float[Array, "D Fn"],
    w2: Float[Array, "Fn D"],
    route: Int[Array, "T k"] | None = None,
    beta: Float[Array, "4"] | None = None,
    *,
    recipe: Recipe,
    axis: Axis,
    packed: PackedWeights | EightBitWeights | None = None,
    implementation: Implementation | None = None,
    return_density: bool = False,
) -> Any:
    """`venom_jax.sparse_ffn` on this device's tokens, with this device's Fn = F / n of the F neurons.

    Args:
      x, route, beta, implementation, return_density: as for `sparse_ffn`; x and route of this device's tokens.
      w1, w2: this device's part of the masters; their gradients are summed over the devices of `axis`.
      recipe: see `local_recipe`.
      axis: the mesh axis over whose n devices the neurons are cut.
      packed: `pack_weights` of this device's part.

    Raises:
      ValueError, NotImplementedError: as `sparse_ffn`; also a part that does not split into fours or tiles.
    """
    devices = jax.lax.axis_size(axis)
    d_model, d_ffn = w1.shape[0], w1.shape[1] * devices
    recipe.check(d_model, d_ffn)
    kernels = choose_kernels(implementation, recipe, d_model, d_ffn, x.dtype, local=True)
    granule = packed_ffn.granule(recipe)
    if implementation is None and kernels is not None and w1.shape[1] % granule:
        kernels = None
        if not recipe.is_dense:
            warn_reference(f"d_ffn over {devices} devices leaves {w1.shape[1]} neurons each, no multiple of {granule}")
    granule = 4 if kernels is None else granule
    if not recipe.is_dense and w1.shape[1] % granule:
        raise ValueError(
            f"d_ffn = {d_ffn} over {devices} devices leaves {w1.shape[1]} neurons each, no multiple of {granule}; use "
            f"fewer devices along {axis!r}, or a d_ffn divisible by {granule * devices}."
        )
    if recipe.routed != (route is not None):
        raise ValueError(f"recipe with experts = {recipe.experts}, but route is {route}.")
    check_packed(recipe, packed)
    if recipe.is_dense and not recipe.in_fp8:
        y, density = _dense(axis, x, w1, w2)
    else:
        beta = jnp.ones(len(WEIGHT_GEMMS), jnp.float32) if beta is None else beta
        y, density = _sparse(recipe, kernels, axis, x, w1, w2, beta, packed, route)
    return (y, jax.lax.stop_gradient(density)) if return_density else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sparse(recipe: Recipe, kernels: Kernels | None, axis: Axis, x, w1, w2, beta, packed, route):
    """(y3, density); arguments as in `venom_jax.ffn`, the weights being this device's part."""
    return _forward(recipe, kernels, axis, x, w1, w2, beta, packed, route)[0]


def _forward(recipe, kernels, axis, x, w1, w2, beta, packed, route):
    if recipe.in_fp8:
        return _fp8_forward(recipe, kernels, axis, x, w1, w2, beta, packed, route)
    if kernels is None:
        grouping = rows_in_groups(recipe, route, x.shape[0])
        first = gather(weight_operand("y1", recipe, w1, beta, packed, x.dtype), axis, _COLUMNS)
        second = gather(weight_operand("y3", recipe, w2, beta, packed, x.dtype), axis, _ROWS)
        y3, density, a = masked_forward(recipe, x, first, second, grouping)
        return (y3, density), (x, w1, w2, beta, packed, (grouping, a))
    if packed is None and recipe.weights:
        packed = pack_weights(w1, w2, beta, dtype=x.dtype, implementation=kernels)
    sparse_w1 = gather_packed(packed.w1, axis) if packed is not None and "y1" in recipe.weights else None
    # Where the packed operand stands in, the dense one is not read.
    whole_w1 = w1 if sparse_w1 is not None else _gather_w1(w1, axis, x.dtype)
    grouping = rows_of_kernels(recipe, route, x.shape[0], kernels)
    whole_w2 = _gather_master(w2, axis, _ROWS, x.dtype)
    operands = (whole_w1, whole_w2, sparse_w1, grouping)
    y3, density, saved = packed_ffn.forward(recipe, kernels, x, *operands, by_neuron=_is_cut(axis))
    return (y3, density), (x, w1, w2, beta, packed, saved)


def _backward(recipe, kernels, axis, residuals, cotangents):
    if recipe.in_fp8:
        return _fp8_backward(recipe, kernels, axis, residuals, cotangents[0])
    x, w1, w2, beta, packed, saved = residuals
    dy3 = cotangents[0]
    if kernels is None:
        second = gather(weight_operand("dy2", recipe, w2, beta, packed, x.dtype), axis, _ROWS, after=x)
        first = gather(weight_operand("dx", recipe, w1, beta, packed, x.dtype), axis, _COLUMNS, after=x)
        grouping, a = saved
        dx, dw1, dw2 = masked_backward(recipe, x, second, first, grouping, a, dy3)
    else:
        has_sparse_w2 = packed is not None and "dy2" in recipe.weights
        sparse_w2 = gather_packed(packed.w2, axis, after=x) if has_sparse_w2 else None
        whole_w2 = w2 if sparse_w2 is not None else _gather_master(w2, axis, _ROWS, x.dtype, after=x)
        operands = (_gather_w1(w1, axis, x.dtype, after=x), whole_w2, sparse_w2, saved)
        dx, dw1, dw2 = packed_ffn.backward(recipe, kernels, x, *operands, dy3, by_neuron=_is_cut(axis))
        dw1 = dw1.T if _is_cut(axis) else dw1
    dw1, dw2 = scatter(dw1.astype(w1.dtype), axis, _COLUMNS), scatter(dw2.astype(w2.dtype), axis, _ROWS)
    return through_thresholds(recipe, w1, w2, beta, dx, dw1, dw2)


_sparse.defvjp(_forward, _backward)


def _fp8_forward(recipe, kernels, axis, x, w1, w2, beta, packed, route):
    if packed is None:
        packed = pack_weights(w1, w2, beta, recipe=recipe, implementation=kernels or "reference")
    form, order = (reference_fp8, rows_in_groups) if kernels is None else (packed_fp8, rows_of_kernels)
    grouping = order(recipe, route, x.shape[0], kernels or "reference")
    first, second = gather_fp8(packed.y1(recipe), axis), gather_fp8(packed.w2, axis)
    y3, density, saved = form.forward(recipe, kernels, x, first, second, grouping)
    return (y3, density), (w1, w2, beta, packed, saved)


def _fp8_backward(recipe, kernels, axis, residuals, dy3):
    w1, w2, beta, packed, saved = residuals
    form = reference_fp8 if kernels is None else packed_fp8
    after = jax.tree.leaves(saved.x)[0]
    second, first = gather_fp8(packed.dy2(recipe), axis, after=after), gather_fp8(packed.w1, axis, after=after)
    dtypes, cut = (w1.dtype, w2.dtype), _is_cut(axis)
    dx, dw1, dw2 = form.backward(recipe, kernels, second, first, saved, dy3, dtypes, by_neuron=cut)
    dw1 = dw1.T if cut else dw1
    return through_thresholds(recipe, w1, w2, beta, dx, scatter(dw1, axis, _COLUMNS), scatter(dw2, axis, _ROWS))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(axis: Axis, x, w1, w2):
    """(y3, density) of the plain FFN, in x's dtype throughout."""
    return _dense_forward(axis, x, w1, w2)[0]


def _dense_forward(axis, x, w1, w2):
    a = jax.nn.relu(x @ gather(w1.astype(x.dtype), axis, _COLUMNS))
    y3 = (a * a) @ gather(w2.astype(x.dtype), axis, _ROWS)
    return (y3, sampled_density(a)), (x, w1, w2, a)


def _dense_backward(axis, residuals, cotangents):
    x, w1, w2, a = residuals
    dy3 = cotangents[0]
    dy1 = 2 * (dy3 @ gather(w2.astype(x.dtype), axis, _ROWS, after=x).T) * a
    dx = dy1 @ gather(w1.astype(x.dtype), axis, _COLUMNS, after=x).T
    dw1 = jnp.dot(x.T, dy1, preferred_element_type=w1.dtype)
    dw2 = jnp.dot((a * a).T, dy3, preferred_element_type=w2.dtype)
    return dx, scatter(dw1, axis, _COLUMNS), scatter(dw2, axis, _ROWS)


_dense.defvjp(_dense_forward, _dense_backward)


def _is_cut(axis: Axis) -> bool:
    """Whether the neurons are: W1 then comes, and its gradient leaves, as [F, D], in the order of its parts."""
    return jax.lax.axis_size(axis) > 1


def gather(part: Array, axis: Axis, dimension: int, *, after: Array | None = None) -> Array:
    """The parts of all devices of a mesh axis, one behind the other.

    after: an array without which the exchange does not begin.  A backward gives its layer's input: XLA would otherwise
      see that the forward has gathered the same, and keep the whole weights of all layers for it.
    """
    if not _is_cut(axis):
        return part
    if after is not None:
        part, _ = jax.lax.optimization_barrier((part, after))
    if part.dtype.itemsize == 1:  # as plain bytes, which every exchange moves
        whole = jax.lax.all_gather(jax.lax.bitcast_convert_type(part, jnp.uint8), axis, axis=dimension, tiled=True)
        return jax.lax.bitcast_convert_type(whole, part.dtype)
    return jax.lax.all_gather(part, axis, axis=dimension, tiled=True)


def scatter(whole: Array, axis: Axis, dimension: int) -> Array:
    """This device's part of the sum over the devices of a mesh axis.

    The exchange puts the dimension that it cuts first.  Left so, the optimizer's update of the part would go elsewhere
    and be copied back, moments included; the part is turned around here, which moves a sixth of that.
    """
    if not _is_cut(axis):
        return whole
    return in_order(jax.lax.psum_scatter(whole, axis, scatter_dimension=dimension, tiled=True))


def in_order(x: Array) -> Array:
    """x, laid out in memory with its last axis fastest, which XLA need not do by itself."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _gather_master(part: Array, axis: Axis, dimension: int, dtype: Any, *, after: Array | None = None) -> Array:
    """The whole weight with the values it has in the compute dtype, in which it travels, as an array of its own dtype.

    XLA drops the widening: whoever reads the result narrows it again.
    """
    return gather(part.astype(dtype), axis, dimension, after=after).astype(part.dtype)


def _gather_w1(part: Array, axis: Axis, dtype: Any, *, after: Array | None = None) -> Array:
    """W1 as `_gather_master` has it, [F, D] if it is cut."""
    return _gather_master(part.T, axis, _ROWS, dtype, after=after) if _is_cut(axis) else part


def gather_packed(part: Sparse24, axis: Axis, *, after: Array | None = None) -> Sparse24:
    """Rows of a packed matrix are neurons, whichever axis of the logical matrix they are; ``after`` as for `gather`."""
    neurons = 1 - part.axis
    shape = [*part.shape]
    shape[neurons] *= jax.lax.axis_size(axis)
    values, metadata = (gather(array, axis, 0, after=after) for array in (part.values, part.metadata))
    return Sparse24(values, metadata, (shape[0], shape[1]), part.axis)


def gather_fp8[W: Weight](part: W, axis: str, *, after: Array | None = None) -> W:
    """A weight in e4m3 with its scales, neurons first."""
    scale = gather(part.scale, axis, _ROWS, after=after)
    if isinstance(part, SparseCast):
        return part._replace(values=gather_packed(part.values, axis, after=after), scale=scale)
    return part._replace(values=gather(part.values, axis, _ROWS, after=after), scale=scale)
