"""The decoder: token embedding, layers of attention and squared-ReLU FFN, head.

One dimension key for this file: B batch, S sequence, D d_model, F d_ffn, L layers, H heads, K key-value heads,
h head size, V vocabulary, E experts.  The layers are stacked (every parameter has a leading L) and run by
``jax.lax.scan``.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from train.config.settings import Model
from train.model.cross_entropy import head_logits
from train.model.embedding import look_up
from train.model.mesh import Shards
from train.model.rope import frequencies
from venom_jax import (
    FFNStats,
    Method,
    PackedWeights,
    Recipe,
    SparseMLP,
    SparseMoE,
    StackRecipe,
    general_ffn,
    moe,
    phases,
)
from venom_jax.dispatch import Implementation
from venom_jax.ffn import pack_weights
from venom_jax.ffn_parts import Weights
from venom_jax.fp8 import EightBitWeights, linear
from venom_jax.moe import MoEStats
from venom_jax.packed_ffn import FFN_RESIDUALS
from venom_jax.pretrained.decoder import rms_norm as rms_norm
from venom_jax.pretrained.decoder import rotate

ATTENTION_INPUTS = "attention_inputs"


def _keep_products(primitive: Any, *shapes: Any, **parameters: Any) -> Any:
    """Keeps what is dear to compute: dense products, fused attention, and the sparse FFN's packed activations.

    Of the projections it keeps what attention reads of them, rotated: the same size, and ready for the backward.
    """
    policies = jax.checkpoint_policies
    keep = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(FFN_RESIDUALS, ATTENTION_INPUTS)
    )
    # cuDNN's attention is a primitive of its own that no policy of jax knows.
    return "dot_product_attention_fwd" in primitive.name or keep(primitive, *shapes, **parameters)


REMAT_POLICIES = {
    "dots": _keep_products,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Documents(NamedTuple):
    """Where each token stands in its document, and which keys belong to a query's document."""

    position: Int[Array, "B S"]
    mask: Bool[Array, "B 1 S S"]


def find_documents(tokens: Int[Array, "B S"], start: int) -> Documents:
    """Documents begin at each token ``start``; what stands before the first one in a row is a document of its own."""
    begins = tokens == start
    number, place = jnp.cumsum(begins, axis=1), jnp.arange(tokens.shape[1])
    position = place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    return Documents(position, number[:, None, :, None] == number[:, None, None, :])


def rotary(
    x: Float[Array, "B S H h"],
    frequency: Float[Array, " h_2"],
    position: Int[Array, "B S"] | Int[Array, ""] | int = 0,
    factor: float = 1.0,
) -> Float[Array, "B S H h"]:
    """Rotary position embedding: features (i, i + h/2) at position s turn by the angle s * frequency_i.

    frequency, factor: from ``rope.frequencies``.
    position: of each token, or of the first one in each row.
    """
    place = position if jnp.ndim(position) else position + jnp.arange(x.shape[1])
    turned = rotate(x.astype(jnp.float32) if factor != 1 else x, frequency, jnp.atleast_2d(jnp.asarray(place)))
    return turned if factor == 1 else (factor * turned).astype(x.dtype)


def attention_implementation(dtype: Any) -> Literal["cudnn"] | None:
    """cuDNN's fused attention on GPUs, which it offers for 16-bit types; XLA's elsewhere."""
    return "cudnn" if jax.default_backend() == "gpu" and dtype in (jnp.bfloat16, jnp.float16) else None


