"""The layer of `venom_jax.general_ffn` over packed operands: what runs on sparse tensor cores.

Without a gate the products and the packing are those of `venom_jax.packed_ffn`; other activations change the packed
values one by one. With a gate W1 and Wu stand side by side for each expert, [D, E, 2 Fe]: g and u are one product and
one array, packed in one pass (`pallas_kernels.pack.gated`), and dx is one product of both gradients side by side.

The weights p of a mixture are factors on the way: of dy as it is gathered, and of the experts' outputs as they are
added up. So dh and all that follows has them already, and dp = <h, dh> / p.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.array_types import Array, accumulator
from pallas_kernels.grouped24 import api as grouped
from pallas_kernels.grouped24 import dense as dense_groups
from pallas_kernels.pack import activations as pack_activations
from pallas_kernels.pack import api, gated
from pallas_kernels.pack.activations import Packed
from pallas_kernels.pack.gated import PackedGates
from pallas_kernels.permute import api as permute
from pallas_kernels.sparse24.api import sparse24
from pallas_kernels.tile_order import TILE
from venom_jax import nonlinearity as activations
from venom_jax.ffn_parts import Form, Opening, Operands, Weights, sum_by_expert, weights_of_rows
from venom_jax.formats import Sparse24
from venom_jax.packed_ffn import FFN_RESIDUALS, TokenRows
from venom_jax.permutation import Grouping


class Saved(NamedTuple):
    """What the backward needs beside the inputs; None where the form of the layer has none."""

    dense: Array | None = None
    """a [R, Fe] where a product reads it dense, or g and u [R, 2 Fe]."""
    features: Packed | None = None
    """a packed along features, without a gate."""
    tokens: Packed | None = None
    gates: PackedGates | None = None
    """c and u packed both ways."""


def unsupported(dtype: Any, *, gated: bool) -> str | None:
    """Why the packed form does not take such tokens, or None."""
    if gated and jnp.dtype(dtype) != jnp.bfloat16:
        return f"tokens are {jnp.dtype(dtype).name}, gates are packed in bfloat16"
    return None


class _Products:
    """The products over token rows that this layer has beside those of `TokenRows`."""

    def __init__(self, form, grouping: Grouping | None, tokens: int):
        self.form, self.grouping, self.experts = form, grouping, form.recipe.experts
        self.order = TokenRows(form.recipe, grouping, tokens, form.kernels)
        self.options: dict[str, Any] = {"implementation": form.kernels}

    def forth(self, rows: Array, sparse: Sparse24 | None, weight: Array, *, transposed: bool) -> Array:
        """Rows [R, D] times the weight of each row's expert, [F, D] or, `transposed`, [D, F]: [R, Fe]."""
        if sparse is not None:
            return self.order.hidden(rows, sparse, weight)
        if self.grouping is None:
            return jnp.dot(rows, weight if transposed else weight.T)
        return dense_groups.columns(weight, rows, self.grouping.expert_sizes, transposed=transposed, **self.options)

    def back(self, packed: Packed | None, dense: Any, weight: Array, *, k_major: bool) -> Array:
        """Activations [R, Fe] times the weight of each row's expert, [F, D] or, `k_major`, [D, F]: [R, D]."""
        if self.grouping is None:
            if packed is None:
                return jnp.dot(dense, weight.T if k_major else weight)
            return sparse24(*packed, weight, b_k_major=k_major, **self.options)
        shape = (len(weight), self.experts, -1) if k_major else (self.experts, -1, weight.shape[1])
        operands = (weight.reshape(shape), self.grouping.expert_sizes)
        if packed is None:
            return dense_groups.rows(dense, *operands, b_k_major=k_major, **self.options)
        return grouped.rows(*packed, *operands, b_k_major=k_major, **self.options)

    def over_tokens(self, packed: Packed | None, dense: Any, rows: Array, dtype: Any) -> Array:
        """sum over tokens of activations [R, Fe] and rows [R, D]: [F, D] in `dtype`."""
        if packed is not None or self.grouping is None:
            return self.order.over_tokens(packed, dense, rows, dtype, transpose=False)
        out = dense_groups.contraction(dense, rows, self.grouping.expert_sizes, out_dtype=dtype, **self.options)
        return out.reshape(-1, rows.shape[1])

    def into_w1(self, packed: Packed | None, dense: Any, rows: Array, dtype: Any) -> Array:
        """As `over_tokens`, [D, F]."""
        if packed is not None or self.grouping is None:
            return self.order.over_tokens(packed, dense, rows, dtype, transpose=True)
        out = dense_groups.contraction(rows, dense, self.grouping.expert_sizes, out_dtype=dtype, **self.options)
        return jnp.moveaxis(out, 0, 1).reshape(rows.shape[1], -1)


