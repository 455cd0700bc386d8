"""Which inputs stay: exact order statistics without a sort.

Scores compare by their bits (`magnitude_key`), so the order is total: ties go to the lower input, -0.0 equals +0.0,
and NaN ranks above inf. Both functions below count instead of sorting: XLA's sort on a CPU takes longer than the
product that follows it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt

from pallas_kernels.pack.reference import magnitude_key
from venom_jax.activation.patterns import NM, Pattern


def select(score: Float[Array, "*B I"], pattern: Pattern) -> Bool[Array, "*B I"]:
    """True for the inputs that stay: those of the largest scores, of a block (N:M), of a token, or of all tokens.

    Args:
      score: not negative.
      pattern: `NM` keeps exactly N of every M neighbours, `Unstructured` floor(I (1 - ratio)) of a token's I.

    Raises:
      ValueError: I is no multiple of M, or nothing would stay.
    """
    size = score.shape[-1]
    kept = pattern.kept(size)
    if kept == size:
        return jnp.ones(score.shape, bool)
    key = magnitude_key(score)
    if isinstance(pattern, NM):
        return _of_blocks(key, pattern.n, pattern.m)
    if pattern.scope == "batch":
        return _of_rows(key.reshape(-1), pattern.kept(key.size)).reshape(score.shape)
    return _of_rows(key, kept)


def lower_median(x: Float[Array, "*B I"]) -> Float[Array, "*B 1"]:
    """The element of rank floor((I - 1) / 2), ascending, of each row: of an even number the lower middle one."""
    size = x.shape[-1]
    bits = jax.lax.bitcast_convert_type(x, jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32)
    sign = jnp.array(1 << (8 * x.dtype.itemsize - 1), bits.dtype)
    negative = bits >= sign
    # Integers that compare as the floats do: negative ones turned round, below all others.
    key = kth_largest(jnp.where(negative, ~bits, bits | sign), size - (size - 1) // 2)
    return jax.lax.bitcast_convert_type(jnp.where(key >= sign, key ^ sign, ~key), x.dtype)


def kth_largest(key: UInt[Array, "*B I"], k: int) -> UInt[Array, "*B 1"]:
    """The k-th largest of each row, k from 1: built bit by bit, as the largest t that k entries reach."""
    bits = 8 * key.dtype.itemsize

    def add_bit(i, found):
        trial = found | (jnp.array(1 << (bits - 1), key.dtype) >> i.astype(key.dtype))
        reached = jnp.sum(key >= trial, axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(reached >= k, trial, found)

    return jax.lax.fori_loop(0, bits, add_bit, jnp.zeros((*key.shape[:-1], 1), key.dtype))


def _of_blocks(key: UInt[Array, "*B I"], n: int, m: int) -> Bool[Array, "*B I"]:
    blocks = key.reshape(*key.shape[:-1], -1, m)
    mine, other = blocks[..., :, None], blocks[..., None, :]
    place = jnp.arange(m)
    ahead = (other > mine) | ((other == mine) & (place[None, :] < place[:, None]))
    return (jnp.sum(ahead, axis=-1, dtype=jnp.int32) < n).reshape(key.shape)


def _of_rows(key: UInt[Array, "*B I"], k: int) -> Bool[Array, "*B I"]:
    least = kth_largest(key, k)
    above, equal = key > least, key == least
    room = k - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room))