class Attention(nnx.Module):
    """Causal attention with rotary positions; K key-value heads serve H query heads, H / K each."""

    def __init__(self, config: Model, *, rngs: nnx.Rngs):
        self.config = config
        width = (config.heads + 2 * config.key_value_heads) * config.head_dim
        normal = nnx.initializers.normal(config.init_std)
        residual = nnx.initializers.normal(config.init_std / math.sqrt(2 * config.layers))
        self.qkv = nnx.Param(normal(rngs.params(), (config.d_model, width), jnp.float32))
        self.out = nnx.Param(residual(rngs.params(), (config.d_model, config.d_model), jnp.float32))
        if config.qk_norm:
            self.query_scale = nnx.Param(jnp.ones(config.head_dim, jnp.float32))
            self.key_scale = nnx.Param(jnp.ones(config.head_dim, jnp.float32))

    def project(
        self,
        x: Float[Array, "B S D"],
        position: Int[Array, "B S"] | Int[Array, ""] | int = 0,
        multiply: "Multiply | None" = None,
    ) -> tuple[Float[Array, "B S H h"], Float[Array, "B S K h"], Float[Array, "B S K h"]]:
        """Queries, keys and values; the first two rotated, x standing at ``position`` as in ``rotary``.

        multiply: a layer's way to multiply by its weights, by default in x's dtype.
        """
        config = self.config
        heads, kv_heads = config.heads, config.key_value_heads
        with jax.named_scope("projections"):
            qkv = (multiply or Multiply())(x, self.qkv[...], "qkv")
        qkv_BxSxNxh = qkv.reshape(*x.shape[:2], heads + 2 * kv_heads, config.head_dim)
        query, key, value = jnp.split(qkv_BxSxNxh, (heads, heads + kv_heads), axis=2)
        if config.qk_norm:
            query = rms_norm(query, self.query_scale[...], config.norm_epsilon)
            key = rms_norm(key, self.key_scale[...], config.norm_epsilon)
        frequency, factor = frequencies(config)
        query, key = (rotary(part, frequency, position, factor) for part in (query, key))
        return checkpoint_name((query, key, value), ATTENTION_INPUTS)

    def mix(
        self,
        query: Float[Array, "B S H h"],
        key: Float[Array, "B S K h"],
        value: Float[Array, "B S K h"],
        mask: Bool[Array, "B 1 S S"] | None = None,
        deterministic: bool = False,
    ) -> Float[Array, "B S H h"]:
        """Causal attention over a whole sequence, where ``mask`` allows it.

        cuDNN stays in use with a mask, which it reads as a bias of B S^2 elements, and whose gradient it leaves out.

        deterministic: XLA's attention, computed again in the backward, which keeps its B H S^2 probabilities for one
          layer at a time.  JAX has no option for the backward of cuDNN that adds in a fixed order.
        """
        if deterministic:
            attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
            return jax.checkpoint(attend)(query, key, value, mask=mask)
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=True, implementation=attention_implementation(query.dtype)
        )

    def merge(self, mixed: Float[Array, "B S H h"], multiply: "Multiply | None" = None) -> Float[Array, "B S D"]:
        """The output projection of what the heads read."""
        with jax.named_scope("projections"):
            return (multiply or Multiply())(mixed.reshape(*mixed.shape[:2], -1), self.out[...], "out")

    def __call__(
        self,
        x: Float[Array, "B S D"],
        documents: Documents | None = None,
        multiply: "Multiply | None" = None,
        deterministic: bool = False,
    ) -> Float[Array, "B S D"]:
        position, mask = (0, None) if documents is None else documents
        return self.merge(self.mix(*self.project(x, position, multiply), mask, deterministic), multiply)


class Multiply(NamedTuple):
    """How a layer multiplies by the weights of its projections: where they lie, and in which precision."""

    shards: Shards | None = None
    in_fp8: bool = False
    implementation: Implementation | None = None
    """Of products in eight bits."""

    def __call__(self, x: Float[Array, "*B I"], weight: Array, name: str) -> Float[Array, "*B O"]:
        """x times the weight of that name."""
        if self.shards is not None:
            if self.in_fp8:
                return self.shards.times_in_fp8(x, weight, self.implementation)
            return self.shards.times(x, weight, name)
        return linear(x, weight, implementation=self.implementation) if self.in_fp8 else x @ weight.astype(x.dtype)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + FFN(norm(x))."""

    def __init__(self, config: Model, max_experts: int, learned_router: bool, *, rngs: nnx.Rngs):
        self.config = config
        self.attention_scale = nnx.Param(jnp.ones(config.d_model, jnp.float32))
        self.attention = Attention(config, rngs=rngs)
        self.ffn_scale = nnx.Param(jnp.ones(config.d_model, jnp.float32))
        self.ffn = _ffn(config, max_experts, learned_router, rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        recipe: Recipe,
        key: PRNGKeyArray | None,
        packed: PackedWeights | EightBitWeights | None,
        implementation: Implementation | None,
        documents: Documents | None = None,
        shards: Shards | None = None,
        deterministic: bool = False,
    ) -> tuple[Float[Array, "B S D"], tuple[FFNStats, Float[Array, "B S D"]]]:
        """The block's output, and what its FFN reports and reads."""
        epsilon = self.config.norm_epsilon
        attention_input = rms_norm(x, self.attention_scale[...], epsilon)
        with jax.named_scope("attention"):
            multiply = Multiply(shards, recipe.in_fp8, implementation)
            mixed = self.attention(attention_input, documents, multiply, deterministic)
        x = x + mixed
        ffn_input = rms_norm(x, self.ffn_scale[...], epsilon)
        with jax.named_scope("ffn"):
            options: dict[str, Any] = {"packed": packed} | ({} if self.config.experts else {"key": key})
            y, stats = self.ffn(
                ffn_input,
                recipe=recipe,
                return_stats=True,
                implementation=implementation,
                axis=None if shards is None else shards.axis,
                **options,
            )
        return x + y, (stats, ffn_input)


