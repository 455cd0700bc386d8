"""W: soft-thresholded 2:4 weights with a frozen scale, and the gradients through them."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float
from pallas_kernels.pack import reference as pack
from venom_jax.pattern import ThresholdGradient


def optimal_scale(w: Float[Array, "..."], axis: int) -> Float[Array, ""]:
    """beta = <w, S(w)> / <S(w), S(w)>, the scale that minimises |w - beta S(w)|; 1 where S(w) = 0.

    One scalar for the whole matrix, in f32; 1.483 for Gaussian entries.

    Args:
      w: the f32 master weights.
      axis: the axis along which groups of four lie.

    Source: S-STE, arXiv 2409.09099, section 4.
    """
    w = w.astype(jnp.float32)
    s = pack.soft_threshold(w, axis)
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
    index = jnp.arange(4)
    setter = jnp.max(jnp.where(at_threshold, index, -1), axis=-1, keepdims=True)
    through_threshold = jnp.sum(jnp.where(kept, jnp.sign(fours) * upstream, 0), axis=-1, keepdims=True)
    to_setter = jnp.where(index == setter, -jnp.sign(fours) * through_threshold, 0)
    exact = beta * jnp.where(kept, upstream, to_setter)
    return jnp.moveaxis(exact.reshape(shape), -1, axis).astype(g.dtype)
