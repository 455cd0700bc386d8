"""The FFN in eight bits over packed operands: what runs on the tensor cores. `venom_jax.fp8.reference` specifies it.

Of the activations y2 alone is kept for the backward, in e4m3 along neurons and along tokens, and a = sqrt(y2) taken
from it; of x its transposed cast, which dW1 reads. The dense recipe keeps y2^T.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.array_types import Array
from pallas_kernels.cast8 import api as cast8
from pallas_kernels.cast8.api import Cast
from pallas_kernels.cast8.reference import root
from pallas_kernels.dispatch import Implementation
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.pack import activations, api
from pallas_kernels.pack.activations import Packed
from pallas_kernels.sparse24.api import sparse24
from pallas_kernels.tiles import PROMOTE
from venom_jax.formats import Sparse24
from venom_jax.fp8 import operands, products
from venom_jax.fp8.operands import SparseCast, Weight
from venom_jax.masked import sampled_density
from venom_jax.packed_ffn import FFN_RESIDUALS, TokenRows
from venom_jax.pattern import Recipe
from venom_jax.permutation import Grouping

_BOTH_SCALES = Epilogue(row_scale=True, column_scale=True)


class Residuals(NamedTuple):
    """What the backward needs beside the weights."""

    grouping: Grouping | None
    x: Cast
    """x^T [D, R], one scale a feature, tokens in the order of the contraction."""
    dense: Array | None
    """y2^T [F, R] of the dense recipe."""
    features: Packed | None
    """y2 packed along features."""
    tokens: Packed | None
    """y2 packed along tokens, where it is kept."""
    scale: Array
    """s_f [F], of y2."""
    peak: Array
    """m_f [F]."""


def forward(
    recipe: Recipe, implementation: Implementation, x: Array, first: Weight, second: Cast, grouping: Grouping | None
) -> tuple[Array, Array, Residuals]:
    """y3 [T, D], the density of a, and residuals; arguments as in `reference.forward`."""
    order = TokenRows(recipe, grouping, x.shape[0], implementation)
    rows = order.enter(x)
    tokens, features = _both_casts(rows, order)
    peak = _peaks(tokens, first, order)
    scale = operands.y2_scale(peak)
    weight, t = cast8.fold(second, scale, implementation=products.casting(implementation))
    if recipe.is_dense:
        y1 = _dense_hidden(tokens, first, implementation)
        rows_y2, y2 = cast8.activate(y1, scale, implementation=_casting(tokens, first, implementation))
        y2 = jax.lax.optimization_barrier(y2)  # or XLA, where it casts, takes the root of what was not yet rounded
        density, packed_features, packed_tokens = sampled_density(y1[: x.shape[0]]), None, None
        y3 = products.over_one(rows_y2, weight, t, x.dtype, implementation=implementation)
    else:
        y2, along = None, {"features": True, "tokens": recipe.token_copy == "kept"}
        scales = {"row_scale": first.scale, "column_scale": tokens.scale, "scale": scale}
        packed = order.pack_hidden(tokens.values, *_forms(first), by_neuron=True, **along, **scales)
        density = packed.positives / (x.shape[0] * recipe.top_k * (scale.shape[0] // recipe.experts))
        packed_features, packed_tokens = packed.squared, packed.tokens
        y3 = order.back(packed_features, None, weight, k_major=True, **_times(t, weight, x.dtype))
    saved = Residuals(grouping, features, y2, packed_features, packed_tokens, scale, peak)
    return order.leave(y3, x.dtype), density, checkpoint_name(saved, FFN_RESIDUALS)


def backward(
    recipe: Recipe,
    implementation: Implementation,
    second: Weight,
    first: Cast,
    residuals: Residuals,
    dy3: Array,
    dtypes: tuple[jax.typing.DTypeLike, jax.typing.DTypeLike],
    *,
    by_neuron: bool = False,
) -> tuple[Array, Array, Array]:
    """dx in dy3's dtype, dW1 [D, F] and dW2 [F, D] in `dtypes`; arguments as in `reference.backward`."""
    grouping, x, y2, packed_features, packed_tokens, scale, peak = residuals
    order = TokenRows(recipe, grouping, dy3.shape[0], implementation)
    tokens, features = _both_casts(order.enter(dy3), order)
    gradient_peak = _peaks(tokens, second, order)
    gradient_scale = operands.dy1_scale(peak, gradient_peak)
    weight, t = cast8.fold(first, gradient_scale, implementation=products.casting(implementation))
    if recipe.is_dense:
        assert y2 is not None
        how: Any = {"implementation": implementation}
        dy2 = _dense_hidden(tokens, second, implementation)
        given = (y2, scale, gradient_scale)
        dy1 = cast8.differentiate(dy2, *given, implementation=_casting(tokens, second, implementation))
        dx = products.over_one(dy1.rows, weight, t, dy3.dtype, **how)
        both = (x, Cast(dy1.columns, gradient_scale))
        dw1 = products.scaled(*(both[::-1] if by_neuron else both), dtypes[0], exact=True, **how)
        dw2 = products.scaled(Cast(y2, scale), features, dtypes[1], exact=True, **how)
        return order.leave(dx, dy3.dtype), dw1, dw2
    assert packed_features is not None
    if packed_tokens is None:
        packed_tokens = _rebuilt(order, packed_features, scale)
    scales = {"row_scale": second.scale, "column_scale": tokens.scale, "squared_scale": scale, "scale": gradient_scale}
    taken = order.take_hidden(tokens.values, *_forms(second), packed_features, packed_tokens, **scales)
    dx = order.back(taken.features, None, weight, k_major=True, **_times(t, weight, dy3.dtype))
    # Sums over tokens may have a mean, which the tensor core's 14 bits would bias: they go to f32 on the way.
    options: dict[str, Any] = {"ordered": True, "promote": PROMOTE, "epilogue": _BOTH_SCALES}
    dw2_options = options | {"transpose": False, "row_scale": scale, "column_scale": features.scale}
    dw1_options = options | {"transpose": not by_neuron, "row_scale": gradient_scale, "column_scale": x.scale}
    dw2 = order.over_tokens(packed_tokens, None, features.values, dtypes[1], **dw2_options)
    dw1 = order.over_tokens(taken.tokens, None, x.values, dtypes[0], **dw1_options)
    return order.leave(dx, dy3.dtype), dw1, dw2


