"""W: 2:4 weights, soft-thresholded or masked both ways, with a frozen scale, and the gradients through them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.array_types import Array, Bool, Float
from pallas_kernels.pack import reference as pack
from venom_jax.pattern import ThresholdGradient, WeightMask


def sparse_weight(w: Float[Array, "..."], axis: int, mask: WeightMask = "threshold") -> Float[Array, "..."]:
    """S(w), of which at most two of each four along `axis` are not zero.

    `threshold`: the soft threshold along `axis`. `transposable`: w under `transposable_mask`, the same along both axes.
    """
    if mask == "threshold":
        return pack.soft_threshold(w, axis)
    return jnp.where(transposable_mask(w), w, jnp.zeros((), w.dtype))


def transposable_mask(w: Float[Array, "*L R C"]) -> Bool[Array, "*L R C"]:
    """Of each 4 x 4 block the 8 entries, two in every row and column, with the largest sum of magnitudes.

    The best of all 90 such choices; among equals always the same one.

    Raises:
      ValueError: a size that is no multiple of 4.

    Source: Hubara et al., arXiv 2102.08124; all choices tried: Hu et al., arXiv 2404.01847.
    """
    rows, columns = w.shape[-2:]
    if rows % 4 or columns % 4:
        raise ValueError(f"weights [{rows}, {columns}] do not split into blocks of 4 x 4; use multiples of 4.")
    blocks = jnp.abs(w.astype(jnp.float32)).reshape(*w.shape[:-2], rows // 4, 4, columns // 4, 4)
    # A product with the choices: inf and NaN become large numbers, as inf * 0 would spoil every sum.
    blocks = jnp.nan_to_num(blocks, nan=1e30, posinf=1e30)
    choices = jnp.asarray(_transposable_choices())
    sums = jnp.einsum("...iajb,cab->...ijc", blocks, choices.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(choices[jnp.argmax(sums, axis=-1)], -2, -3).reshape(w.shape)


@functools.cache
def _transposable_choices() -> np.ndarray:
    """All 90 boolean [4, 4] with two true entries in every row and column."""
    rows = [np.isin(np.arange(4), pair) for pair in itertools.combinations(range(4), 2)]
    squares = [np.stack(four) for four in itertools.product(rows, repeat=4)]
    return np.stack([square for square in squares if (square.sum(axis=0) == 2).all()])


def optimal_scale(w: Float[Array, "..."], axis: int, mask: WeightMask = "threshold") -> Float[Array, ""]:
    """beta = <w, S(w)> / <S(w), S(w)>, the scale that minimises |w - beta S(w)|; 1 where S(w) = 0.

    One scalar for the whole matrix, in f32; 1.483 for Gaussian entries, and 1 with transposable masks.

    Args:
      w: the f32 master weights.
      axis: the axis along which groups of four lie.
      mask: as in `sparse_weight`.

    Source: S-STE, arXiv 2409.09099, section 4.
    """
    w = w.astype(jnp.float32)
    s = sparse_weight(w, axis, mask)
    energy = jnp.vdot(s, s)
    return jnp.where(energy > 0, jnp.vdot(w, s) / jnp.where(energy > 0, energy, 1.0), 1.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def scaled_soft_threshold(
    w: Float[Array, "..."], beta: Float[Array, ""], axis: int, gradient: ThresholdGradient = "ste"
) -> Float[Array, "..."]:
    """beta S(w) along `axis`, with the gradient to w selected by `gradient`; beta gets none.

    `ste`: dw = g. `ste_scaled`: dw = beta g. `exact`: the derivative of beta S, see `threshold_gradient`.
    """
    return (beta * pack.soft_threshold(w, axis)).astype(w.dtype)


def _forward(w, beta, axis, gradient):
    return scaled_soft_threshold(w, beta, axis, gradient), (w, beta)


def _backward(axis, gradient, residuals, g):
    w, beta = residuals
    return threshold_gradient(w, g, beta, axis, gradient), None


scaled_soft_threshold.defvjp(_forward, _backward)


def threshold_gradient(
    w: Float[Array, "..."],
    g: Float[Array, "..."],
    beta: Float[Array, ""],
    axis: int,
    gradient: ThresholdGradient,
) -> Float[Array, "..."]:
    """The gradient to w of <g, beta S(w)>, by the selected rule.

    `exact`: with t the second smallest magnitude of a group of four and j the entry that sets it (the highest index
    among equals), a kept entry i gets beta g_i, entry j gets -beta sign(w_j) sum_kept sign(w_i) g_i, the rest 0.
    """
    if gradient == "ste":
        return g
    if gradient == "ste_scaled":
        return (beta * g).astype(g.dtype)
    moved_w, moved_g = (jnp.moveaxis(t, axis, -1) for t in (w, g))
    shape = moved_w.shape
    fours, upstream = (t.reshape(*shape[:-1], shape[-1] // 4, 4) for t in (moved_w, moved_g))
    kept = pack.soft_threshold_mask(fours)
    key = pack.magnitude_key(fours)
    at_threshold = key == pack.second_smallest(key)[..., None]
    index = jnp.arange(4).reshape((1,) * len(shape) + (4,))
    setter = jnp.max(jnp.where(at_threshold, index, -1), axis=-1, keepdims=True)
    through_threshold = jnp.sum(jnp.where(kept, jnp.sign(fours) * upstream, 0), axis=-1, keepdims=True)
    to_setter = jnp.where(index == setter, -jnp.sign(fours) * through_threshold, 0)
    exact = beta * jnp.where(kept, upstream, to_setter)
    return jnp.moveaxis(exact.reshape(shape), -1, axis).astype(g.dtype)
