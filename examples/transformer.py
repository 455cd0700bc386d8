"""SparseMLP inside a plain flax.nnx Transformer of your own.

    python examples/transformer.py

Shows what changes in a model that you already have: the two Linear layers of each block become one SparseMLP, and the
recipe travels down to it as an argument of the call. Everything else here is flax, as you would write it anyway.

A byte-level model learns this very file, first dense, then sparse (64:2:16), then dense again. Expect a loss near 6 at
the start, a small jump at each change of recipe, and less than half of it at the end. About 20 seconds on a CPU.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from venom_jax import Method, Recipe, SparseMLP, phases

VOCABULARY, D_MODEL, LENGTH, BATCH = 128, 64, 64, 8


class Block(nnx.Module):
    """Attention and a feed-forward layer, each with its norm before and the residual around it."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(D_MODEL, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, D_MODEL, decode=False, rngs=rngs)
        self.ffn_norm = nnx.RMSNorm(D_MODEL, rngs=rngs)
        self.ffn = SparseMLP(D_MODEL, 4 * D_MODEL, max_experts=4, rngs=rngs)  # was Linear, activation, Linear

    def __call__(self, x, recipe: Recipe):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.attention_norm(x), mask=mask)
        y, stats = self.ffn(self.ffn_norm(x), recipe=recipe, return_stats=True)
        return x + y, stats.density


class Transformer(nnx.Module):
    def __init__(self, layers: int, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, D_MODEL, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, D_MODEL, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(layers)])
        self.head = nnx.Linear(D_MODEL, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens, recipe: Recipe):
        """Logits, and the mean density of the hidden activations."""
        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        densities = []
        for block in self.blocks:
            x, density = block(x, recipe)
            densities.append(density)
        return self.head(x), jnp.stack(densities).mean()


def main() -> list[float]:
    """Train through three phases and return the loss of each step."""
    text = jnp.asarray(bytearray(Path(__file__).read_text().encode("ascii")), jnp.int32)
    create = nnx.jit(lambda: Transformer(layers=2, rngs=nnx.Rngs(0)))
    graph, params, method = nnx.split(create(), nnx.Param, Method)
    optimizer = optax.adam(5e-3)
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, static_argnames="recipe")
    def train_step(params, opt_state, method, key, recipe):
        starts = jax.random.randint(key, (BATCH, 1), 0, text.size - LENGTH)
        tokens = text[starts + jnp.arange(LENGTH + 1)]

        def loss(params):
            logits, density = nnx.merge(graph, params, method)(tokens[:, :-1], recipe)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), density

        (value, density), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value, density

    losses, old = [], Recipe.dense()
    for recipe in (Recipe.dense(), Recipe.venom(experts=4, top_k=1), Recipe.dense()):
        out = phases.transition(params, method, [opt_state], old, recipe, seed=0)
        params, method, (opt_state,), old = out.params, out.method, out.trees, recipe
        for _ in range(60):
            key = jax.random.key(len(losses))
            params, opt_state, loss, density = train_step(params, opt_state, method, key, recipe)
            losses.append(float(loss))
        name = f"sparse, {recipe.pattern}" if recipe.routed else "dense"
        print(f"step {len(losses)} ({name}): loss {losses[-1]:.3f}, {float(density):.0%} of the neurons active")
    return losses


if __name__ == "__main__":
    main()