def _both_casts(rows: Array, order: TokenRows) -> tuple[Cast, Cast]:
    """Rows in e4m3 per row [R, D], and per feature [D, R] in the order of the products over tokens."""
    interleaved = order.interleaved and not order.recipe.is_dense
    return cast8.both_ways(rows, interleaved=interleaved, implementation=products.casting(order.implementation))


def _times(t: Array, weight: Array, dtype: jax.typing.DTypeLike) -> dict[str, Any]:
    """How a product of a weight [D, F] over one scale is asked for."""
    scales = jnp.broadcast_to(t, weight.shape[:1])
    return {"epilogue": Epilogue(column_scale=True), "column_scale": scales, "out_dtype": dtype}


def _forms(weight: Weight) -> tuple[Sparse24 | None, Array | None]:
    """The weight as 2:4, and as a dense array [F, D]; one of them."""
    return (weight.values, None) if isinstance(weight, SparseCast) else (None, weight.values)


def _peaks(tokens: Cast, weight: Weight, order: TokenRows) -> Array:
    """`operands.peaks` of rows times a weight: of all neurons, also where tokens are routed."""
    place: Any = operands.sample(order.tokens)
    if order.grouping is not None:
        place = order.grouping.row_of_slot[place, 0]
    rows, scale = (t[: order.tokens][place] if order.grouping is None else t[place] for t in tokens)
    padding = -rows.shape[0] % products.GRANULE
    sampled = Cast(jnp.pad(rows, ((0, padding), (0, 0))), jnp.pad(scale, (0, padding), constant_values=1))
    hidden = _sparse_hidden if isinstance(weight, SparseCast) else _dense_hidden
    found = hidden(sampled, weight, order.implementation)
    return operands.peaks(found, scale, tokens.scale, weight.scale, rows.shape[1])


def _sparse_hidden(tokens: Cast, weight: Weight, implementation: Implementation) -> Array:
    """bf16 [R, F]."""
    assert isinstance(weight, SparseCast)
    return sparse24(
        weight.values.values,
        weight.values.metadata,
        tokens.values,
        b_k_major=True,
        transpose_out=True,
        epilogue=_BOTH_SCALES,
        row_scale=weight.scale,
        column_scale=tokens.scale,
        implementation=implementation,
    )


def _dense_hidden(tokens: Cast, weight: Weight, implementation: Implementation) -> Array:
    """bf16 [R, F]."""
    assert isinstance(weight, Cast)
    return products.scaled(tokens, weight, jnp.bfloat16, implementation=implementation)


def _casting(tokens: Cast, weight: Weight, implementation: Implementation) -> Implementation | None:
    """Of y1 and dy2, dense: XLA casts what it also scales, a kernel what a kernel has scaled."""
    assert isinstance(weight, Cast)
    own = products.uses_own_kernels(tokens.values, weight.values, implementation)
    return products.casting(implementation) if own else "reference"


def _rebuilt(order: TokenRows, features: Packed, scale: Array) -> Packed:
    """y2 along tokens, from what is left of it along features; tokens are ranked by the root of the stored 8 bits."""
    rows = (root(activations.unpack(features)) * jnp.sqrt(order.of_rows(scale))).astype(jnp.bfloat16)
    how = {"interleaved": order.interleaved, "group_sizes": order.sizes, "implementation": order.implementation}
    found = api.pack_activations(rows, features=False, tokens=True, scale=scale, **how).tokens
    assert found is not None
    return found