def forward(
    form: Form, x: Array, operands: Operands, grouping: Grouping | None, p: Array | None, opening: Opening
) -> tuple[Array, Array, Saved]:
    """(y, density, what the backward needs); arguments as `general_ffn.masked_forward`."""
    recipe, products = form.recipe, _Products(form, grouping, len(x))
    rows = products.order.enter(x)
    along = {"features": recipe.activations, "tokens": recipe.wgrad == "24"}
    run = _forward_plain if operands.up is None else _forward_gated
    y, positives, saved = run(form, products, rows, operands, along, opening)
    density = positives / (len(x) * recipe.top_k * (len(operands.w2) // recipe.experts))
    return _leave(products, y, p, x.dtype), density, checkpoint_name(saved, FFN_RESIDUALS)


def _forward_plain(form, products: _Products, rows: Array, operands, along, opening):
    order, sparse, dense = products.order, operands.sparse_w1, None
    if form.recipe.activations and not opening.changes:
        packed = order.pack_hidden(rows, sparse, operands.w1, by_neuron=False, **along)
    else:
        y1 = opening.gate(products.forth(rows, sparse, operands.w1, transposed=True))
        packed = api.pack_activations(y1, **along, interleaved=order.interleaved, **products.options)
        dense = None if form.recipe.activations else jax.nn.relu(y1)
    if packed.features is None:
        operand, dense_h = None, _value(form, dense)
    else:
        operand, dense_h = packed.squared, None
        if form.activation != "relu2":
            operand = packed.features._replace(values=_value(form, packed.features.values))
    y = products.back(operand, dense_h, operands.w2, k_major=False)
    return y, packed.positives, Saved(dense, packed.features, packed.tokens)


def _forward_gated(form, products: _Products, rows: Array, operands, along, opening):
    sparse, wide = _side_by_side(form, operands)
    y1 = products.forth(rows, sparse, wide, transposed=True)
    if opening.changes or form.activation == "relu2_clamped":
        g, u = jnp.split(y1, 2, axis=1)
        g = activations.squashed(jax.nn.relu(opening.gate(g)), form.activation, form.clamp)
        y1 = jnp.concatenate([g, opening.up(u)], axis=1)
    options = {"squared": form.activation != "relu", "interleaved": products.order.interleaved}
    gates = gated.pack_gated(y1, **along, **options, **products.options)
    positives, dense, dense_h = gates.positives, None, None
    if not form.recipe.activations:
        dense, (g, u) = y1, jnp.split(y1, 2, axis=1)
        dense_h = gated.gated_product(jax.nn.relu(g), u, squared=options["squared"])
    y = products.back(gates.features, dense_h, operands.w2, k_major=False)
    return y, positives, Saved(dense, gates=gates._replace(features=None))


def backward(
    form: Form, x: Array, operands: Operands, grouping: Grouping | None, p: Array | None, saved: Saved, dy: Array
) -> tuple[Array, Weights, Array | None]:
    """(dx, gradients before any threshold's, dp); arguments as `general_ffn.masked_backward`."""
    products = _Products(form, grouping, len(x))
    rows, dy_rows = products.order.enter(x), _enter_weighted(products, dy, p)
    run = _backward_plain if operands.up is None else _backward_gated
    dx, found, dots = run(form, products, rows, dy_rows, operands, saved)
    dp = None
    if p is not None and grouping is not None:
        of_copy = dots[grouping.row_of_slot].astype(p.dtype)
        dp = jnp.where(p == 0, 0, of_copy / jnp.where(p == 0, 1, p))
    return products.order.leave(dx, x.dtype), found, dp


def _backward_plain(form, products: _Products, rows, dy_rows, operands, saved: Saved):
    recipe, order, w2 = form.recipe, products.order, operands.w2
    dense: Any = saved.dense
    features: Any = saved.features
    tokens = saved.tokens
    if dense is None and recipe.wgrad != "24":
        dense = pack_activations.unpack(features)
    slope_features, slope_tokens = (_each(t, lambda v: _half_slope(form, v)) for t in (features, tokens))
    taken: Any = None
    dh: Any = None
    dense_dg: Any = None
    dense_h: Any = None
    if dense is None:
        taken = order.take_hidden(dy_rows, operands.sparse_w2, w2, slope_features, slope_tokens)
    else:
        dh = products.forth(dy_rows, operands.sparse_w2, w2, transposed=False)
        options: dict[str, Any] = {"interleaved": order.interleaved, **products.options}
        taken = api.take_activations(dh, slope_features, slope_tokens, **options)
        dense_dg, dense_h = 2 * dh * _half_slope(form, dense), _value(form, dense)
    if features is not None:
        gradient: Any = taken.features
        dots = _dots(form, features.values, gradient.values)
    else:
        wide = (t.astype(accumulator(rows.dtype)) for t in (dense_h, dh))
        dots = jnp.sum(jnp.multiply(*wide), axis=1)
    of_features = _clamped(form, taken.features, features)
    of_tokens = _clamped(form, taken.tokens, tokens)
    if dense_dg is not None:
        dense_dg = _clamped_values(form, dense_dg, dense)
    dx = products.back(of_features, dense_dg, operands.w1, k_major=True)
    hidden = taken.squared
    if tokens is not None and form.activation != "relu2":
        hidden = _each(tokens, lambda v: _value(form, v))
    dtypes = {"dtype": jnp.float32}
    dg: Any = dense_dg if of_features is None else pack_activations.unpack(of_features)
    b1 = _bias_gradient(products, dg)
    found = Weights(
        products.into_w1(of_tokens, dense_dg if tokens is None else None, rows, **dtypes),
        products.over_tokens(hidden, dense_h if tokens is None else None, dy_rows, **dtypes),
        b1=b1,
    )
    return dx, found, dots


def _backward_gated(form, products: _Products, rows, dy_rows, operands, saved: Saved):
    gates: Any = saved.gates
    squared = form.activation != "relu"
    options = {"squared": squared, "interleaved": products.order.interleaved}
    dh = products.forth(dy_rows, operands.sparse_w2, operands.w2, transposed=False)
    taken: Any = gated.take_gated(dh, gates, **options, **products.options)
    _, wide = _side_by_side(form, operands)
    dense: Any = None
    dense_h: Any = None
    dense_both: Any = None
    dense_dg: Any = None
    dense_du: Any = None
    if saved.dense is not None:
        dense = jnp.split(saved.dense, 2, axis=1)
    elif gates.token_gate is None:
        dense = [pack_activations.unpack(t) for t in (gates.feature_gate, gates.feature_up)]
    if dense is not None:
        c, u = jax.nn.relu(dense[0]), dense[1]
        dense_h = gated.gated_product(c, u, squared=squared)
        dense_dg, dense_du = gated.gated_gradients(dh, c, u, squared=squared)
        dense_dg = _clamped_values(form, dense_dg, c, squashed=True)
    if gates.feature_gate is None:
        dense_both = jnp.concatenate([dense_dg, dense_du], axis=1)
        of_both = None
        dots = jnp.sum(dense_du.astype(jnp.float32) * dense[1].astype(jnp.float32), axis=1)
    else:
        dg, du = jnp.split(taken.features.values, 2, axis=1)
        dots = _row_sums(du.astype(jnp.float32) * gates.feature_up.values.astype(jnp.float32))
        of_both = taken.features
        if form.activation == "relu2_clamped":
            dg = _clamped_values(form, dg, gates.feature_gate.values, squashed=True)
            of_both = of_both._replace(values=jnp.concatenate([dg, du], axis=1))
    dx = products.back(of_both, dense_both, wide, k_major=True)
    token_gate = taken.token_gate
    if token_gate is not None:
        values = _clamped_values(form, token_gate.values, gates.token_gate.values, squashed=True)
        token_gate = token_gate._replace(values=values)
        dense_h = dense_dg_w = dense_du_w = None
    else:
        dense_dg_w, dense_du_w = dense_dg, dense_du
    both = dense_both if of_both is None else pack_activations.unpack(of_both)
    biases = [_bias_gradient(products, half) for half in jnp.split(both, 2, axis=1)]
    found = Weights(
        products.into_w1(token_gate, dense_dg_w, rows, jnp.float32),
        products.over_tokens(taken.token_hidden, dense_h, dy_rows, jnp.float32),
        products.into_w1(taken.token_up, dense_du_w, rows, jnp.float32),
        *biases,
    )
    return dx, found, dots


def _enter_weighted(products: _Products, dy: Array, p: Array | None) -> Array:
    if p is None:
        return products.order.enter(dy)
    grouping: Any = products.grouping
    of_row = weights_of_rows(grouping, p.astype(jnp.float32))
    return permute.gather_rows(dy, grouping.token_of_row, of_row, **products.options)


def _leave(products: _Products, y: Array, p: Array | None, dtype: Any) -> Array:
    if p is None:
        return products.order.leave(y, dtype)
    grouping: Any = products.grouping
    slots = grouping.row_of_slot
    return permute.sum_copies(y, slots, p.astype(jnp.float32), **products.options).astype(dtype)


def _side_by_side(form, operands) -> tuple[Sparse24 | None, Array]:
    """W1 and Wu of each expert side by side: packed, where they are read 2:4, and [D, E 2 Fe]."""
    experts = form.recipe.experts

    def joined(first: Array, second: Array, axis: int) -> Array:
        def split(t):
            return t.reshape(*t.shape[:axis], experts, -1, *t.shape[axis + 1 :])

        both = jnp.concatenate([split(first), split(second)], axis=axis + 1)
        return both.reshape(*first.shape[:axis], -1, *first.shape[axis + 1 :])

    wide, gate, up = joined(operands.w1, operands.up, 1), operands.sparse_w1, operands.sparse_up
    if gate is None:
        return None, wide
    values, words = (joined(getattr(gate, name), getattr(up, name), 0) for name in ("values", "metadata"))
    return Sparse24(values, words, (gate.shape[0], 2 * gate.shape[1]), gate.axis), wide


def _value(form, a: Array | None) -> Any:
    if a is None:
        return None
    return activations.value(activations.squashed(a, form.activation, form.clamp), form.activation)


def _half_slope(form, a: Array) -> Array:
    return activations.half_slope(activations.squashed(a, form.activation, form.clamp), form.activation)


def _clamped(form, gradient: Packed | None, of: Packed | None) -> Packed | None:
    """A packed gradient by c as one by a, both at the positions of a."""
    if gradient is None or of is None:
        return gradient
    return gradient._replace(values=_clamped_values(form, gradient.values, of.values))


def _clamped_values(form, gradient: Array, a: Array, *, squashed: bool = False) -> Array:
    c = a if squashed else activations.squashed(a, form.activation, form.clamp)
    factor = activations.clamp_factor(c, form.activation, form.clamp)
    return gradient if factor is None else gradient * factor


def _each(packed: Packed | None, function) -> Any:
    return None if packed is None else packed._replace(values=function(packed.values))


def _dots(form, a: Array, gradient: Array) -> Array:
    """<h, dh> of each row from stored entries of a and of the gradient by c: c (2 dh c) / 2, or a dh for relu."""
    c = activations.squashed(a, form.activation, form.clamp)
    dots = _row_sums(c.astype(jnp.float32) * gradient.astype(jnp.float32))
    return dots if form.activation == "relu" else dots / 2


def _row_sums(values: Array) -> Array:
    """The sum of the stored entries of each row, from tiles: a swizzle moves pieces within a row only."""
    row_tiles, column_tiles = values.shape[:2]
    return values.reshape(row_tiles, column_tiles, TILE, TILE // 2).sum(axis=(1, 3)).reshape(-1)


def _bias_gradient(products: _Products, gradient: Array) -> Array:
    """The sum over each expert's rows, [F] in f32; XLA leaves it out where nothing reads it."""
    return sum_by_expert(products.form.recipe, products.grouping, gradient).reshape(-1)
