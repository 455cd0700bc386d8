"""The decoder of the Llama kind in plain functions: a whole sequence, or new tokens behind a cache.

    x = x + out(attention(norm(x)));  x = x + down(act(gate(norm(x))) * up(norm(x)))

Dimension keys: B batch, N new tokens, S keys (of a whole sequence, or the cache's length), D width, F hidden neurons,
L layers, H heads, K key-value heads, h head size, V vocabulary, I and O a linear layer's inputs and outputs. Layers are
stacked (a leading L) and run by ``jax.lax.scan``, neighbours that are pruned alike in one.

Every linear layer goes through one seam, `Times`, so pruning and observing its inputs change nothing else.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from venom_jax.activation.linear import Parameters, linear, sparse_linear, squares_so_far
from venom_jax.activation.settings import Sparsity
from venom_jax.pretrained.architecture import Architecture

Weights = dict[str, Any]
"""embedding [V, D], final_norm [D], head [D, V] unless tied, and blocks: linears {name: {"w": [L, I, O], "b": [L, O]}},
norms {name: [L, size]}."""

Times = Callable[[str, Float[Array, "B N I"]], Float[Array, "B N O"]]
"""(name of a linear layer, its input) -> its output."""

_SEES_ALL = np.int32(2**31 - 1)


class Cache(NamedTuple):
    """What later tokens need of earlier ones; what stands beyond the last token is not read.

    Attributes:
      key, value: of every layer, keys rotated.
      squares: of the criterion `clact_causal`, sums of each linear layer's squared inputs, [L, B, I] by name.
    """

    key: Float[Array, "L B S K h"]
    value: Float[Array, "L B S K h"]
    squares: dict[str, Float[Array, "L B I"]]


def empty_cache(arch: Architecture, batch: int, length: int, dtype: Any, sparsity: Sparsity | None = None) -> Cache:
    """A cache for `length` tokens of `batch` sequences."""
    zeros = jnp.zeros((arch.layers, batch, length, arch.kv_heads, arch.head_dim), dtype)
    counted = sparsity is not None and sparsity.criterion == "clact_causal"
    squares = {n: jnp.zeros((arch.layers, batch, i)) for n, (i, _) in arch.linears.items()} if counted else {}
    return Cache(zeros, zeros, squares)


def hidden(
    arch: Architecture,
    weights: Weights,
    tokens: Int[Array, "B N"],
    *,
    sparsity: Sparsity | None = None,
    parameters: Mapping[str, Parameters] | None = None,
    cache: Cache | None = None,
    position: Int[Array, ""] | int = 0,
    valid: Bool[Array, "B N"] | None = None,
    dtype: Any = None,
    remat: bool = False,
) -> tuple[Float[Array, "B N D"], Cache | None]:
    """Last hidden states after the final norm, and the cache with these tokens in it.

    Args:
      arch: the architecture.
      weights: as `Weights` says.
      tokens: a whole sequence without a cache; else those that follow what the cache holds.
      sparsity: how inputs of linear layers are pruned; None for the dense model.
      parameters: what that needs, by the linear layer's name, with a leading L.
      cache: of the tokens before these.
      position: of the first token.
      valid: tokens that are no padding, for the criteria that look at other tokens.
      dtype: to compute in; the embedding's by default.
      remat: recompute each layer in the backward.
    """
    dtype = dtype or weights["embedding"].dtype
    place = position + jnp.arange(tokens.shape[1])
    dense = None if sparsity is None or not sparsity.dense_prefix else (place < sparsity.dense_prefix)[None]
    frequencies_windows = frequencies_and_windows(arch)

    def layer(patterns, x, scanned):
        block, found, frequencies, window, old = scanned
        times = partial(_dense_times, block["linears"])
        squares = {} if old is None else dict(old.squares)
        if patterns and sparsity is not None:
            times = partial(_sparse_times, block["linears"], sparsity, patterns, found, dense, valid, squares)
        x, key, value = run_block(arch, block, x, times, frequencies, window, position, old)
        return x, None if old is None else Cache(key, value, squares)

    x = weights["embedding"][tokens].astype(dtype)
    if arch.embedding_scale != 1:
        x = x * jnp.asarray(arch.embedding_scale, weights["embedding"].dtype).astype(dtype)
    caches = []
    for first, end, patterns in ((0, arch.layers, {}),) if sparsity is None else sparsity.runs(arch.layers):
        names = [name for name in patterns if name in arch.linears]
        found = {name: (parameters or {}).get(name, Parameters()) for name in names}
        stacked = (weights["blocks"], found, *frequencies_windows, cache)
        part = jax.tree.map(lambda a, first=first, end=end: a if end - first == arch.layers else a[first:end], stacked)
        run = partial(layer, {name: patterns[name] for name in names})
        x, extended = jax.lax.scan(jax.checkpoint(run, prevent_cse=False) if remat else run, x, part)
        caches.append(extended)
    if cache is not None:
        cache = caches[0] if len(caches) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
    return rms_norm(x, weights["final_norm"], arch.norm_epsilon, arch.norm_plus_one), cache


def frequencies_and_windows(arch: Architecture) -> tuple[np.ndarray, np.ndarray]:
    """Of each layer the frequencies of its rotary positions, [L, h/2], and how many tokens back it sees, [L]."""
    ropes = np.stack([rope.frequencies(arch.head_dim) for rope in arch.ropes])
    return ropes, np.array([_SEES_ALL if w is None else w for w in arch.windows], np.int32)


def logits(arch: Architecture, weights: Weights, states: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """float32 logits of hidden states."""
    head = weights["embedding"].T if arch.tied else weights["head"]
    return jnp.matmul(states, head.astype(states.dtype), preferred_element_type=jnp.float32)


def run_block(
    arch: Architecture,
    block: Mapping[str, Any],
    x: Float[Array, "B N D"],
    times: Times,
    frequencies: Float[Array, " h_2"],
    window: Int[Array, ""],
    position: Int[Array, ""] | int = 0,
    cache: Cache | None = None,
) -> tuple[Float[Array, "B N D"], Float[Array, "B S K h"], Float[Array, "B S K h"]]:
    """One layer's output, and its keys and values: those of these tokens, or the cache's with them in it.

    `block` and `cache` are slices without L; `times` computes the linear layers.
    """
    norm = partial(_norm, arch, block["norms"])
    count = x.shape[1]
    h = norm("attention_norm", x)
    query, key, value = (
        times(name, h).reshape(*x.shape[:2], heads, arch.head_dim)
        for name, heads in (("q", arch.heads), ("k", arch.kv_heads), ("v", arch.kv_heads))
    )
    if arch.qk_norm:
        query, key = norm("query_norm", query), norm("key_norm", key)
    place = position + jnp.arange(count)
    query, key = rotate(query, frequencies, place[None]), rotate(key, frequencies, place[None])
    if cache is not None:
        key = jax.lax.dynamic_update_slice_in_dim(cache.key, key.astype(cache.key.dtype), position, axis=1)
        value = jax.lax.dynamic_update_slice_in_dim(cache.value, value.astype(cache.value.dtype), position, axis=1)
    mixed = _attend(arch, query, key, value, place, window, whole=cache is None)
    y = times("o", mixed.reshape(*x.shape[:2], -1))
    x = x + (norm("attention_out_norm", y) if arch.four_norms else y)
    h = norm("ffn_norm", x)
    up = times("up", h)
    if arch.gated:
        gate = times("gate", h)
        up = up * (jax.nn.silu(gate) if arch.activation == "silu" else jax.nn.gelu(gate, approximate=True))
    else:
        up = jnp.square(jax.nn.relu(up))
    y = times("down", up)
    return x + (norm("ffn_out_norm", y) if arch.four_norms else y), key, value


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], epsilon: float, plus_one: bool = False
) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + epsilon) * scale (or 1 + scale), computed in float32 and returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    scale = scale.astype(jnp.float32)
    return (normed * (1 + scale if plus_one else scale)).astype(x.dtype)


def rotate(
    x: Float[Array, "B N H h"], frequencies: Float[Array, " h_2"], place: Int[Array, "#B N"]
) -> Float[Array, "B N H h"]:
    """Features (i, i + h/2) of a token at ``place`` turn by the angle place * frequencies[i]."""
    angle = place[..., None] * frequencies
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


def _attend(
    arch: Architecture,
    query: Float[Array, "B N H h"],
    key: Float[Array, "B S K h"],
    value: Float[Array, "B S K h"],
    place: Int[Array, " N"],
    window: Int[Array, ""],
    *,
    whole: bool,
) -> Float[Array, "B N H h"]:
    """Causal attention; `place` is each query's, keys stand at 0 and behind it."""
    if whole and all(w is None for w in arch.windows):
        fused = jax.default_backend() == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16)
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, scale=arch.attention_scale, implementation="cudnn" if fused else None
        )
    back = place[:, None] - jnp.arange(key.shape[1])
    mask = (back >= 0) & (back < window)
    return jax.nn.dot_product_attention(
        query, key.astype(query.dtype), value.astype(query.dtype), mask=mask[None, None], scale=arch.attention_scale
    )


def _norm(arch: Architecture, norms: Mapping[str, Array], name: str, x: Array) -> Array:
    return rms_norm(x, norms[name], arch.norm_epsilon, arch.norm_plus_one)


def _dense_times(linears: Mapping[str, Any], name: str, x: Array) -> Array:
    return linear(x, linears[name]["w"], linears[name].get("b"))


def _sparse_times(
    linears: Mapping[str, Any],
    sparsity: Sparsity,
    patterns: Mapping[str, Any],
    parameters: Mapping[str, Parameters],
    dense: Array | None,
    valid: Array | None,
    squares: dict[str, Array],
    name: str,
    x: Array,
) -> Array:
    earlier = squares.get(name)
    if earlier is not None:
        counted = x if valid is None else jnp.where(valid[..., None], x, 0)
        squares[name] = squares_so_far(counted, earlier)[:, -1]
    if name not in patterns:
        return _dense_times(linears, name, x)
    return sparse_linear(
        x,
        linears[name]["w"],
        linears[name].get("b"),
        sparsity,
        parameters[name],
        pattern=patterns[name],
        dense=dense,
        valid=valid,
        earlier=earlier,
    )
