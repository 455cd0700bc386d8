"""Statistics of every linear layer's inputs over a text, and what pruning needs made from them.

Layer by layer: all windows pass one block before the next is looked at, so only one block's inputs exist at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from venom_jax.activation.criteria import Statistics, join, parameters, prune_weight
from venom_jax.activation.linear import Parameters, linear, sparse_linear
from venom_jax.activation.patterns import Pattern
from venom_jax.activation.selection import lower_median
from venom_jax.activation.settings import Sparsity
from venom_jax.pretrained.architecture import Architecture
from venom_jax.pretrained.decoder import Weights, frequencies_and_windows, run_block

SAMPLE = 4096
"""Tokens of a layer that medians of channels are taken of."""
READS = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "up", "up": "up", "down": "down"}
"""Linear layers that read the same input, under the name of one of them."""

Collected = list[dict[str, Statistics]]
"""Of each block, by the linear layer's name; layers that read the same input share theirs."""


def calibrate(
    arch: Architecture,
    weights: Weights,
    windows: Int[np.ndarray, "W S"],
    *,
    skip_first: int = 1,
    seed: int = 0,
    on_layer: Callable[[int], object] = lambda layer: None,
) -> Collected:
    """Statistics of the dense model's inputs over windows of tokens.

    Args:
      arch, weights: the model.
      windows: each is a sequence of its own.
      skip_first: tokens at the beginning of each window that are left out: the first one's activations are often
        hundreds of times larger than all others'.
      seed: of the sample of tokens.
      on_layer: called after each layer.

    Raises:
      ValueError: no window, or nothing left of one.
    """
    count, length = windows.shape
    if not count or length <= skip_first:
        raise ValueError(
            f"{count} windows of {length} tokens, the first {skip_first} left out, are too short a calibration text"
        )
    rng = np.random.default_rng(seed)
    each = min(length - skip_first, -(-SAMPLE // count))
    rows = np.stack([np.sort(rng.choice(length - skip_first, each, replace=False)) for _ in range(count)]) + skip_first
    frequencies, spans = frequencies_and_windows(arch)
    states = [_embedded(arch, weights, jnp.asarray(one)) for one in windows]
    collected: Collected = []
    for i in range(arch.layers):
        parts: dict[str, list[Statistics]] = {}
        for n, x in enumerate(states):
            states[n], seen = _observe(
                arch, weights["blocks"], i, frequencies[i], spans[i], x, rows[n], skip_first=skip_first
            )
            for name, (total, squares, largest, medians, sample) in jax.device_get(seen).items():
                wide = (np.asarray(total, np.float64), np.asarray(squares, np.float64), np.asarray(largest, np.float64))
                found = Statistics(length - skip_first, *wide, float(medians), np.asarray(sample, np.float32))
                parts.setdefault(name, []).append(found)
        joined = {name: join(some).settled() for name, some in parts.items()}
        collected.append({name: joined[READS[name]] for name in arch.linears})
        on_layer(i)
    return collected


def layer_parameters(
    arch: Architecture, weights: Weights, sparsity: Sparsity, collected: Collected | None
) -> dict[str, Parameters]:
    """What `hidden` needs for a setting: the constants of every pruned layer, with a leading L.

    Raises:
      ValueError: statistics are needed and missing, or a layer's size does not fit the pattern.
    """
    linears = weights["blocks"]["linears"]
    pruned = {name for i in range(arch.layers) for name in arch.linears if sparsity.of(i, name) is not None}
    found: dict[str, Parameters] = {}
    for name in sorted(pruned):
        for i in range(arch.layers):
            if pattern := sparsity.of(i, name):
                _check(pattern, arch, name)
        together = [other for other in arch.linears if READS[other] == READS[name] and other in pruned]
        layers = []
        for i in range(arch.layers):
            own = np.asarray(linears[name]["w"][i], np.float32)
            shared = None
            if sparsity.shared_mask and len(together) > 1:
                shared = np.concatenate([np.asarray(linears[one]["w"][i], np.float32) for one in together], axis=1)
            layers.append(parameters(sparsity, own, None if collected is None else collected[i][name], shared))
        found[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return found


def prune_weights(arch: Architecture, weights: Weights, sparsity: Sparsity, collected: Collected | None) -> Weights:
    """The baseline: weights of the named layers pruned by the pattern, by magnitude or, with statistics, as Wanda."""
    linears = dict(weights["blocks"]["linears"])
    for name in arch.linears:
        layers = []
        for i in range(arch.layers):
            w, pattern = np.asarray(linears[name]["w"][i], np.float32), sparsity.of(i, name)
            if pattern is not None:
                _check(pattern, arch, name)
                w = prune_weight(w, pattern, None if collected is None else collected[i][name])
            layers.append(w)
        linears[name] = linears[name] | {"w": jnp.asarray(np.stack(layers), linears[name]["w"].dtype)}
    return weights | {"blocks": weights["blocks"] | {"linears": linears}}


def errors(
    arch: Architecture,
    weights: Weights,
    windows: Int[np.ndarray, "W S"],
    sparsity: Sparsity,
    found: Mapping[str, Parameters],
) -> dict[str, Float[np.ndarray, " L"]]:
    """||y - y'|| / ||y|| of each linear layer's output y when its input alone is pruned, by name, over all windows."""
    sums: dict[str, np.ndarray] = {}
    for one in windows:
        for name, pair in jax.device_get(_squared_errors(arch, weights, jnp.asarray(one), sparsity, found)).items():
            sums[name] = sums.get(name, 0) + np.asarray(pair, np.float64)
    return {name: np.sqrt(pair[:, 0] / np.maximum(pair[:, 1], 1e-30)) for name, pair in sums.items()}


def within_budget(
    arch: Architecture, sparsity: Sparsity, found_errors: Mapping[str, np.ndarray], budget: float
) -> Sparsity:
    """The setting with the layers of the largest errors left dense, until at most ``budget`` of the linear operations
    are pruned: greedily, the smallest error first.

    Raises:
      ValueError: the budget is not in (0, 1].
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget = {budget}: the share of linear operations to prune lies in (0, 1]")
    order = sorted((float(e), i, name) for name, one in found_errors.items() for i, e in enumerate(one))
    room, dense = budget * arch.linear_weights, []
    for _, i, name in order:
        inputs, outputs = arch.linears[name]
        if inputs * outputs <= room:
            room -= inputs * outputs
        else:
            dense.append((f"{i}.{name}", None))
    kept = tuple(entry for entry in sparsity.overrides if entry[0] not in dict(dense))
    return replace(sparsity, overrides=(*kept, *sorted(dense)))


def _check(pattern: Pattern, arch: Architecture, name: str) -> None:
    size = arch.linears[name][0]
    try:
        pattern.kept(size)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}; leave it out of the layers or choose another pattern") from error


@partial(jax.jit, static_argnames="arch")
def _embedded(arch: Architecture, weights: Weights, tokens: Int[Array, " S"]) -> Float[Array, "1 S D"]:
    return weights["embedding"][tokens][None] * jnp.asarray(arch.embedding_scale, weights["embedding"].dtype)


@partial(jax.jit, static_argnames=("arch", "skip_first"))
def _observe(
    arch: Architecture,
    blocks: Any,
    i: Int[Array, ""],
    frequencies: Array,
    span: Array,
    x: Float[Array, "1 S D"],
    rows: Int[Array, " r"],
    *,
    skip_first: int,
) -> tuple[Float[Array, "1 S D"], dict[str, Sequence[Array]]]:
    block = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), blocks)
    seen: dict[str, Sequence[Array]] = {}

    def times(name, h):
        if name == READS[name]:
            inputs = h[0].astype(jnp.float32)
            counted = inputs[skip_first:]
            squares, largest = jnp.sum(jnp.square(counted), axis=0), jnp.max(jnp.abs(counted), axis=0)
            seen[name] = (jnp.sum(counted, axis=0), squares, largest, jnp.sum(lower_median(counted)), inputs[rows])
        return linear(h, block["linears"][name]["w"], block["linears"][name].get("b"))

    x, _, _ = run_block(arch, block, x, times, frequencies, span)
    return x, seen


@partial(jax.jit, static_argnames=("arch", "sparsity"))
def _squared_errors(
    arch: Architecture,
    weights: Weights,
    tokens: Int[Array, " S"],
    sparsity: Sparsity,
    found: Mapping[str, Parameters],
) -> dict[str, Float[Array, "L 2"]]:
    """(sum of (y - y')^2, sum of y^2) of each layer."""
    frequencies, spans = frequencies_and_windows(arch)

    def layer(x, scanned):
        block, own, frequency, span = scanned
        sums = {}

        def times(name, h):
            w, b = block["linears"][name]["w"], block["linears"][name].get("b")
            y = linear(h, w, b)
            if name in own:
                pruned = sparse_linear(h, w, b, sparsity, own[name])
                both = [jnp.sum(jnp.square(a.astype(jnp.float32))) for a in (y - pruned, y)]
                sums[name] = jnp.stack(both)
            return y

        x, _, _ = run_block(arch, block, x, times, frequency, span)
        return x, sums

    x = _embedded(arch, weights, tokens)
    return jax.lax.scan(layer, x, (weights["blocks"], dict(found), frequencies, spans))[1]
