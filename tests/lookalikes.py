"""Small models in the manner of three codebases, with the layer in them, and one training loop each.

| model   | manner                                                                                          |
|---------|-------------------------------------------------------------------------------------------------|
| nanodo  | linen, blocks in a list, `nn.with_partitioning` over one axis, TrainState, state donated        |
| gemma   | nnx, blocks in a list, Params with shardings in their metadata, `nnx.Optimizer`, changed in place |
| maxtext | linen, `nn.scan` with the layers on axis 1, `nn.remat`, logical axis names                      |

Each is run with a mesh, or without on one device, and gives its losses and where its leaves lie at every change.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import venom_jax
from venom_jax import Method, Recipe, SparseMLP, phases

DENSE = Recipe.dense()


@dataclasses.dataclass(frozen=True)
class Sizes:
    d_model: int = 32
    d_ffn: int = 512
    layers: int = 2
    vocabulary: int = 64
    rows: int = 16
    length: int = 8
    dtype: Any = jnp.float32


@dataclasses.dataclass
class Run:
    """losses of all steps; places: sharding of every leaf before and after each change; texts: of compiled steps."""

    losses: list[float] = dataclasses.field(default_factory=list)
    places: list[tuple[list, list]] = dataclasses.field(default_factory=list)
    donated: list[bool] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)


def tokens_of(sizes: Sizes, step: int) -> np.ndarray:
    """A batch of sequences that count upwards by a step of their own, so that there is something to learn."""
    rng = np.random.default_rng(step)
    start, stride = rng.integers(0, 64, (2, sizes.rows, 1))
    return ((start + (stride % 3 + 1) * np.arange(sizes.length + 1)) % sizes.vocabulary).astype(np.int32)


def places(tree: Any) -> list:
    return [leaf.sharding for leaf in jax.tree.leaves(tree) if leaf.ndim]


def mix(x: jax.Array) -> jax.Array:
    """In attention's place: the mean over the tokens so far."""
    return jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]


def loss_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


# --- nanodo


class NanodoBlock(nn.Module):
    sizes: Sizes
    init: Any

    @nn.compact
    def __call__(self, x, recipe):
        x = x + mix(nn.LayerNorm(dtype=self.sizes.dtype, use_bias=False)(x))
        z = nn.LayerNorm(dtype=self.sizes.dtype, use_bias=False)(x)
        mlp = venom_jax.linen.SparseMLP(self.sizes.d_ffn, max_experts=4, w1_init=self.init, w2_init=self.init)
        return x + mlp(z, recipe=recipe)


class Nanodo(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, tokens, recipe=DENSE):
        init = nn.with_partitioning(nn.initializers.xavier_uniform(), ("data", None))
        embed = nn.Embed(self.sizes.vocabulary, self.sizes.d_model, embedding_init=init, dtype=self.sizes.dtype)
        x = embed(tokens)
        for _ in range(self.sizes.layers):
            x = NanodoBlock(self.sizes, init)(x, recipe)
        return embed.attend(nn.LayerNorm(dtype=self.sizes.dtype, use_bias=False)(x))


class State(train_state.TrainState):
    method: Any


def run_linen(
    model: nn.Module, sizes: Sizes, mesh: Any, rows: P, recipes: Sequence[Recipe], steps: int, *, keep_text=False,
    **axes: Any,
) -> Run:  # fmt: skip
    """A linen model with boxes: shardings from them, state donated, a transition of the TrainState's trees."""

    def create(key):
        variables = model.init(key, jnp.zeros((1, sizes.length), jnp.int32))
        return State.create(
            apply_fn=model.apply, params=variables["params"], method=variables["Method"], tx=optax.adamw(1e-2)
        )

    key, out, options = jax.random.key(0), Run(), {}
    if mesh is not None:
        specs = nn.get_partition_spec(jax.eval_shape(create, key))
        shardings = nn.logical_to_mesh_sharding(specs, mesh, [*RULES, ("data", "data")])
        options = {"out_shardings": shardings}
    state = jax.jit(create, **options)(key)

    @functools.partial(jax.jit, static_argnames="recipe", donate_argnums=0)
    def train_step(state, tokens, recipe):
        def loss(params):
            variables = {"params": params, "Method": state.method}
            return loss_of(model.apply(variables, tokens[:, :-1], recipe), tokens)  # pyrefly: ignore

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    old = DENSE
    for recipe in recipes:
        before = places(state)
        changed = phases.transition(state.params, state.method, [state.opt_state], old, recipe, seed=0, **axes)
        state = state.replace(params=changed.params, method=changed.method, opt_state=changed.trees[0])
        out.places.append((before, places(state)))
        old = recipe
        for _ in range(steps):
            tokens = tokens_of(sizes, len(out.losses))
            tokens = tokens if mesh is None else jax.device_put(tokens, NamedSharding(mesh, rows))
            if keep_text and len(out.texts) < len(out.places):
                out.texts.append(train_step.lower(state, tokens, recipe).compile().as_text() or "")
            leaf = jax.tree.leaves(state.params)[0]
            state, value = train_step(state, tokens, recipe)
            out.losses.append(float(value))
            out.donated.append(leaf.is_deleted())
    return out


