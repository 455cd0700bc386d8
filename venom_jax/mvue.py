"""2:4 along tokens without bias: which two of four survive is drawn, and survivors are scaled so that the mean is kept.

Of all draws with at most two survivors, probabilities proportional to the magnitudes (and at most 1) have the least
variance, summed over the four. Where two entries or fewer are not zero nothing is lost at all.

Source: Chmiel et al., arXiv 2203.10991, for the principle; the probabilities here are those of the exact 2-of-4 case.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float


def unbiased24(x: Float[Array, "R F"], key: Array) -> Float[Array, "R F"]:
    """At most two of each four rows, each entry x_i / p_i with probability p_i, so that the expectation is x.

    p_i = 2 |x_i| / sum |x|; where the largest would exceed 1 it is kept for sure and the others share the second place.
    A four that holds inf or NaN is returned as it is.

    Args:
      x: R a multiple of 4; rows i, i + 1, i + 2, i + 3 make a four.
      key: of the draw, one number for each four.
    """
    fours = x.astype(jnp.float32).reshape(x.shape[0] // 4, 4, x.shape[1])
    size = jnp.abs(fours)
    total, largest = size.sum(axis=1, keepdims=True), size.max(axis=1, keepdims=True)
    certain = (2 * largest > total) & (size == largest)
    rest = jnp.where(2 * largest > total, total - largest, total / 2)
    probability = jnp.where(certain, 1.0, jnp.minimum(size / jnp.where(rest > 0, rest, 1.0), 1.0))
    # One number u for the four: entry i survives if one of u, u + 1 lies in its stretch of the running sum.
    u = jax.random.uniform(key, total.shape)
    ends = jnp.minimum(jnp.cumsum(probability, axis=1), 2.0)
    passed = jnp.ceil(ends - u).astype(jnp.int32)
    survives = jnp.diff(passed, axis=1, prepend=0) > 0
    drawn = jnp.where(survives, fours / jnp.where(survives, probability, 1.0), 0.0)
    return jnp.where(jnp.isfinite(total), drawn, fours).reshape(x.shape).astype(x.dtype)


def key_of_bits(x: Float[Array, "..."]) -> Array:
    """A key made of the bits of an array: another for each layer and step, the same when a step is repeated."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jax.random.key(jnp.sum(bits, dtype=jnp.uint32))
