"""One linear layer with pruned inputs: every criterion and every mitigation through one form.

    z     = x - eta                                     eta: what a pruned input counts as, 0 without a shift
    mask  = the largest of |z| c, by the pattern        c: the channel weight, 1 for plain magnitude
    y     = nu ((z mask) W) (1 + s) + eta W + b + ((z - z mask) B^T) A^T

z mask + eta is x where the mask stays and eta where it falls, so a shift imputes eta in place of 0, and eta W is one
vector (a static shift) or a multiple of W's column sums (a shift per token): the product itself stays sparse. nu, one
number a token, and s, one an output, commute with it. Masks are constants to gradients.

Source: arXiv 2509.22166, with the points where its text and its code differ settled in docs/activation-sparsity.md.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from venom_jax.activation.patterns import Pattern
from venom_jax.activation.selection import lower_median, select
from venom_jax.activation.settings import Sparsity

LEAST_VARIANCE = 1e-9


class Parameters(NamedTuple):
    """What one linear layer's pruning needs besides its weight; None where the setting has no use for it.

    Attributes:
      channel_weight: c, not negative.
      shift: eta of a static or learned shift; one number for shift "tensor".
      bias: added to the output, besides the layer's own.
      scale: s, the output is multiplied by 1 + s.
      low_rank_a, low_rank_b: the dense path of what is pruned, A B close to the weight [O, I].
    """

    channel_weight: Float[Array, "*L I"] | None = None
    shift: Float[Array, "*LI"] | None = None
    bias: Float[Array, "*L O"] | None = None
    scale: Float[Array, "*L O"] | None = None
    low_rank_a: Float[Array, "*L O r"] | None = None
    low_rank_b: Float[Array, "*L r I"] | None = None


class Pruned(NamedTuple):
    """A layer's input, pruned.

    Attributes:
      kept: z where it stays, 0 elsewhere, in the input's dtype.
      rest: z where it was pruned, 0 elsewhere.
      mask: True where it stays.
      shift: eta, or None without one.
      row_scale: nu, or None where it is 1.
    """

    kept: Float[Array, "*B S I"]
    rest: Float[Array, "*B S I"]
    mask: Bool[Array, "*B S I"]
    shift: Float[Array, "..."] | None
    row_scale: Float[Array, "*B S 1"] | None


def linear(
    x: Float[Array, "*B I"], w: Float[Array, "I O"], bias: Float[Array, " O"] | None = None
) -> Float[Array, "*B O"]:
    """x W + b, summed in float32 (float64 for such inputs) and rounded once to x's dtype."""
    wide = _wide(x)
    y = jnp.matmul(x, w.astype(x.dtype), preferred_element_type=wide)
    return (y if bias is None else y + bias.astype(wide)).astype(x.dtype)


def sparse_linear(
    x: Float[Array, "*B S I"],
    w: Float[Array, "I O"],
    bias: Float[Array, " O"] | None,
    sparsity: Sparsity,
    parameters: Parameters = Parameters(),  # noqa: B008 (a constant)
    *,
    pattern: Pattern | None = None,
    dense: Bool[Array, "*#B S"] | None = None,
    valid: Bool[Array, "*#B S"] | None = None,
    earlier: Float[Array, "*B I"] | None = None,
) -> Float[Array, "*B S O"]:
    """y of this file's equation, in x's dtype; the dense layer bit for bit where the pattern keeps everything.

    Args:
      x: inputs of S tokens of each sequence.
      w: the weight, dense.
      bias: the layer's own.
      sparsity: pattern, criterion, shift and variance; its other fields are the caller's.
      parameters: of this layer.
      pattern: in place of the setting's.
      dense: tokens that keep all their inputs.
      valid: tokens that are no padding; only the criterion `clact` looks at others, and only at valid ones.
      earlier: of `clact_causal`, sums of squares of the inputs of the tokens before these.

    Raises:
      ValueError: I is no multiple of the pattern's M, nothing would stay, or a parameter that the setting needs is
        missing.
    """
    pattern = pattern or sparsity.pattern
    wide = _wide(x)
    p = parameters
    if pattern.kept(x.shape[-1]) == x.shape[-1]:
        if p.scale is None and p.bias is None:
            return linear(x, w, bias)
        y = _product(x, w, wide)
        pruned = None
    else:
        pruned = prune(x, sparsity, p, pattern=pattern, dense=dense, valid=valid, earlier=earlier)
        y = _product(pruned.kept, w, wide)
        y = y if pruned.row_scale is None else y * pruned.row_scale
    y = y if p.scale is None else y * (1 + p.scale.astype(wide))
    if pruned is not None and pruned.shift is not None:
        y = y + _shift_product(pruned.shift, w, wide)
    for one in (bias, p.bias):
        y = y if one is None else y + one.astype(wide)
    if pruned is not None and p.low_rank_a is not None and p.low_rank_b is not None:
        y = y + _product(_product(pruned.rest, p.low_rank_b.T, wide).astype(x.dtype), p.low_rank_a.T, wide)
    return y.astype(x.dtype)


