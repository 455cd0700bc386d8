"""Experts parted over the devices of a mesh axis: tokens travel to their experts and outputs back, by all-to-all.

For use inside `jax.shard_map`. Each of n devices holds E / n experts whole and its own tokens. Nothing is dropped:
what a device sends to another has room for as many copies as its tokens may have there, min(k, E / n) each, and travels
whole, so that shapes are static; rows that hold no copy are zero and belong to no group, so no product computes them.

Of that room k tokens of n tokens min(k, E / n) are used: where n is much larger than k the exchange is mostly room, and
FSDP (`axis` of the layer), which moves weights instead, is the better choice. Outputs are weighted where their tokens
live, so that the gradient of p reads W2 dense whatever the recipe.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Array, Float, Int
from venom_jax.ffn import PackedWeights
from venom_jax.ffn_parts import Weights
from venom_jax.general_ffn import Packed, feed_forward
from venom_jax.pattern import Recipe


def exchanged(
    x: Float[Array, "T D"],
    weights: Weights,
    experts: int,
    scales: tuple[Array, Array | None],
    packed: Packed | PackedWeights | None,
    route: Int[Array, "T k"],
    p: Float[Array, "T k"],
    axis: str,
    *,
    recipe: Recipe,
    **options: Any,
) -> tuple[Float[Array, "T D"], Float[Array, ""]]:
    """(y, density): the experts' outputs for this device's tokens, weighted by p, with this device's part of `weights`.

    Args:
      experts: E, on all devices together, a multiple of their number n.
      scales: beta and beta_up.
      recipe: without routing.
      options: of `feed_forward`.

    Raises:
      ValueError: E does not part among the devices, or `weights` are not one part of it.
    """
    devices, (tokens, top_k) = jax.lax.axis_size(axis), route.shape
    if experts % devices:
        raise ValueError(f"experts = {experts} do not part among the {devices} devices of {axis!r}; use a multiple.")
    own, width = experts // devices, weights.w1.shape[1]
    if width % own:
        raise ValueError(
            f"w1 has {width} columns, no multiple of the {own} experts of one device: give its part of w1."
        )
    room = tokens * min(top_k, own)
    device = (route // own).reshape(-1)
    # The place of each copy among those for its device, in batch order.
    before = jnp.cumsum(device[:, None] == jnp.arange(devices), axis=0)
    place = jnp.take_along_axis(before, device[:, None], axis=1)[:, 0] - 1 + device * room
    slots = devices * room
    source = jnp.full(slots, tokens, jnp.int32).at[place].set(jnp.arange(len(place), dtype=jnp.int32) // top_k)
    expert = jnp.full(slots, own, jnp.int32).at[place].set(route.reshape(-1) % own)

    def swap(array: Array) -> Array:
        parted = array.reshape(devices, room, *array.shape[1:])
        return jax.lax.all_to_all(parted, axis, 0, 0).reshape(array.shape)

    received = swap(x.at[source].get(mode="fill", fill_value=0))
    local = dataclasses.replace(recipe, experts=own)
    wanted = swap(expert)[:, None] if own > 1 else None
    y, density = feed_forward(
        received,
        weights,
        wanted,
        None,
        *scales,
        recipe=local,
        packed=packed,
        partial=True,
        return_density=True,
        **options,
    )
    # Counted over all rows: of those that hold a copy it is more.
    copies = jnp.sum(swap(expert) < own, dtype=jnp.float32)
    density = density * slots / jnp.maximum(copies, 1)
    returned = swap(y)[place].reshape(tokens, top_k, -1)
    y = jnp.sum(returned.astype(jnp.float32) * p[:, :, None], axis=1).astype(x.dtype)
    return y, jax.lax.pmean(density, axis)
