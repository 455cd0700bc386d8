"""SparseMLP, VNMLinear and SparseMoE as flax.linen modules.

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, recipe):
            return x + venom_jax.linen.SparseMLP(d_ffn=256, max_experts=4)(x, recipe=recipe)

Weights are parameters (w1, w2), in the boxes of their initializers (`nn.with_partitioning`,
`nn.with_logical_partitioning`). The method's state is a collection of its own, `Method`, which goes to `apply` beside
the parameters and which `nn.scan` and `nn.vmap` take as `variable_axes={"params": 0, "Method": 0}`.
`venom_jax.phases.transition` takes both trees as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.array_types import Array, Float
from venom_jax import layer, memory_of_phase
from venom_jax.calibrate import Layer
from venom_jax.dispatch import Implementation
from venom_jax.ffn import PackedWeights
from venom_jax.formats import VNM
from venom_jax.fp8 import EightBitWeights
from venom_jax.moe import SparseMoE
from venom_jax.pattern import WEIGHT_GEMMS, Pattern, Recipe
from venom_jax.placement import Hints, Mesh, Names
from venom_jax.prune import vnm as prune_vnm
from venom_jax.router import Axis
from venom_jax.vnm import Gradient, check_gradient, vnm_linear

METHOD = "Method"
"""The collection of the method's state, which no gradient reaches."""

_WEIGHT_INIT = nn.initializers.lecun_normal()


class SparseMLP(nn.Module):
    """y = relu(x W1)^2 W2 as `venom_jax.SparseMLP`, which documents the attributes; d_model is the width of x.

    Variables:
      params: w1 [D, F], w2 [F, D].
      Method: beta, bias, permutation, phase, and router with `learned_router`.
    """

    d_ffn: int
    max_experts: int = 1
    learned_router: bool = False
    recipe: Recipe = Recipe.dense()
    dtype: Any = None
    param_dtype: Any = jnp.float32
    w1_init: Callable = _WEIGHT_INIT
    w2_init: Callable = _WEIGHT_INIT
    mesh: Mesh | None = None
    token_spec: P | None = None
    weight_axes: Sequence[str] | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch D"],
        *,
        recipe: Recipe | None = None,
        packed: PackedWeights | EightBitWeights | None = None,
        key: Array | None = None,
        return_stats: bool = False,
        implementation: Implementation | None = None,
        axis: Axis | None = None,
        out_sharding: Any = None,
    ) -> Any:
        """Apply the layer; arguments, results and errors as of `venom_jax.SparseMLP`."""
        if self.d_ffn < 1 or self.max_experts < 1:
            raise ValueError(f"sizes must be positive, got d_ffn={self.d_ffn}, max_experts={self.max_experts}.")
        _need_method(self, "beta")
        d_model = x.shape[-1]
        # Inside a shard_map over cut neurons the parameters are a device's part of the layer's.
        own = self.d_ffn // (1 if axis is None else jax.lax.axis_size(axis))
        w1 = self.param("w1", self.w1_init, (d_model, own), self.param_dtype)
        w2 = self.param("w2", self.w2_init, (own, d_model), self.param_dtype)
        beta = self.variable(METHOD, "beta", jnp.ones, len(WEIGHT_GEMMS), jnp.float32)
        bias = self.variable(METHOD, "bias", jnp.zeros, self.max_experts, jnp.float32)
        self.variable(METHOD, "permutation", jnp.arange, self.d_ffn, dtype=jnp.int32)
        phase = self.variable(METHOD, "phase", lambda: jnp.asarray(memory_of_phase.encode(Recipe.dense())))
        learned = None
        if self.learned_router:
            learned = self.variable(METHOD, "router", jnp.zeros, (self.max_experts, d_model), jnp.float32).value
        recipe = self.recipe if recipe is None else recipe
        memory_of_phase.warn_unless_made_for(phase.value, recipe)
        y, stats = layer.run(
            x if self.dtype is None or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(self.dtype),
            Layer(w1, w2, beta.value, bias.value, learned),
            recipe,
            max_experts=self.max_experts,
            packed=packed,
            key=key,
            implementation=implementation,
            axis=axis,
            hints=Hints(self.mesh, self.token_spec, None if self.weight_axes is None else tuple(self.weight_axes)),
            names=_names(self.w1_init, (d_model, own)),
            out_sharding=out_sharding,
        )
        return (y, stats) if return_stats else y


class VNMLinear(nn.Module):
    """y = x W without bias, W read as V:N:M, as `venom_jax.VNMLinear`; d_in is the width of x.

    Variables:
      params: w [in, out], dense masters.
      Method: columns and metadata, the stored places; `venom_jax.prune.vnm(w.T, pattern)` gives others.
    """

    d_out: int
    pattern: Pattern
    gradient: Gradient = "masked"
    param_dtype: Any = jnp.float32
    w_init: Callable = _WEIGHT_INIT

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch in"], *, implementation: dispatch.Implementation | None = None
    ) -> Float[Array, "*batch _out"]:
        """Apply the layer; y has x's dtype."""
        check_gradient(self.gradient)
        _need_method(self, "columns")
        w = self.param("w", self.w_init, (x.shape[-1], self.d_out), self.param_dtype)
        places = {} if self.has_variable(METHOD, "columns") else _places(w, self.pattern)
        columns, metadata = (
            self.variable(METHOD, name, lambda name=name: places[name]).value for name in ("columns", "metadata")
        )
        held = VNM(None, metadata, columns, (self.d_out, x.shape[-1]), self.pattern)
        y = vnm_linear(x.reshape(-1, x.shape[-1]), w, held, gradient=self.gradient, implementation=implementation)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def sparse_moe(d_model: int, d_expert: int, *, name: str | None = None, **options: Any) -> nn.Module:
    """A module with the parameters and call arguments of `SparseMoE`, by nnx's bridge; biases are under `Method`."""
    return nnx.bridge.to_linen(SparseMoE, d_model, d_expert, name=name, **options)


def _places(w: Array, pattern: Pattern) -> dict[str, Array]:
    packed = prune_vnm(w.T, pattern)
    return {"columns": packed.columns, "metadata": packed.metadata}


def _need_method(module: nn.Module, name: str) -> None:
    """Raise ValueError where `apply` was not given the method's state."""
    if not (module.has_variable(METHOD, name) or module.is_mutable_collection(METHOD)):
        raise ValueError(
            f"{'/'.join(module.path) or type(module).__name__} has parameters but no state: give apply the collection "
            f'"{METHOD}" beside "params", and nn.scan around it variable_axes={{"params": 0, "{METHOD}": 0}}.'
        )


def _names(init: Callable, shape: tuple[int, int]) -> Names | None:
    """The mesh axes over which an initializer's box cuts a weight, logical names resolved; None is no box."""
    box = jax.eval_shape(lambda: init(jax.random.key(0), shape, jnp.float32))
    if not isinstance(box, nn.Partitioned):
        return None
    names: Any = box.get_partition_spec()
    if isinstance(box, nn.LogicallyPartitioned):
        names = nn.logical_to_mesh_axes(names, box.rules)
    return tuple(names)
