"""SparseMoE: a mixture of experts whose experts are sparse feed-forward layers. No token is ever dropped.

    s = scores(x R)     E(x) = top-k of s + bias     p = s / sum over E(x) of s     y = sum over E(x) of p expert(x)

The tokens of an expert are one group of the grouped products, of whatever size. `act24` and `all24` work inside every
expert in all of its products, forward and backward, as in the plain layer; nothing else of the method changes.

Load is balanced by a bias that takes part in the choice only (arXiv 2408.15664), moved once per optimizer step by
`updated_bias`; an auxiliary loss (arXiv 2101.03961) and the router's z-loss (arXiv 2202.08906) are returned for those
who want them. Sigmoid scores, shared experts and renormalised weights are those of arXiv 2412.19437.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.array_types import Array, Float, Int
from venom_jax import nonlinearity as activations
from venom_jax.dispatch import Implementation
from venom_jax.expert_parallel import exchanged
from venom_jax.ffn import PackedWeights
from venom_jax.ffn_parts import Weights
from venom_jax.general_ffn import Packed, feed_forward
from venom_jax.mlp import Method, SparseMLP
from venom_jax.nonlinearity import Activation
from venom_jax.pattern import WEIGHT_GEMMS, Recipe
from venom_jax.router import Axis

Scores = Literal["softmax", "sigmoid"]

_DENSE = Recipe.dense()
_WEIGHT_INIT = nnx.initializers.lecun_normal()
_TINY = 1e-12
"""Below what a sum or a share of scores is taken for this: its square is still a number of f32."""


class MoEStats(NamedTuple):
    """Statistics of one call.

    Attributes:
      density: share of the computed hidden activations of the experts that are positive, before any pruning.
      load: [E] tokens each expert got.
      dropped: share of all copies of tokens that no expert got: 0.
      entropy: of each token's scores, normalised, in nats, averaged: log E where the router has no opinion.
      balance_loss: E times the sum over experts of (share of the copies) times (mean normalised score), with a
        gradient: 1 where all is equal.
      z_loss: the mean square of each token's log of the sum of exponentials of logits, with a gradient.
    """

    density: Float[Array, ""]
    load: Float[Array, "E"]
    dropped: Float[Array, ""]
    entropy: Float[Array, ""]
    balance_loss: Float[Array, ""]
    z_loss: Float[Array, ""]


class Routing(NamedTuple):
    """The experts of each token, ascending, their weights, and statistics of the choice."""

    route: Int[Array, "T k"]
    weights: Float[Array, "T k"]
    load: Float[Array, "E"]
    entropy: Float[Array, ""]
    balance_loss: Float[Array, ""]
    z_loss: Float[Array, ""]


def choose(
    logits: Float[Array, "T E"],
    bias: Float[Array, "E"],
    top_k: int,
    *,
    scores: Scores = "softmax",
    renormalise: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Top-k of scores + bias; the weights are the scores themselves.

    Args:
      logits: f32.
      bias: of the choice alone; no gradient.
      scores: softmax over all experts, or the sigmoid of each.
      renormalise: divide the weights of a token by their sum.
      scale: a factor of all weights.

    Ties go to the lower expert. A token with NaN among its logits gets some experts, and weights of NaN.
    """
    logits = logits.astype(jnp.float32)
    experts = logits.shape[1]
    found = jax.nn.softmax(logits) if scores == "softmax" else jax.nn.sigmoid(logits)
    _, route = jax.lax.top_k(jax.lax.stop_gradient(found + bias), top_k)
    route = jnp.sort(route, axis=1).astype(jnp.int32)
    # A product with the indicator instead of a gather, whose gradient would be a scatter.
    chosen = route[:, :, None] == jnp.arange(experts)
    weights = jnp.sum(jnp.where(chosen, found[:, None], 0), axis=2)
    if renormalise:
        weights = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), _TINY)
    load = jax.lax.stop_gradient(jnp.sum(chosen, axis=(0, 1), dtype=jnp.float32))
    normalised = found / jnp.maximum(found.sum(axis=1, keepdims=True), _TINY)
    entropy = -jnp.mean(jnp.sum(normalised * jnp.log(jnp.maximum(normalised, _TINY)), axis=1))
    balance = experts * jnp.sum(load / (len(logits) * top_k) * normalised.mean(axis=0))
    z_loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) ** 2)
    return Routing(route, scale * weights, load, jax.lax.stop_gradient(entropy), balance, z_loss)