def _ffn(config: Model, max_experts: int, learned_router: bool, rngs: nnx.Rngs) -> SparseMLP | SparseMoE:
    """The FFN of a block: one layer, or a mixture of experts."""
    options: dict[str, Any] = {
        "gated": config.gated,
        "activation": config.activation,
        "clamp": config.clamp,
        "w1_init": nnx.initializers.normal(config.ffn_init_std),
        "w2_init": nnx.initializers.normal(config.init_std / math.sqrt(2 * config.layers)),
        "rngs": rngs,
    }
    if not config.experts:
        # The training state knows its phase.
        routing = {"max_experts": max_experts, "learned_router": learned_router, "remember": False}
        return SparseMLP(config.d_model, config.d_ffn, **routing, **options)
    return SparseMoE(
        config.d_model,
        config.expert_neurons,
        experts=config.experts,
        experts_per_token=config.experts_per_token,
        shared_experts=config.shared_experts,
        scores=config.expert_scores,
        router_init=nnx.initializers.normal(config.init_std),
        **options,
    )


class Decoder(nnx.Module):
    """tokens -> logits."""

    def __init__(self, config: Model, *, max_experts: int = 1, learned_router: bool = False, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(config.init_std)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, max_experts, learned_router, rngs=rngs)

        self.embedding = nnx.Param(normal(rngs.params(), (config.vocab_size, config.d_model), jnp.float32))
        self.blocks = stack(rngs)
        self.final_scale = nnx.Param(jnp.ones(config.d_model, jnp.float32))
        if not config.tied_head:
            self.head = nnx.Param(normal(rngs.params(), (config.d_model, config.vocab_size), jnp.float32))

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        *,
        recipe: StackRecipe,
        dtype: Any = jnp.float32,
        key: PRNGKeyArray | None = None,
        packed: PackedWeights | EightBitWeights | None = None,
        implementation: Implementation | None = None,
        remat: str = "none",
        unroll: int = 1,
        keep_ffn_inputs: bool = False,
        shards: Shards | None = None,
        deterministic: bool = False,
    ) -> tuple[Float[Array, "B S D"], FFNStats, Float[Array, "L B S D"] | None]:
        """Last hidden states after the final norm, statistics with a leading L, and the FFNs' inputs if kept.

        packed: the FFNs' weights as ``pack_ffns`` made them, with a leading L; None packs them in every call.
        unroll: layers that one turn of the loop runs.
        shards: inside ``jax.shard_map``, where tokens are a device's rows and parameters its parts.
        deterministic: gradients of attention and of the embedding are summed in a fixed order, on a GPU too.
        """
        graphdef, stacked = nnx.split(self.blocks)
        keys = None if key is None else jax.random.split(key, self.config.layers)
        start = self.config.document_start
        documents = None if start is None else find_documents(tokens, start)

        def layer(recipe, x, scanned):
            state, layer_key, layer_packed = scanned
            block = nnx.merge(graphdef, state if shards is None else shards.of_layer(state))
            x, (stats, ffn_input) = block(
                x, recipe, layer_key, layer_packed, implementation, documents, shards, deterministic
            )
            return x, (stats, ffn_input if keep_ffn_inputs else None)

        embed = look_up if shards is None else shards.embed
        x = embed(self.embedding[...], tokens, dtype, deterministic)
        found = []
        for first, end, part in recipe.parts(self.config.layers):
            run = partial(layer, part)
            if remat != "none":
                # A loop already keeps XLA from undoing the recomputation.
                run = jax.checkpoint(run, policy=REMAT_POLICIES[remat], prevent_cse=unroll > 1)
            x, reported = jax.lax.scan(run, x, take_layers((stacked, keys, packed), first, end), unroll=unroll)
            found.append(reported)
        stats, ffn_inputs = join_layers(found)
        return rms_norm(x, self.final_scale[...], self.config.norm_epsilon), stats, ffn_inputs

    def head_weight(self) -> Float[Array, "D V"]:
        """The head's master: the embedding's transpose where the two are tied."""
        return self.embedding[...].T if self.config.tied_head else self.head[...]

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """float32 logits of hidden states."""
        return head_logits(hidden, self.head_weight())

    def __call__(
        self, tokens: Int[Array, "B S"], *, recipe: StackRecipe, **options: Any
    ) -> tuple[Float[Array, "B S V"], FFNStats]:
        """Logits and the statistics of every layer; options as in ``hidden``."""
        hidden, stats, _ = self.hidden(tokens, recipe=recipe, **options)
        return self.logits(hidden), stats


