"""An nnx Transformer whose layers are stacked and run by a scan, on a mesh.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/nnx_scan.py

Shows a model that knows nothing of recipes: the recipe is a static attribute of every layer, which
`phases.change_recipe(model, optimizer, recipe)` sets when it carries the model and its optimizer over, in place. The
layers are made by `nnx.vmap`, run by `nnx.scan` and recomputed in the backward by `nnx.remat`; the batch is cut over
the ambient mesh, the weights are on every device.

Sequences that count upwards by steps of one to three are learned dense, with 2:4 activations, routed, and dense again.
Expect the loss to fall below a third of its first value by the end. About 20 seconds on a CPU that counts as eight
devices; without XLA_FLAGS it uses the devices that are there.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from venom_jax import Recipe, SparseMLP, phases

VOCABULARY, D_MODEL, D_FFN, LAYERS, LENGTH, ROWS = 64, 64, 256, 2, 16, 32


class Block(nnx.Module):
    """Attention and a feed-forward layer, each with its norm before and the residual around it."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(D_MODEL, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, D_MODEL, decode=False, rngs=rngs)
        self.ffn_norm = nnx.LayerNorm(D_MODEL, rngs=rngs)
        self.ffn = SparseMLP(D_MODEL, D_FFN, max_experts=4, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, D_MODEL, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, D_MODEL, rngs=rngs)
        self.norm = nnx.LayerNorm(D_MODEL, rngs=rngs)

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(rngs)

        self.blocks = stack(rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block, x):
            return block(x)

        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        return self.embedding.attend(self.norm(run(self.blocks, x)))


@nnx.jit(donate_argnums=(0, 1))  # the recipe is part of the model's structure: one compilation for each
def train_step(model, optimizer, tokens):
    def loss(model):
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


def batch(key):
    start, step = jax.random.randint(key, (2, ROWS, 1), 0, VOCABULARY)
    return (start + (step % 3 + 1) * jnp.arange(LENGTH + 1)[None]) % VOCABULARY


def main() -> list[float]:
    """Train through four phases and return the loss of each step."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    losses = []
    with jax.set_mesh(mesh):
        model = Transformer(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
        everywhere = NamedSharding(mesh, P())
        nnx.update((model, optimizer), jax.device_put(nnx.state((model, optimizer)), everywhere))
        for recipe in (Recipe.dense(), Recipe.act24(), Recipe.venom(experts=4, top_k=2), Recipe.dense()):
            report = phases.change_recipe(model, optimizer, recipe)
            for _ in range(30):
                tokens = jax.device_put(batch(jax.random.key(len(losses))), NamedSharding(mesh, P("data")))
                losses.append(float(train_step(model, optimizer, tokens)))
            print(f"step {len(losses)}: loss {losses[-1]:.3f}, {report}")
    return losses


if __name__ == "__main__":
    main()