def run_nanodo(mesh: Any, recipes: Sequence[Recipe], steps: int, sizes: Sizes = Sizes(), **options) -> Run:
    return run_linen(Nanodo(sizes), sizes, mesh, P("data"), recipes, steps, **options)


# --- MaxText

RULES = (("batch", ("data", "fsdp")), ("embed", "fsdp"), ("mlp", "tensor"), ("vocab", "tensor"))


class MaxTextLayer(nn.Module):
    sizes: Sizes
    recipe: Recipe

    @nn.compact
    def __call__(self, x, _):
        x = nn.with_logical_constraint(x, ("batch", None, None))
        x = x + mix(nn.RMSNorm(dtype=self.sizes.dtype)(x))
        kernel = nn.initializers.xavier_uniform()
        mlp = venom_jax.linen.SparseMLP(
            self.sizes.d_ffn,
            max_experts=4,
            recipe=self.recipe,
            w1_init=nn.with_logical_partitioning(kernel, ("embed", "mlp")),
            w2_init=nn.with_logical_partitioning(kernel, ("mlp", "embed")),
        )
        return x + mlp(nn.RMSNorm(dtype=self.sizes.dtype)(x)), None


class MaxText(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, tokens, recipe=DENSE):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.5), ("vocab", "embed"))
        embed = nn.Embed(self.sizes.vocabulary, self.sizes.d_model, embedding_init=init, dtype=self.sizes.dtype)
        stack = nn.scan(
            nn.remat(MaxTextLayer, prevent_cse=False),
            variable_axes={"params": 1, "Method": 0},
            split_rngs={"params": True},
            length=self.sizes.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = stack(self.sizes, recipe, name="layers")(embed(tokens), None)
        return embed.attend(nn.RMSNorm(dtype=self.sizes.dtype)(x))


def run_maxtext(mesh: Any, recipes: Sequence[Recipe], steps: int, sizes: Sizes = Sizes(), **options) -> Run:
    with nn.logical_axis_rules(RULES) if mesh is not None else contextlib.nullcontext():
        rows = P(("data", "fsdp"))
        return run_linen(MaxText(sizes), sizes, mesh, rows, recipes, steps, layer_axis=1, **options)


# --- Gemma


class GemmaBlock(nnx.Module):
    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(sizes.d_model, dtype=sizes.dtype, rngs=rngs) for _ in range(2)])
        cut: Any = {
            f"{name}_metadata": {"out_sharding": names, "eager_sharding": False}
            for name, names in (("w1", (None, "fsdp")), ("w2", ("fsdp", None)))
        }
        self.mlp = SparseMLP(sizes.d_model, sizes.d_ffn, max_experts=4, dtype=sizes.dtype, rngs=rngs, **cut)

    def __call__(self, x):
        x = x + mix(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Gemma(nnx.Module):
    """The recipe is the layers' attribute; nothing of the model passes it on."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.5)
        self.embedding = nnx.Param(
            init(rngs.params(), (sizes.vocabulary, sizes.d_model)), out_sharding=(None, "fsdp"), eager_sharding=False
        )
        self.blocks = nnx.List([GemmaBlock(sizes, rngs) for _ in range(sizes.layers)])
        self.norm = nnx.RMSNorm(sizes.d_model, dtype=sizes.dtype, rngs=rngs)
        self.dtype = sizes.dtype

    def __call__(self, tokens):
        table = self.embedding[...].astype(self.dtype)
        x = table[tokens]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ table.T


def run_gemma(
    mesh: Any, recipes: Sequence[Recipe], steps: int, sizes: Sizes = Sizes(), *, keep_text: bool = False
) -> Run:
    out = Run()
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():

        @nnx.jit
        def create():
            model = Gemma(sizes, nnx.Rngs(0))
            if mesh is not None:
                state = nnx.state(model)
                nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
            return model, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

        @functools.partial(nnx.jit, donate_argnums=(0, 1))
        def train_step(model, optimizer, tokens):
            value, gradient = nnx.value_and_grad(lambda model: loss_of(model(tokens[:, :-1]), tokens))(model)
            optimizer.update(model, gradient)
            return value

        model, optimizer = create()
        for recipe in recipes:
            before = places(nnx.state((model, optimizer)))
            phases.change_recipe(model, optimizer, recipe)
            out.places.append((before, places(nnx.state((model, optimizer)))))
            for _ in range(steps):
                tokens = jnp.asarray(tokens_of(sizes, len(out.losses)))
                if mesh is not None:
                    tokens = jax.device_put(tokens, NamedSharding(mesh, P("fsdp")))
                if keep_text and len(out.texts) < len(out.places):
                    out.texts.append(train_step.lower(model, optimizer, tokens).compile().as_text() or "")
                leaf = jax.tree.leaves(nnx.state(model, (nnx.Param)))[0]
                out.losses.append(float(train_step(model, optimizer, tokens)))
                out.donated.append(leaf.is_deleted())
    assert all(node.recipe == recipes[-1] for _, node in nnx.iter_graph(model) if isinstance(node, SparseMLP))
    assert len(jax.tree.leaves(nnx.state(model, Method))) == 4 * sizes.layers
    return out


MODELS = {
    "nanodo": (run_nanodo, (8,), ("data",)),
    "gemma": (run_gemma, (8,), ("fsdp",)),
    "maxtext": (run_maxtext, (2, 2, 2), ("data", "fsdp", "tensor")),
}
