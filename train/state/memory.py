"""What a step takes of a device's memory, reckoned before anything is compiled.

Parameters, the optimizer's state and gradients are exact; the rest is a reckoning of what the layers keep for the
backward and of the largest arrays that exist for a moment. With all layers unrolled and `Train.remat='none'` it is
within 6 % of what XLA took for 1B and for 7B's layers, dense and sparse, on one H100 (docs/results/h100/train.json),
and within 7 % of programs compiled for two and four (docs/results/compiled-memory.json). For layers in a loop it is
rougher: 1B with `Train.remat='dots'` 41.5 GiB, where XLA took 38.5. In eight bits 7B's layers are within 7 % of what
XLA took on one H200 (docs/results/h200/train8.json).
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from train.config.settings import RunConfig
from train.model.mesh import specs
from train.state.state import abstract_state
from venom_jax import Recipe


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    parameters: int
    optimizer: int
    """Moments, and the moving average if there is one."""
    gradients: int
    weights: int
    """In the compute dtype: of the layer at work, gathered from the other devices, and of the head; and casts to eight
    bits, which the forward keeps for the backward."""
    activations: int
    """What all layers keep, and one layer's work."""
    logits: int

    @property
    def fixed(self) -> int:
        """What no setting of batch or recomputation makes smaller."""
        return self.parameters + self.optimizer + self.gradients

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = (f"{field.name} {getattr(self, field.name) / 2**30:.2f}" for field in fields(self))
        return f"about {self.total / 2**30:.2f} GiB a device: {', '.join(parts)}"


def estimate(config: RunConfig, data: int, fsdp: int) -> Memory:
    """The memory of a step on data x fsdp devices."""
    shape, train = config.model, config.train
    state, wide = abstract_state(config), jnp.dtype(train.dtype).itemsize
    width = (shape.heads + 2 * shape.key_value_heads) * shape.head_dim
    layer = shape.d_model * (width + shape.d_model + shape.ffn_matrices * shape.neurons)
    head = shape.d_model * shape.vocab_size
    copies = 1 if train.accumulation == 1 else 2  # the sum so far, and a microbatch's
    # Of one layer: weights that come while another's are in use, and its gradients before they are scattered.
    layers = (2 * wide + 4) * layer if fsdp > 1 else wide * layer
    tokens = train.batch_size // (train.accumulation * data * fsdp) * train.seq_len
    kept, working = _activations(config, width)
    return Memory(
        parameters=_bytes(state.params, fsdp),
        optimizer=_bytes((state.opt_state, state.ema), fsdp),
        gradients=copies * _bytes(state.params, fsdp),
        weights=layers + wide * head + _casts(config, width, fsdp),
        activations=tokens * (shape.layers * kept + working),
        logits=tokens // train.loss_chunks * shape.vocab_size * (4 + wide) + (4 * head if fsdp > 1 else 0),
    )


def _activations(config: RunConfig, width: int) -> tuple[int, int]:
    """Bytes a token: kept by a layer, and of one layer's work; of the recipe that takes most."""
    recipes = [part for recipe in config.schedule.recipes for _, _, part in recipe.parts(config.model.layers)]
    found = [_of_recipe(config, width, recipe) for recipe in recipes]
    return math.ceil(max(kept for kept, _ in found)), math.ceil(max(working for _, working in found))


def _of_recipe(config: RunConfig, width: int, recipe: Recipe) -> tuple[float, float]:
    shape = config.model
    # A gate leaves two arrays of hidden activations; experts their inputs and outputs, a copy for each.
    d, f, wide = shape.d_model, shape.active_neurons * (shape.ffn_matrices - 1), jnp.dtype(config.train.dtype).itemsize
    copies = wide * 2 * d * shape.experts_per_token if shape.experts else 0
    share = recipe.top_k / recipe.experts
    # a, or a packed twice at 9/16 of its size, of the neurons that a token computes; without recomputation dense keeps
    # a^2 as well. In eight bits y2 alone, packed twice at 5/8, and what the products read as a byte an entry.
    if recipe.in_fp8:
        hidden = unpruned = f * (1.0 if recipe.is_dense else share * 5 / 4)
    else:
        hidden = wide * f * (1.0 if recipe.is_dense else share * 9 / 8)
        unpruned = hidden * (2 if recipe.is_dense else 1)
    narrower = 3 * d * (wide - 1) if recipe.in_fp8 else 0
    everything = copies + 2 * 4 * d + wide * (4 * d + 2 * width) + unpruned
    unrolled = (
        wide * (1.5 * d + width) - narrower + unpruned
    )  # a loop keeps the norms' float32 and the projections, too
    kept = {
        "none": unrolled if config.train.unroll >= config.model.layers else everything,
        "dots": wide * (3 * d + width) + hidden,  # the input, what heads read and give, and the hidden activations
        "full": wide * d,
    }[config.train.remat]
    return kept, everything


def _casts(config: RunConfig, width: int, fsdp: int) -> int:
    """Bytes of the e4m3 weights that layers keep for the backward: those of the projections and of the dense FFN."""
    shape, train = config.model, config.train
    if train.remat == "full":
        return 0
    projections = shape.d_model * (width + shape.d_model) if fsdp == 1 else 0
    ffn = 2 * shape.d_model * shape.d_ffn / fsdp
    parts = [recipe.parts(shape.layers) for recipe in config.schedule.recipes]
    kept = [
        sum((end - first) * (projections + ffn * own.is_dense) * own.in_fp8 for first, end, own in found)
        for found in parts
    ]
    return math.ceil(max(kept))


def _bytes(tree: Any, fsdp: int) -> int:
    """Of a tree on a device, its large leaves being cut."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(specs(tree), is_leaf=lambda s: isinstance(s, P)), strict=True)
    return sum(leaf.size * leaf.dtype.itemsize // (1 if spec == P() else fsdp) for leaf, spec in leaves)


def check_fits(config: RunConfig, data: int, fsdp: int) -> str | None:
    """A warning where the reckoning exceeds the device's memory; None where it does not, or where its size is unknown.

    Raises:
      ValueError: parameters, moments and gradients alone exceed it; says what to change.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return None
    found = estimate(config, data, fsdp)
    has = f"Mesh.data={data} x Mesh.fsdp={fsdp} devices give JAX {limit / 2**30:.2f} GiB each"
    more = "let JAX have more of a device (XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 in the environment; by default 0.75)"
    if found.fixed > limit:
        needed = math.ceil(found.fixed * fsdp / limit)
        raise ValueError(
            f"the model does not fit: {has}, parameters, optimizer and gradients take {found.fixed / 2**30:.2f} GiB of "
            f"each; use Mesh.fsdp={needed} or more devices, Optimizer.first_moment_dtype='bfloat16', a smaller model, "
            f"or {more}"
        )
    if found.total > limit:
        return (
            f"the run may not fit: {has}, and it takes {found}; if it runs out of memory, raise Train.accumulation, "
            f"Train.loss_chunks or Mesh.fsdp, set Train.remat='full', or {more}"
        )
    return None
