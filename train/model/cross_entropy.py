"""Cross-entropy of a large vocabulary, a slice of the sequence at a time, with its gradient made in the forward pass.

One dimension key: B batch, S sequence, D d_model, V vocabulary, c slices.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from venom_jax import fp8
from venom_jax.sharded_ffn import gather, scatter


def head_logits(hidden: Float[Array, "*B D"], head: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    """float32 logits, of operands in hidden's dtype."""
    return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _training_logits(hidden: Float[Array, "*B D"], cast: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    """Rounded to hidden's dtype, in which they are written and read again: in bfloat16 half the traffic.

    That changes the loss by 2e-4 and the head's gradient by 0.3 %.
    """
    return jnp.matmul(hidden, cast).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def weighted_cross_entropy(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    labels: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    slices: int,
    z_loss: float = 0.0,
    in_fp8: bool = False,
) -> Float[Array, ""]:
    """sum over positions of weights * (l - (hidden head)[label] + z_loss l^2), l = log sum exp(hidden head), in nats.

    Only the logits of B S / slices positions exist at a time.  Under a gradient they are computed once: the slice's
    gradient, softmax - indicator, is taken while they are there, where differentiating a checkpointed slice would
    compute them again.

    Args:
      head: the master; cast to hidden's dtype.  Its gradient is summed over slices in float32.
      weights: no gradient reaches them.
      slices: divides S.
      z_loss: keeps the normalisers near 1 (PaLM has 1e-4); 0 leaves the cross-entropy alone.
      in_fp8: the head's three products have operands of eight bits, as `venom_jax.fp8.linear`.
    """
    multiply = _products(head.astype(hidden.dtype), in_fp8)
    found = jax.lax.map(lambda part: _slice_loss(multiply, z_loss, *part), _cut(slices, hidden, labels, weights))
    return found.sum()


type _Pull = Callable[[Array], tuple[Array, Array]]


def _products(cast: Float[Array, "D V"], in_fp8: bool) -> Callable[[Array], tuple[Float[Array, "*B V"], _Pull]]:
    """The head's products with x: its logits, in float32, and what makes (d_x, d_head in float32) of theirs.

    cast: the head in hidden's dtype.
    """
    if in_fp8:
        packed = fp8.pack_linear(cast)
        wide = jnp.broadcast_to(jnp.float32(0), cast.shape)  # says the gradient's dtype, nothing reads it

        def in_eight_bits(x):
            logits, pull = jax.vjp(lambda x, w: fp8.linear(x, w, packed), x, wide)
            return logits.astype(jnp.float32), pull

        return in_eight_bits

    def plainly(x):
        def pull(d_logits):
            d_head = jnp.einsum("bsd,bsv->dv", x, d_logits, preferred_element_type=jnp.float32)
            return jnp.einsum("bsv,dv->bsd", d_logits, cast), d_head

        return _training_logits(x, cast), pull

    return plainly


def _slice_loss(multiply, z_loss, hidden, labels, weights):
    logits, _ = multiply(hidden)
    own = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    losses = log_normalizer - own
    if z_loss:
        losses += z_loss * jnp.square(log_normalizer)
    return jnp.sum(losses * weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def sharded_cross_entropy(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "Dn V"],
    labels: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    slices: int,
    z_loss: float,
    axis: str,
    in_fp8: bool = False,
) -> Float[Array, ""]:
    """``weighted_cross_entropy`` of this device's rows, with this device's part of the head's D; in ``jax.shard_map``.

    The head is gathered over the mesh axis ``axis`` in hidden's dtype; its gradient is summed and scattered in its own.
    """
    whole = gather(head.astype(hidden.dtype), axis, 0)
    return weighted_cross_entropy(hidden, whole, labels, weights, slices, z_loss, in_fp8)


def _sharded_forward(hidden, head, labels, weights, slices, z_loss, axis, in_fp8):
    whole = gather(head.astype(hidden.dtype), axis, 0)
    loss, d_hidden, d_head = _loss_and_gradients(hidden, whole, labels, weights, slices, z_loss, in_fp8)
    return loss, (d_hidden, scatter(d_head.astype(head.dtype), axis, 0))


def _sharded_backward(slices, z_loss, axis, in_fp8, gradients, cotangent):
    return _backward(slices, z_loss, in_fp8, gradients, cotangent)


def _forward(hidden, head, labels, weights, slices, z_loss, in_fp8):
    cast = head.astype(hidden.dtype)
    loss, d_hidden, d_head = _loss_and_gradients(hidden, cast, labels, weights, slices, z_loss, in_fp8)
    return loss, (d_hidden, d_head.astype(head.dtype))


def _loss_and_gradients(hidden, cast, labels, weights, slices, z_loss, in_fp8):
    """(loss, its gradients to hidden and, in float32, to the head); cast: the head in hidden's dtype."""
    multiply = _products(cast, in_fp8)

    def one(d_head, part):
        x, label, weight = part
        logits, pull = multiply(x)
        log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        own = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == label[..., None]
        # A sum over the masked logits and not a gather: it joins the reduction that reads them anyway.
        losses = log_normalizer[..., 0] - jnp.where(own, logits, 0).sum(-1)
        softmax = jnp.exp(logits - log_normalizer)
        if z_loss:
            losses += z_loss * jnp.square(log_normalizer[..., 0])
            softmax *= 1 + 2 * z_loss * log_normalizer
        loss = jnp.sum(losses * weight)
        d_logits = ((softmax - own) * weight[..., None]).astype(x.dtype)
        d_x, own_d_head = pull(d_logits)
        return d_head + own_d_head, (loss, d_x)

    parts = _cut(slices, hidden, labels, weights)
    d_head, (losses, d_hidden) = jax.lax.scan(one, jnp.zeros(cast.shape, jnp.float32), parts)
    return losses.sum(), jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape), d_head


def _backward(slices, z_loss, in_fp8, gradients, cotangent):
    d_hidden, d_head = gradients
    return d_hidden * cotangent.astype(d_hidden.dtype), d_head * cotangent.astype(d_head.dtype), None, None


weighted_cross_entropy.defvjp(_forward, _backward)
sharded_cross_entropy.defvjp(_sharded_forward, _sharded_backward)


def _cut(slices: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, S, ...] -> [c, B, S/c, ...]; the batch stays whole, so that it may be sharded."""
    return tuple(jnp.moveaxis(a.reshape(a.shape[0], slices, -1, *a.shape[2:]), 1, 0) for a in arrays)
