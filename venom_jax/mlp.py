"""SparseMLP: the squared-ReLU feed-forward layer as a flax.nnx module."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from pallas_kernels.array_types import Array, Float
from venom_jax import general_ffn, layer, memory_of_phase, router
from venom_jax import nonlinearity as activations
from venom_jax.calibrate import Layer
from venom_jax.dispatch import Implementation
from venom_jax.ffn import PackedWeights
from venom_jax.ffn_parts import Weights
from venom_jax.fp8 import EightBitWeights
from venom_jax.nonlinearity import Activation
from venom_jax.pattern import WEIGHT_GEMMS, Recipe
from venom_jax.placement import Hints, Mesh, Names
from venom_jax.router import Axis
from venom_jax.stats import FFNStats


class Method(nnx.Variable):
    """State of the method that no gradient reaches: frozen scales, balance bias, neuron permutation."""


_DENSE = Recipe.dense()
_WEIGHT_INIT = nnx.initializers.lecun_normal()
_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class SparseMLP(nnx.Module):
    """y = relu(x W1)^2 W2, run by a recipe; with a gate y = (relu(x W1)^2 * (x Wu)) W2.

    The module only holds arrays. Which products are sparse is the attribute `recipe`, or an argument of the call, so
    that one model trains through dense and sparse phases; between phases `venom_jax.phases.change_recipe` changes the
    arrays as the new recipe needs.

    Attributes:
      w1: Param [D, F].   w2: Param [F, D].   up: Param [D, F], Wu, or None without a gate.
      b1, b_up: Param [F], b2: Param [D], biases of x W1, x Wu and y; None without.
      beta_up: Method [], the frozen scale of Wu, or None.
      beta: Method [4], the frozen scales of the products y1, y3, dy2, dx.
      bias: Method [max_experts], the router's balance bias.
      permutation: Method [F] int32; neuron i stood at place permutation[i] when the layer was made.
      router: Method [max_experts, D], rows of a fitted router (`venom_jax.phases`), or None without room for one.
      phase: Method [5] int32, the recipe that the arrays were made for (`venom_jax.memory_of_phase`), or None.
      recipe: what a call without a recipe runs; static, `model.set_attributes(recipe=...)` sets that of every layer.

    Example:
      >>> mlp = SparseMLP(64, 256, max_experts=4, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((2, 8, 64))
      >>> y = mlp(x)
      >>> y, stats = mlp(x, recipe=Recipe.act24(), return_stats=True)
    """

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        *,
        max_experts: int = 1,
        learned_router: bool = False,
        gated: bool = False,
        activation: Activation = "relu2",
        clamp: float = activations.CLAMP,
        use_bias: bool = False,
        dropout: float = 0.0,
        recipe: Recipe = _DENSE,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        w1_init: nnx.Initializer = _WEIGHT_INIT,
        w2_init: nnx.Initializer = _WEIGHT_INIT,
        w1_metadata: Mapping[str, Any] = _NO_METADATA,
        w2_metadata: Mapping[str, Any] = _NO_METADATA,
        mesh: Mesh | None = None,
        token_spec: P | None = None,
        weight_axes: Sequence[str] | None = None,
        remember: bool = True,
        rngs: nnx.Rngs,
    ):
        """Make the layer.

        Args:
          d_model: D.   d_ffn: F.
          max_experts: the most experts any recipe of the run will use; sizes the router's arrays.
          learned_router: make room for recipes with router = "learned".
          gated, activation, clamp, dropout: see `venom_jax.general_ffn`; dropout is of the hidden activations, in
            calls that give a `dropout_key`.
          use_bias: give the products with W1, Wu and W2 a bias.
          recipe: of calls that give none.
          dtype: compute dtype, to which x is cast; None is that of x.
          param_dtype: of the masters; keep f32.
          w1_init, w2_init: initializers of [D, F] and [F, D].
          w1_metadata, w2_metadata: of the Params, such as {"out_sharding": (None, "fsdp")}.
          mesh, token_spec, weight_axes: how the arrays lie on several devices, where neither the ambient mesh nor the
            arrays say it; see `venom_jax.placement.Hints`.
          remember: hold the recipe of the last change of phase; without, `transition` must be given it.
          rngs: a stream `params`.
        """
        if d_model < 1 or d_ffn < 1 or max_experts < 1:
            raise ValueError(f"sizes must be positive, got {d_model=}, {d_ffn=}, {max_experts=}.")
        activations.check(activation, clamp)
        self.max_experts, self.recipe, self.dtype = max_experts, recipe, dtype
        self.activation, self.clamp, self.dropout = activation, clamp, dropout
        self.hints = Hints(mesh, token_spec, None if weight_axes is None else tuple(weight_axes))
        self.w1 = nnx.Param(w1_init(rngs.params(), (d_model, d_ffn), param_dtype), **w1_metadata)
        self.w2 = nnx.Param(w2_init(rngs.params(), (d_ffn, d_model), param_dtype), **w2_metadata)
        self.up = nnx.Param(w1_init(rngs.params(), (d_model, d_ffn), param_dtype), **w1_metadata) if gated else None
        self.b1 = nnx.Param(jnp.zeros(d_ffn, param_dtype)) if use_bias else None
        self.b_up = nnx.Param(jnp.zeros(d_ffn, param_dtype)) if use_bias and gated else None
        self.b2 = nnx.Param(jnp.zeros(d_model, param_dtype)) if use_bias else None
        self.beta = Method(jnp.ones(len(WEIGHT_GEMMS), jnp.float32))
        self.beta_up = Method(jnp.ones((), jnp.float32)) if gated else None
        self.bias = Method(jnp.zeros(max_experts, jnp.float32))
        self.permutation = Method(jnp.arange(d_ffn, dtype=jnp.int32))
        self.router = Method(jnp.zeros((max_experts, d_model), jnp.float32)) if learned_router else None
        self.phase = Method(jnp.asarray(memory_of_phase.encode(_DENSE))) if remember else None

    def __call__(
        self,
        x: Float[Array, "*batch D"],
        *,
        recipe: Recipe | None = None,
        packed: PackedWeights | EightBitWeights | general_ffn.Packed | None = None,
        key: Array | None = None,
        dropout_key: Array | None = None,
        return_stats: bool = False,
        implementation: Implementation | None = None,
        axis: Axis | None = None,
        out_sharding: Any = None,
    ) -> Any:
        """Apply the layer.

        Args:
          x: [..., D]; all leading axes together are the batch whose tokens are routed and pruned.
          recipe: what is sparse in this call, forward and backward; None is the attribute's.
          packed: `venom_jax.pack_weights` of this layer, to threshold or cast the weights once for several calls.
            Of a layer with a gate `venom_jax.general_ffn.pack_weights`.
          key: for the random router.
          dropout_key: of the mask of this call; None drops nothing.
          return_stats: return (y, FFNStats) instead of y.
          implementation: "reference", "hopper", "warp", or None to choose by device; see `venom_jax.sparse_ffn`.
          axis: inside `jax.shard_map`, the mesh axis over whose devices the layer's neurons are cut; see
            `venom_jax.sharded_ffn`. Statistics are then those of this device's tokens.
          out_sharding: of y, a NamedSharding or PartitionSpec; None is x's.

        Returns:
          y of x's shape, in the compute dtype.

        Raises:
          ValueError: x or the recipe does not fit the layer (sizes, dtypes, more experts than max_experts).
          NotImplementedError: the named implementation does not run here; forward-mode derivatives of a sparse recipe.

        Warns:
          PhaseWarning: the arrays were made for another recipe, as far as that can be seen: outside of `jax.jit`.
        """
        recipe = self.recipe if recipe is None else recipe
        if self.phase is not None:
            memory_of_phase.warn_unless_made_for(self.phase[...], recipe)
        learned = None if self.router is None else self.router[...]
        x = x if self.dtype is None or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(self.dtype)
        if not self._is_plain:
            y, stats = self._general(x, recipe, packed, key, dropout_key, implementation, axis)
            y = y if out_sharding is None else jax.lax.with_sharding_constraint(y, out_sharding)
            return (y, stats) if return_stats else y
        if isinstance(packed, general_ffn.Packed):
            raise ValueError(
                "packed is general_ffn.pack_weights(...), this layer is plain: use venom_jax.pack_weights."
            )
        y, stats = layer.run(
            x,
            Layer(self.w1[...], self.w2[...], self.beta[...], self.bias[...], learned),
            recipe,
            max_experts=self.max_experts,
            packed=packed,
            key=key,
            implementation=implementation,
            axis=axis,
            hints=self.hints,
            names=_names(self.w1),
            out_sharding=out_sharding,
        )
        return (y, stats) if return_stats else y

    @property
    def _is_plain(self) -> bool:
        return self.up is None and self.b1 is None and self.activation == "relu2" and not self.dropout

    def _general(self, x, recipe, packed, key, dropout_key, implementation, axis) -> tuple[Array, FFNStats]:
        """The layer with whatever the plain one has not; several devices by `axis`, else by XLA, without kernels."""
        if not isinstance(recipe, Recipe) or recipe.experts > self.max_experts:
            raise ValueError(
                f"recipe={recipe!r} must be a Recipe with at most max_experts = {self.max_experts} experts."
            )
        tokens, w1, weights = x.reshape(-1, x.shape[-1]), self.w1[...], self._weights()
        route, load = None, jnp.zeros(self.max_experts, jnp.float32)
        recipe.check(w1.shape[0], w1.shape[1] * (1 if axis is None else jax.lax.axis_size(axis)))
        if recipe.routed:
            learned = None if self.router is None else self.router[...]
            scoring: Any = {"bias": self.bias[...], "learned": learned, "key": key, "axis": axis}
            scoring["implementation"] = "reference" if implementation == "reference" else None
            route = router.route(tokens, w1, recipe, **scoring)
            load = router.load(route, self.max_experts)
        scales = (self.beta[...], None if self.beta_up is None else self.beta_up[...])
        options: Any = {"recipe": recipe, "packed": packed, "implementation": implementation, "axis": axis}
        options |= {"activation": self.activation, "clamp": self.clamp, "key": dropout_key, "return_density": True}
        rate = 0.0 if dropout_key is None else self.dropout
        y, density = general_ffn.feed_forward(tokens, weights, route, None, *scales, dropout=rate, **options)
        if self.b2 is not None:
            y = (y.astype(jnp.float32) + self.b2[...]).astype(y.dtype)
        return y.reshape(x.shape), FFNStats(density, jax.lax.stop_gradient(load))

    def _weights(self) -> Weights:
        """The masters, of which a layer has some or all."""
        up, b1, b_up = (None if param is None else param[...] for param in (self.up, self.b1, self.b_up))
        return Weights(self.w1[...], self.w2[...], up, b1, b_up)


def _names(variable: nnx.Variable) -> Names | None:
    """The mesh axes that the variable's metadata cut it over, logical names resolved; None is nothing known."""
    if not variable.get_metadata().get("out_sharding"):
        return None
    return tuple(jax.tree.leaves(nnx.get_partition_spec(variable), is_leaf=lambda leaf: isinstance(leaf, P))[0])
