"""Cross-entropy of a large vocabulary, a slice of the sequence at a time, with its gradient made in the forward pass.

One dimension key: B batch, S sequence, D d_model, V vocabulary, c slices.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def head_logits(hidden: Float[Array, "*B D"], head: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    """float32 logits of products in hidden's dtype."""
    return jnp.matmul(hidden, head.astype(hidden.dtype)).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_cross_entropy(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    labels: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    slices: int,
    z_loss: float = 0.0,
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
    """
    return jax.lax.map(lambda part: _slice_loss(head, z_loss, *part), _cut(slices, hidden, labels, weights)).sum()


def _slice_loss(head, z_loss, hidden, labels, weights):
    logits = head_logits(hidden, head)
    own = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    losses = log_normalizer - own
    if z_loss:
        losses += z_loss * jnp.square(log_normalizer)
    return jnp.sum(losses * weights)


def _forward(hidden, head, labels, weights, slices, z_loss):
    cast = head.astype(hidden.dtype)

    def one(d_head, part):
        x, label, weight = part
        logits = head_logits(x, cast)
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
        d_x = jnp.einsum("bsv,dv->bsd", d_logits, cast)
        d_head += jnp.einsum("bsd,bsv->dv", x, d_logits, preferred_element_type=jnp.float32)
        return d_head, (loss, d_x)

    parts = _cut(slices, hidden, labels, weights)
    d_head, (losses, d_hidden) = jax.lax.scan(one, jnp.zeros(head.shape, jnp.float32), parts)
    return losses.sum(), (jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape), d_head.astype(head.dtype))


def _backward(slices, z_loss, gradients, cotangent):
    d_hidden, d_head = gradients
    return d_hidden * cotangent.astype(d_hidden.dtype), d_head * cotangent.astype(d_head.dtype), None, None


weighted_cross_entropy.defvjp(_forward, _backward)


def _cut(slices: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, S, ...] -> [c, B, S/c, ...]; the batch stays whole, so that it may be sharded."""
    return tuple(jnp.moveaxis(a.reshape(a.shape[0], slices, -1, *a.shape[2:]), 1, 0) for a in arrays)
