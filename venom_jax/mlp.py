"""SparseMLP: the squared-ReLU feed-forward layer as a flax.nnx module."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.array_types import Array, Float
from venom_jax import activation as activations
from venom_jax import general_ffn, router
from venom_jax.activation import Activation
from venom_jax.dispatch import Implementation
from venom_jax.ffn import PackedWeights, sparse_ffn
from venom_jax.ffn_parts import Weights
from venom_jax.pattern import WEIGHT_GEMMS, Recipe
from venom_jax.sharded_ffn import sharded_sparse_ffn
from venom_jax.stats import FFNStats


class Method(nnx.Variable):
    """State of the method that no gradient reaches: frozen scales, balance bias, neuron permutation."""


_DENSE = Recipe.dense()
_WEIGHT_INIT = nnx.initializers.lecun_normal()


class SparseMLP(nnx.Module):
    """y = relu(x W1)^2 W2, run by the recipe given at each call; with a gate y = (relu(x W1)^2 * (x Wu)) W2.

    The module only holds arrays. Which products are sparse is an argument, so that one model trains through dense and
    sparse phases; between phases `venom_jax.phases.transition` changes the arrays as the new recipe needs.

    Attributes:
      w1: Param [D, F].   w2: Param [F, D].   up: Param [D, F], Wu, or None without a gate.
      b1, b_up: Param [F], b2: Param [D], biases of x W1, x Wu and y; None without.
      beta_up: Method [], the frozen scale of Wu, or None.
      beta: Method [4], the frozen scales of the products y1, y3, dy2, dx.
      bias: Method [max_experts], the router's balance bias.
      permutation: Method [F] int32; neuron i stood at place permutation[i] when the layer was made.
      router: Method [max_experts, D], rows of a fitted router (`venom_jax.phases`), or None without room for one.

    Example:
      >>> mlp = SparseMLP(64, 256, max_experts=4, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((2, 8, 64))
      >>> y = mlp(x)
      >>> y, stats = mlp(x, recipe=Recipe.venom(experts=4, top_k=1), return_stats=True)
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
        param_dtype: Any = jnp.float32,
        w1_init: nnx.Initializer = _WEIGHT_INIT,
        w2_init: nnx.Initializer = _WEIGHT_INIT,
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
          param_dtype: of the masters; keep f32, the compute dtype is that of x.
          w1_init, w2_init: initializers of [D, F] and [F, D].
          rngs: a stream `params`.
        """
        if d_model < 1 or d_ffn < 1 or max_experts < 1:
            raise ValueError(f"sizes must be positive, got {d_model=}, {d_ffn=}, {max_experts=}.")
        activations.check(activation, clamp)
        self.max_experts, self.activation, self.clamp, self.dropout = max_experts, activation, clamp, dropout
        self.w1 = nnx.Param(w1_init(rngs.params(), (d_model, d_ffn), param_dtype))
        self.w2 = nnx.Param(w2_init(rngs.params(), (d_ffn, d_model), param_dtype))
        self.up = nnx.Param(w1_init(rngs.params(), (d_model, d_ffn), param_dtype)) if gated else None
        self.beta_up = Method(jnp.ones((), jnp.float32)) if gated else None

        def zeros(size: int, wanted: bool = True) -> nnx.Param | None:
            return nnx.Param(jnp.zeros(size, param_dtype)) if use_bias and wanted else None

        self.b1, self.b_up, self.b2 = zeros(d_ffn), zeros(d_ffn, gated), zeros(d_model)
        self.beta = Method(jnp.ones(len(WEIGHT_GEMMS), jnp.float32))
        self.bias = Method(jnp.zeros(max_experts, jnp.float32))
        self.permutation = Method(jnp.arange(d_ffn, dtype=jnp.int32))
        self.router = Method(jnp.zeros((max_experts, d_model), jnp.float32)) if learned_router else None

    def __call__(
        self,
        x: Float[Array, "*batch D"],
        *,
        recipe: Recipe = _DENSE,
        packed: PackedWeights | general_ffn.Packed | None = None,
        key: Array | None = None,
        dropout_key: Array | None = None,
        return_stats: bool = False,
        implementation: Implementation | None = None,
        axis: str | None = None,
    ) -> Any:
        """Apply the layer.

        Args:
          x: [..., D]; all leading axes together are the batch whose tokens are routed and pruned.
          recipe: what is sparse in this call, forward and backward.
          packed: `venom_jax.pack_weights` of this layer, to threshold the weights once for several calls; of a layer
            with a gate `venom_jax.general_ffn.pack_weights`.
          key: for the random router.
          dropout_key: of the mask of this call; None drops nothing.
          return_stats: return (y, FFNStats) instead of y.
          implementation: "reference", "hopper", or None to choose by device; see `venom_jax.sparse_ffn`.
          axis: inside `jax.shard_map`, the mesh axis over whose devices the layer's neurons are cut; see
            `venom_jax.sharded_ffn`. Statistics are then those of this device's tokens.

        Returns:
          y of x's shape and dtype.

        Raises:
          ValueError: the recipe does not fit the layer (sizes, or more experts than max_experts).
          NotImplementedError: the named implementation does not run here.
        """
        if not isinstance(recipe, Recipe):
            raise ValueError(f"recipe={recipe!r} must be a Recipe, such as Recipe.venom(experts=4, top_k=1)")
        if recipe.experts > self.max_experts:
            raise ValueError(
                f"recipe with experts = {recipe.experts} in a layer made with max_experts = {self.max_experts}; "
                "raise max_experts."
            )
        w1 = self.w1[...]
        recipe.check(w1.shape[0], w1.shape[1] * (1 if axis is None else jax.lax.axis_size(axis)))
        tokens = x.reshape(-1, x.shape[-1])
        route, load = None, jnp.zeros(self.max_experts, jnp.float32)
        if recipe.routed:
            learned = None if self.router is None else self.router[...]
            options: dict[str, Any] = {"bias": self.bias[...], "learned": learned, "key": key, "axis": axis}
            # "hopper" is about products; a router that has no kernel runs beside them.
            scoring = "reference" if implementation == "reference" else None
            route = router.route(tokens, w1, recipe, implementation=scoring, **options)
            load = router.load(route, self.max_experts)
        options = {"recipe": recipe, "packed": packed, "implementation": implementation, "return_density": True}
        if self._is_plain:
            apply = sparse_ffn if axis is None else functools.partial(sharded_sparse_ffn, axis=axis)
            y, density = apply(tokens, w1, self.w2[...], route, self.beta[...], **options)
        else:
            options |= {"activation": self.activation, "clamp": self.clamp, "axis": axis, "key": dropout_key}
            scales = (self.beta[...], None if self.beta_up is None else self.beta_up[...])
            rate = 0.0 if dropout_key is None else self.dropout
            y, density = general_ffn.feed_forward(
                tokens, self._weights(), route, None, *scales, dropout=rate, **options
            )
            if self.b2 is not None:
                y = (y.astype(jnp.float32) + self.b2[...]).astype(y.dtype)
        y = y.reshape(x.shape)
        return (y, FFNStats(density, jax.lax.stop_gradient(load))) if return_stats else y

    @property
    def _is_plain(self) -> bool:
        return self.up is None and self.b1 is None and self.activation == "relu2" and not self.dropout

    def _weights(self) -> Weights:
        """The masters, of which a layer has some or all."""
        up, b1, b_up = (None if param is None else param[...] for param in (self.up, self.b1, self.b_up))
        return Weights(self.w1[...], self.w2[...], up, b1, b_up)
