"""What the devices of a mesh exchange in one step, by itself: the same gathers and scatters, with nothing between them.

In a step most of it happens while the device computes, so that this is what could be hidden and not what is waited for.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from train.config import RunConfig
from train.mesh import AXES, FSDP, Layout, specs
from train.model import pack_ffns
from train.state import TrainState
from venom_jax import Recipe
from venom_jax.dispatch import choose_kernels
from venom_jax.sharded_ffn import gather, gather_packed, scatter


def exchange(config: RunConfig, recipe: Recipe, layout: Layout) -> Callable:
    """exchange(state) -> gradients' parts: a step's collectives of weights and gradients on stand-ins of their size.

    Each microbatch gathers every layer's weights for the forward and again for the backward, and scatters gradients in
    float32; the head is gathered once. At the end gradients are summed along `data`. The embedding's exchange of looked
    up rows is left out: it is as small as one activation.
    """
    shape, dtype, count = config.model, jnp.dtype(config.train.dtype), config.train.accumulation
    kernels = choose_kernels(config.train.implementation, recipe, shape.d_model, shape.d_ffn, dtype, local=True)

    def whole(name: str, part: jax.Array, packed: Any, forward: bool) -> Any:
        sparse = {"w1": "y1", "w2": "dy2"}.get(name) in recipe.weights and forward == (name == "w1")
        if sparse and packed is not None and kernels is not None:
            return gather_packed(getattr(packed, name), FSDP)
        return gather(part.astype(dtype), FSDP, {"w1": 1, "w2": 0}.get(name, 0))

    def forward(_, scanned):
        parts, packed = scanned
        there = {name: whole(name, part, packed, True) for name, part in parts.items()}
        return None, _one_number(jax.lax.optimization_barrier(there))

    def backward(_, scanned):
        parts, packed = scanned
        there = {name: whole(name, part, packed, False) for name, part in parts.items()}
        kept = _one_number(jax.lax.optimization_barrier(there))
        gradients = {}
        for name, part in parts.items():
            dimension = 1 if name == "w1" else 0
            shape = [*part.shape]
            shape[dimension] *= jax.lax.axis_size(FSDP)
            gradients[name] = scatter(jnp.full(shape, kept, part.dtype), FSDP, dimension)
        return None, gradients

    def part(params, method):
        blocks = params["blocks"]
        parts = {name: blocks["attention"][name] for name in ("qkv", "out")}
        parts |= {name: blocks["ffn"][name] for name in ("w1", "w2")}
        scanned = parts, pack_ffns(params, method, recipe, dtype)
        head = params["embedding"].T if shape.tied_head else params["head"]

        def microbatch(total, _):
            seen = jax.lax.scan(forward, None, scanned)[1].sum()
            there = jax.lax.optimization_barrier(gather(head.astype(dtype), FSDP, 0))
            d_head = scatter(jnp.full(there.shape, _one_number(there) + seen, head.dtype), FSDP, 0)
            gradients = jax.lax.scan(backward, None, scanned)[1] | {"head": d_head}
            return jax.tree.map(jnp.add, total, gradients), None

        zeros = jax.tree.map(jnp.zeros_like, parts | {"head": head})
        return jax.lax.psum(jax.lax.scan(microbatch, zeros, None, length=count)[0], "data")

    @jax.jit
    def run(state: TrainState) -> Any:
        # What a device gets stays there: only that it arrives is wanted.
        return layout.each(part, (specs(state.params), P()), P(AXES))(state.params, state.method)

    return run


def _one_number(tree: Any) -> jax.Array:
    """Something of every array, so that none is left out."""
    numbers = [leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.add, numbers) * 0