def prune(
    x: Float[Array, "*B S I"],
    sparsity: Sparsity,
    parameters: Parameters = Parameters(),  # noqa: B008 (a constant)
    *,
    pattern: Pattern | None = None,
    dense: Bool[Array, "*#B S"] | None = None,
    valid: Bool[Array, "*#B S"] | None = None,
    earlier: Float[Array, "*B I"] | None = None,
) -> Pruned:
    """The input of a layer, pruned, with what its product is to be corrected by; arguments as in `sparse_linear`."""
    pattern = pattern or sparsity.pattern
    x32 = x.astype(_wide(x))
    eta = _shift(x32, sparsity, parameters)
    z = x32 if eta is None else x32 - eta
    weight = _channel_weight(x32, sparsity, parameters, valid, earlier)
    mask = select(jnp.abs(z) if weight is None else jnp.abs(z) * weight, pattern)
    if dense is not None:
        mask = mask | dense[..., None]
    kept = jnp.where(mask, z, 0)
    scale = _row_scale(z, kept, sparsity)
    if dense is not None and scale is not None:
        scale = jnp.where(dense[..., None], 1, scale)
    rest = jnp.where(mask, 0, z)
    return Pruned(kept.astype(x.dtype), rest.astype(x.dtype), mask, eta, scale)


def squares_so_far(x: Float[Array, "*B S I"], earlier: Float[Array, "*B I"] | None) -> Float[Array, "*B S I"]:
    """Sums of x^2 over a token and those before it, of this call and of earlier ones."""
    sums = jnp.cumsum(jnp.square(x.astype(_wide(x))), axis=-2)
    return sums if earlier is None else sums + earlier[..., None, :]


def _wide(x: Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _product(x: Array, w: Array, wide: jnp.dtype) -> Array:
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=wide)


def _needed(value: Array | None, name: str, setting: str) -> Array:
    if value is None:
        raise ValueError(f"{setting} needs the parameter {name}: calibrate first")
    return value


def _shift(x: Array, sparsity: Sparsity, parameters: Parameters) -> Array | None:
    match sparsity.shift:
        case "none":
            return None
        case "token":
            return lower_median(x)
        case "token_mean":
            return jnp.mean(x, axis=-1, keepdims=True)
        case _:
            return _needed(parameters.shift, "shift", f"shift = {sparsity.shift!r}").astype(x.dtype)


def _shift_product(eta: Array, w: Array, wide: jnp.dtype) -> Array:
    """eta W: a number for each token or layer takes W's column sums, a vector one row's product."""
    w = w.astype(wide)
    if eta.ndim == 1:
        return eta @ w
    return eta * jnp.sum(w, axis=0)


def _channel_weight(
    x: Array, sparsity: Sparsity, parameters: Parameters, valid: Array | None, earlier: Array | None
) -> Array | None:
    match sparsity.criterion:
        case "act":
            return None
        case "clact":
            squares = jnp.square(x) if valid is None else jnp.where(valid[..., None], jnp.square(x), 0)
            return jnp.sqrt(jnp.sum(squares, axis=-2, keepdims=True))
        case "clact_causal":
            return jnp.sqrt(squares_so_far(x, earlier))
        case name:
            return _needed(parameters.channel_weight, "channel_weight", f"criterion = {name!r}").astype(x.dtype)


def _row_scale(z: Array, kept: Array, sparsity: Sparsity) -> Array | None:
    match sparsity.variance:
        case "none":
            return None
        case "variance":
            whole, part = (jnp.var(a, axis=-1, keepdims=True) for a in (z, kept))
        case _:
            whole, part = (jnp.sum(jnp.square(a), axis=-1, keepdims=True) for a in (z, kept))
    ratio = whole / jnp.maximum(part, LEAST_VARIANCE)
    # The root of 0 has no finite slope: a row of zeros would give NaN to everything that is learned.
    return jnp.where(ratio == 0, 0, jnp.sqrt(jnp.where(ratio == 0, 1, ratio)))