def take_layers(tree: Any, first: int, end: int) -> Any:
    """The layers [first, end) of stacked arrays."""
    return jax.tree.map(lambda leaf: leaf if (first, end) == (0, leaf.shape[0]) else leaf[first:end], tree)


def join_layers(parts: Sequence[Any]) -> Any:
    """Parts of stacked arrays as one stack."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def initial(config: Model, max_experts: int, key: PRNGKeyArray, *, learned_router: bool = False) -> tuple[dict, dict]:
    """Parameters and the method's state, as nested dicts of arrays."""
    decoder = Decoder(config, max_experts=max_experts, learned_router=learned_router, rngs=nnx.Rngs(params=key))
    _, params, method, _ = nnx.split(decoder, nnx.Param, Method, ...)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(method)


def structure(config: Model, max_experts: int, *, learned_router: bool = False) -> nnx.GraphDef:
    """The model without its arrays."""
    options: dict[str, Any] = {"max_experts": max_experts, "learned_router": learned_router}
    abstract = nnx.eval_shape(lambda: Decoder(config, **options, rngs=nnx.Rngs(params=0)))
    return nnx.split(abstract, nnx.Param, Method, ...)[0]


def assemble(graphdef: nnx.GraphDef, params: dict, method: dict) -> Decoder:
    """The module again, for use inside a traced function."""
    return nnx.merge(graphdef, nnx.State(params), nnx.State(method))


def pack_ffns(
    params: dict, method: dict, recipe: StackRecipe, dtype: Any
) -> PackedWeights | EightBitWeights | general_ffn.Packed | None:
    """The weights of every FFN thresholded and packed, in eight bits also dense ones cast, with a leading L.

    For several calls with the same weights: the microbatches of an optimizer step.  No gradient passes through.  None
    where ``recipe`` reads no packed weight, or weights under transposable masks, which are not packed, and where some
    layers are in eight bits and others are not, or read other weights 2:4: each call then packs its own.
    """
    ffn, state = params["blocks"]["ffn"], method["blocks"]["ffn"]
    parts = [part for _, _, part in recipe.parts(ffn["w1"].shape[0])]
    in_fp8 = any(part.in_fp8 for part in parts)
    if not (in_fp8 or {"y1", "dy2"} & set(recipe.weights)):
        return None
    if any(part.weight_mask != "threshold" for part in parts):
        return None
    if in_fp8 and len({(part.in_fp8, part.weights) for part in parts}) > 1:
        return None
    if "up" in ffn:
        arrays = (Weights(ffn["w1"], ffn["w2"], ffn["up"]), state["beta"], state["beta_up"])
        with jax.named_scope("ffn"):
            return jax.lax.map(lambda layer: general_ffn.pack_weights(*layer, dtype=dtype), arrays)
    options: dict[str, Any] = {"recipe": parts[0]} if in_fp8 else {"dtype": dtype}
    with jax.named_scope("ffn"):
        return jax.lax.map(lambda layer: pack_weights(*layer, **options), (ffn["w1"], ffn["w2"], state["beta"]))


def auxiliary_loss(config: Model, stats: FFNStats | MoEStats) -> Float[Array, ""] | float:
    """What the experts' routers add to the training loss; 0 without experts."""
    if not isinstance(stats, MoEStats):
        return 0.0
    return config.expert_balance_loss * stats.balance_loss.sum() + config.expert_z_loss * stats.z_loss.sum()


def balance(config: Model, method: dict, load: Float[Array, "L E"], recipe: StackRecipe) -> dict:
    """The method's state after one step of the balancing bias, of a recipe's routing or of the experts'."""
    if not config.experts:
        return phases.update_bias(method, load, recipe)
    ffn = method["blocks"]["ffn"]
    ffn = ffn | {"bias": moe.updated_bias(ffn["bias"], load, config.expert_balance_rate)}
    return method | {"blocks": method["blocks"] | {"ffn": ffn}}


