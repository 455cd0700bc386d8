"""The decoder with a cache of keys and values: a new token costs one position's work, not a whole sequence's.

Dimension keys as in `train.model.decoder`, and N new tokens. The FFNs are dense.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from train.model.decoder import Block, Decoder, rms_norm
from train.model.embedding import look_up
from venom_jax import Recipe


class KeysValues(NamedTuple):
    """Rotated keys and values of every layer; what stands beyond the last token is not read."""

    key: Float[Array, "L B S K h"]
    value: Float[Array, "L B S K h"]


def empty(decoder: Decoder, batch: int, length: int, dtype: Any) -> KeysValues:
    """A cache for `length` tokens (S) of `batch` sequences."""
    config = decoder.config
    zeros = jnp.zeros((config.layers, batch, length, config.key_value_heads, config.head_dim), dtype)
    return KeysValues(zeros, zeros)


def extend(
    decoder: Decoder, tokens: Int[Array, "B N"], cache: KeysValues, position: Int[Array, ""] | int
) -> tuple[Float[Array, "B N D"], KeysValues]:
    """Last hidden states of `tokens`, which stand at `position` and behind it, and the cache with them in it.

    Computes in the cache's dtype. Tokens before `position` are those the cache was extended by. The whole length S at
    once goes through fused causal attention, so `position` must then be 0.
    """
    graphdef, stacked = nnx.split(decoder.blocks)
    length, count = cache.key.shape[2], tokens.shape[1]
    mask_NxS = jnp.arange(length) <= position + jnp.arange(count)[:, None]

    def layer(x, scanned):
        state, key, value = scanned
        return _block(nnx.merge(graphdef, state), x, KeysValues(key, value), position, mask_NxS)

    x = look_up(decoder.embedding[...], tokens, cache.key.dtype)
    x, cache = jax.lax.scan(layer, x, (stacked, *cache))
    return rms_norm(x, decoder.final_scale[...], decoder.config.norm_epsilon), cache


def _block(
    block: Block, x: Float[Array, "B N D"], cache: KeysValues, position: Int[Array, ""] | int, mask: Bool[Array, "N S"]
) -> tuple[Float[Array, "B N D"], KeysValues]:
    """One layer; `cache` is its slice, without L."""
    epsilon, attention = block.config.norm_epsilon, block.attention
    query, key, value = attention.project(rms_norm(x, block.attention_scale[...], epsilon), position)
    cache = KeysValues(
        jax.lax.dynamic_update_slice_in_dim(cache.key, key, position, axis=1),
        jax.lax.dynamic_update_slice_in_dim(cache.value, value, position, axis=1),
    )
    if x.shape[1] == cache.key.shape[1]:
        mixed = attention.mix(query, key, value)
    else:
        mixed = jax.nn.dot_product_attention(query, cache.key, cache.value, mask=mask[None, None])
    x = x + attention.merge(mixed)
    return x + block.ffn(rms_norm(x, block.ffn_scale[...], epsilon), recipe=Recipe.dense()), cache
