"""The FFN in eight bits, in reference form: what the kernels compute, with the same scales and the same casts.

Every operand is cast to e4m3 and taken back, as bf16, which holds e4m3 times any power of two exactly. So scales need
no care here, products are exact and sums are in f32; the kernels' sums differ in order, and on the tensor core in bits
(8-bit products are summed in 14, `TileConfig.promote`).

    y1 = bf16(x8 A1^T)     a = relu(y1), 2:4     y2 = e4m3(a a)         y3 = y2 W2'
    dy2 = bf16(dy8 A2^T)   a = bf16(sqrt(y2))    dy1 = e4m3(2 dy2 a)    dx = dy1 W1'    dW2 = y2^T dy3    dW1 = x^T dy1

The gradient is that of the layer without casts, in its sparse form (`venom_jax.ffn`), with the operands of its own six
products cast: straight through every cast, and 0 where y2 has vanished. It is no derivative that finite differences
could find: a step function has none.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array
from pallas_kernels.cast8 import api as cast8
from pallas_kernels.cast8.api import Cast
from pallas_kernels.cast8.reference import root
from pallas_kernels.pack import reference as pack
from venom_jax import masked
from venom_jax.fp8 import operands
from venom_jax.fp8.operands import SparseCast, Weight
from venom_jax.pattern import Recipe
from venom_jax.permutation import Grouping


class Residuals(NamedTuple):
    """What the backward needs beside the weights."""

    grouping: Grouping | None
    x: Array
    a: Array
    """[R, Fe] in bf16, 2:4 along features where the recipe says so."""
    peak: Array
    """m_f [F]."""


def forward(
    recipe: Recipe, _: object, x: Array, first: Weight, second: Cast, grouping: Grouping | None
) -> tuple[Array, Array, Residuals]:
    """y3 [T, D] in x's dtype, the density of a, and residuals.

    first: W1 as y1 reads it, 2:4 or not; second: W2. The unnamed argument is the packed form's implementation.
    """
    tokens, w1 = cast8.by_row(x), dense(first)
    d_ffn = w1.shape[0]
    peak = _peaks(tokens, w1, first.scale)
    a = jax.nn.relu(kept(masked.hidden(recipe, grouping, back(tokens.values, tokens.scale[:, None]), w1.T)))
    density = jnp.sum(a > 0, dtype=jnp.float32) / (x.shape[0] * recipe.top_k * (d_ffn // recipe.experts))
    density = masked.sampled_density(a) if recipe.is_dense else density
    if recipe.activations:
        a = jnp.where(pack.select24(a), a, 0)
    scale = operands.y2_scale(peak)
    y2 = _cast_and_back(_squared(a), masked.of_rows(scale, recipe, grouping))
    y3 = masked.over_features(grouping, y2, masked.by_neuron(_folded(second, scale).T, recipe))
    y3 = y3 if grouping is None else grouping.undo(y3)
    return y3.astype(x.dtype), density, Residuals(grouping, x, a, peak)


def backward(
    recipe: Recipe,
    _: object,
    second: Weight,
    first: Cast,
    residuals: Residuals,
    dy3: Array,
    dtypes: tuple[jax.typing.DTypeLike, jax.typing.DTypeLike],
    *,
    by_neuron: bool = False,
) -> tuple[Array, Array, Array]:
    """dx in dy3's dtype, dW1 [D, F] and dW2 [F, D] in `dtypes`, before any threshold's gradient.

    by_neuron: give dW1 as [F, D].

    second: W2 as dy2 reads it, 2:4 or not; first: W1.
    """
    grouping, x, a, peak = residuals
    tokens, w2 = cast8.by_row(dy3), dense(second)
    d_ffn, d_model = w2.shape
    gradient_peak = _peaks(tokens, w2, second.scale)
    scale, gradient_scale = operands.y2_scale(peak), operands.dy1_scale(peak, gradient_peak)
    of_rows = masked.of_rows(scale, recipe, grouping)
    y2 = _cast_and_back(_squared(a), of_rows)
    kept_a = root(y2.astype(jnp.float32) / of_rows) * jnp.sqrt(of_rows)
    dy2 = kept(masked.hidden(recipe, grouping, back(tokens.values, tokens.scale[:, None]), w2.T))
    dy1 = 2 * dy2.astype(jnp.float32) * kept_a
    dy1 = _cast_and_back(dy1, masked.of_rows(gradient_scale, recipe, grouping))
    dy1_dx = jnp.where(pack.select24(a), dy1, 0) if recipe.activations else dy1
    dx = masked.over_features(grouping, dy1_dx, masked.by_neuron(_folded(first, gradient_scale).T, recipe))
    dx = (dx if grouping is None else grouping.undo(dx)).astype(dy3.dtype)

    ranked = a if recipe.token_copy == "kept" else kept_a.astype(jnp.bfloat16)
    mask = masked.kept_along_tokens(recipe, grouping, ranked)
    y2_w, dy1_w = (y2, dy1) if mask is None else (jnp.where(mask, y2, 0), jnp.where(mask, dy1, 0))
    x_rows, dy3_rows = (_by_feature(t) if grouping is None else grouping.apply(_by_feature(t)) for t in (x, dy3))
    dw2 = masked.over_tokens(grouping, y2_w, dy3_rows).reshape(d_ffn, d_model)
    dw1 = jnp.moveaxis(masked.over_tokens(grouping, x_rows, dy1_w), 0, 1).reshape(d_model, d_ffn)
    return dx, (dw1.T if by_neuron else dw1).astype(dtypes[0]), dw2.astype(dtypes[1])


def back(values: Array, scale: Array) -> Array:
    """What e4m3 values stand for, in bf16, exactly."""
    return (kept(values).astype(jnp.float32) * scale).astype(jnp.bfloat16)


def kept(rounded: Array) -> Array:
    """A rounded array, whose rounding stays: XLA drops a cast that the next one takes back (on GPUs, by default)."""
    return jax.lax.optimization_barrier(rounded)


def dense(weight: Weight) -> Array:
    """A weight as y1 or dy2 reads it: [F, D] in bf16."""
    if isinstance(weight, SparseCast):
        unpacked = weight.values.to_dense()
        values = unpacked if weight.values.axis == 1 else unpacked.T
    else:
        values = weight.values
    return back(values, weight.scale[:, None])


def _cast_and_back(v: Array, scale: Array) -> Array:
    return back(cast8.cast(v, scale), scale)


def _by_feature(x: Array) -> Array:
    """x in e4m3 with a scale for each feature."""
    return _cast_and_back(x, cast8.scale_of(cast8.largest(x, 0)))


def _squared(a: Array) -> Array:
    return jnp.square(a.astype(jnp.float32))


def _folded(weight: Cast, scale: Array) -> Array:
    """The weight [D, F] that y3 or dx reads, the other operand's scales taken out again."""
    values, t = cast8.fold(weight, scale)
    return back(values, t / scale)


def _peaks(tokens: Cast, w: Array, w_scale: Array) -> Array:
    """`operands.peaks` of tokens times w [F, D]: of all neurons, also where tokens are routed."""
    rows, scale = (t[operands.sample(t.shape[0])] for t in tokens)
    products = kept(masked.dot(back(rows, scale[:, None]), w.T).astype(jnp.bfloat16))
    return operands.peaks(products, scale, tokens.scale, w_scale, w.shape[1])