def parameter_count(config: Model) -> int:
    """All parameters: V D (twice unless the head is tied) + L (D (H + 2K) h + D^2 + 2 D F + 2 D (+ 2 h)) + D.

    2 D F is 3 D F with a gate; with experts F is the neurons of all, and the router adds D E.
    """
    return _parameters(config, config.neurons)


def active_parameter_count(config: Model) -> int:
    """As ``parameter_count``, of experts those that a token computes."""
    return _parameters(config, config.active_neurons)


def _parameters(config: Model, neurons: int) -> int:
    width = (config.heads + 2 * config.key_value_heads) * config.head_dim
    layer = config.d_model * (width + config.d_model + config.ffn_matrices * neurons + config.experts + 2)
    if config.qk_norm:
        layer += 2 * config.head_dim
    embeddings = config.vocab_size * config.d_model * (1 if config.tied_head else 2)
    return embeddings + config.layers * layer + config.d_model


def component_flops(config: Model, seq_len: int) -> dict[str, float]:
    """Floating-point operations of one token's dense forward and backward pass, a multiply-add counted as 2.

    head: 6 D V; projections: 6 L (D (H + 2K) h + D^2); attention, causal, so that each query meets S / 2 keys on
    average: 6 L D S; ffn: 6 products of 2 L D F, 9 with a gate, F the neurons that a token computes, and the router of
    experts 6 L D E.  Recomputation is not counted.
    """
    width = (config.heads + 2 * config.key_value_heads) * config.head_dim
    layers, d_model = config.layers, config.d_model
    return {
        "head": 6.0 * d_model * config.vocab_size,
        "projections": 6.0 * layers * d_model * (width + d_model),
        "attention": 6.0 * layers * d_model * seq_len,
        "ffn": 6.0 * layers * d_model * (config.ffn_matrices * config.active_neurons + config.experts),
    }


def flops_per_token(config: Model, seq_len: int, recipe: StackRecipe) -> float:
    """Those of ``component_flops`` together, the FFN's scaled by what ``recipe`` skips.

    k / E of the neurons where routed, one half where an operand is 2:4.  ``Recipe.dense()`` gives the dense-equivalent
    count.
    """
    parts = component_flops(config, seq_len)
    twice = ("y1", "dx", "dw1") if config.gated else ()  # with W1 and with Wu

    def executed(part: Recipe) -> float:
        return sum(share * (2 if name in twice else 1) for name, share in _executed_products(part).items())

    products = sum((end - first) * executed(part) for first, end, part in recipe.parts(config.layers))
    share = products / (3 * config.ffn_matrices * config.layers)
    router = 6.0 * config.layers * config.d_model * config.experts
    return sum(parts.values()) - (1 - share) * (parts["ffn"] - router)


def compute_flops_per_token(config: Model, seq_len: int, recipe: StackRecipe, *, fp8_head: bool = False) -> float:
    """``flops_per_token`` in units of the time of 16-bit ones: an operation on eight bits takes half of that.

    In layers of eight bits those are the FFN's and the projections'; attention's are not.
    """
    parts, whole = component_flops(config, seq_len), flops_per_token(config, seq_len, recipe)
    halved = 0.0
    for first, end, part in recipe.parts(config.layers):
        if part.in_fp8:
            executed = sum(_executed_products(part).values()) / 6
            halved += (end - first) / config.layers * (parts["projections"] + parts["ffn"] * executed)
    return whole - (halved + (parts["head"] if fp8_head and halved else 0.0)) / 2


def _executed_products(recipe: Recipe) -> dict[str, float]:
    """Share of each FFN product's dense work that ``recipe`` executes."""
    routed = recipe.top_k / recipe.experts
    first = 1.0 if recipe.hidden == "full" else routed

    def halved(condition: bool) -> float:
        return 0.5 if condition else 1.0

    gradient = {"dense": 1.0, "24": 0.5, "split95": 0.525, "mvue": 0.5}[recipe.wgrad]
    return {
        "y1": first * halved("y1" in recipe.weights),
        "y3": routed * halved("y3" in recipe.weights or recipe.activations),
        "dy2": first * halved("dy2" in recipe.weights),
        "dx": routed * halved("dx" in recipe.weights or recipe.activations),
        "dw1": routed * gradient,
        "dw2": routed * gradient,
    }