def updated_bias(bias: Float[Array, "*L E"], load: Float[Array, "*L E"], rate: float) -> Float[Array, "*L E"]:
    """b_e + rate * sign(mean load - load_e): once per optimizer step, of the load summed over devices."""
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


class SparseMoE(nnx.Module):
    """y = sum over a token's experts of p phi(x W1_e) W2_e, plus the shared experts, run by the recipe of each call.

    Attributes:
      router: Param [D, E].
      w1: Param [D, E Fe], expert after expert.   w2: Param [E Fe, D].   up: Param [D, E Fe], or None without gates.
      shared: the shared experts, which every token computes, as one `SparseMLP`; None without.
      bias: Method [E], of the choice; see `updated_bias`.
      beta: Method [4], frozen scales as in `SparseMLP`; beta_up: Method [], that of up, or None.
      permutation: Method [E Fe] int32, the neurons where they stood; `venom_jax.phases` knows a layer by it.

    Example:
      >>> moe = SparseMoE(64, 32, experts=8, experts_per_token=2, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((2, 8, 64))
      >>> y, stats = moe(x, recipe=Recipe.act24(), return_stats=True)
      >>> new_bias = updated_bias(moe.bias[...], stats.load, 1e-3)
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        *,
        experts: int,
        experts_per_token: int,
        shared_experts: int = 0,
        gated: bool = False,
        activation: Activation = "relu2",
        clamp: float = activations.CLAMP,
        scores: Scores = "softmax",
        renormalise: bool = True,
        scale: float = 1.0,
        param_dtype: Any = jnp.float32,
        w1_init: nnx.Initializer = _WEIGHT_INIT,
        w2_init: nnx.Initializer = _WEIGHT_INIT,
        router_init: nnx.Initializer = _WEIGHT_INIT,
        rngs: nnx.Rngs,
    ):
        """Make the layer.

        Args:
          d_model: D.   d_expert: Fe, the neurons of one expert.
          experts: E, at least 2.   experts_per_token: k.
          shared_experts: so many more, computed by every token with weight 1, as one layer of as many neurons.
          gated, activation, clamp: of every expert; see `venom_jax.general_ffn`.
          scores, renormalise, scale: see `choose`.
          param_dtype: of the masters; keep f32, the compute dtype is that of x.
          w1_init (also of up), w2_init, router_init: w1_init and w2_init are given the shape of one expert, and that
            of all shared ones together.
          rngs: a stream `params`.
        """
        sizes = {"d_model": d_model, "d_expert": d_expert, "experts_per_token": experts_per_token}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} = {size}: use a whole number >= 1.")
        if experts < 2 or shared_experts < 0:
            raise ValueError(f"{experts=}, {shared_experts=}: use at least 2 experts, and 0 or more shared ones.")
        if experts_per_token > experts:
            raise ValueError(f"experts_per_token = {experts_per_token} exceeds experts = {experts}; lower it.")
        if scores not in get_args(Scores):
            raise ValueError(f"scores = {scores!r}; use one of {', '.join(map(repr, get_args(Scores)))}.")
        activations.check(activation, clamp)
        self.experts, self.top_k, self.activation, self.clamp = experts, experts_per_token, activation, clamp
        self.scores, self.renormalise, self.scale = scores, renormalise, scale

        def columns(count: int) -> Array:
            made = [w1_init(rngs.params(), (d_model, d_expert), param_dtype) for _ in range(count)]
            return jnp.concatenate(made, axis=1)

        def rows(count: int) -> Array:
            made = [w2_init(rngs.params(), (d_expert, d_model), param_dtype) for _ in range(count)]
            return jnp.concatenate(made, axis=0)

        self.router = nnx.Param(router_init(rngs.params(), (d_model, experts), param_dtype))
        self.w1, self.w2 = nnx.Param(columns(experts)), nnx.Param(rows(experts))
        self.up = nnx.Param(columns(experts)) if gated else None
        made: dict[str, Any] = {"param_dtype": param_dtype, "w1_init": w1_init, "w2_init": w2_init, "rngs": rngs}
        made |= {"remember": False, "gated": gated, "activation": activation, "clamp": clamp}
        self.shared = SparseMLP(d_model, shared_experts * d_expert, **made) if shared_experts else None
        self.bias = Method(jnp.zeros(experts, jnp.float32))
        self.beta = Method(jnp.ones(len(WEIGHT_GEMMS), jnp.float32))
        self.beta_up = Method(jnp.ones((), jnp.float32)) if gated else None
        self.permutation = Method(jnp.arange(experts * d_expert, dtype=jnp.int32))

    def __call__(
        self,
        x: Float[Array, "*batch D"],
        *,
        recipe: Recipe = _DENSE,
        packed: Packed | PackedWeights | None = None,
        return_stats: bool = False,
        implementation: Implementation | None = None,
        axis: Axis | None = None,
        expert_axis: str | None = None,
    ) -> Any:
        """Apply the layer.

        Args:
          x: [..., D]; all leading axes together are the batch.
          recipe: what is sparse inside the experts: one without routing, which the experts are.
          packed: `venom_jax.general_ffn.pack_weights` of w1, w2 and up (not of the shared experts).
          return_stats: return (y, MoEStats) instead of y.
          implementation: "reference", "hopper", or None to choose by device.
          axis: inside `jax.shard_map`, the mesh axis over whose devices the neurons of w1, w2 and up are cut; the
            experts of a pass are gathered (FSDP), the shared ones' too. Statistics are of its tokens.
          expert_axis: instead, the mesh axis over whose devices whole experts are parted: tokens travel to them, and
            their outputs back, by all-to-all (`venom_jax.expert_parallel`). Shared experts are whole on each.

        Returns:
          y of x's shape and dtype.

        Raises:
          ValueError: the recipe routes by itself, or does not fit the layer; axis and expert_axis are both given.
          NotImplementedError: the named implementation does not run here, or not this recipe.
        """
        if not isinstance(recipe, Recipe) or recipe.routed:
            raise ValueError(
                f"recipe={recipe!r} must be a Recipe with experts = 1: inside experts nothing routes again."
            )
        if axis is not None and expert_axis is not None:
            raise ValueError(f"{axis=} gathers experts and {expert_axis=} sends tokens to them: give one of the two.")
        tokens = x.reshape(-1, x.shape[-1])
        logits = jnp.dot(tokens.astype(jnp.float32), self.router[...].astype(jnp.float32), precision="highest")
        options = {"scores": self.scores, "renormalise": self.renormalise, "scale": self.scale}
        routing = choose(logits, self.bias[...], self.top_k, **options)
        shape: dict[str, Any] = {"activation": self.activation, "clamp": self.clamp, "implementation": implementation}
        weights = Weights(self.w1[...], self.w2[...], None if self.up is None else self.up[...])
        scales = (self.beta[...], None if self.beta_up is None else self.beta_up[...])
        if expert_axis is None:
            own = dataclasses.replace(recipe, experts=self.experts, top_k=self.top_k)
            shape |= {"packed": packed, "axis": axis, "return_density": True}
            y, density = feed_forward(tokens, weights, routing.route, routing.weights, *scales, recipe=own, **shape)
        else:
            experts = (weights, self.experts, scales, packed)
            y, density = exchanged(
                tokens, *experts, routing.route, routing.weights, expert_axis, recipe=recipe, **shape
            )
        if self.shared is not None:
            y = y + self.shared(tokens, recipe=recipe, implementation=implementation, axis=axis)
        y = y.reshape(x.shape)
        if not return_stats:
            return y
        dropped = 1 - routing.load.sum() / (len(tokens) * self.top_k)
        stats = MoEStats(density, routing.load, dropped, routing.entropy, routing.balance_loss, routing.z_loss)
        return y, stats
