"""A linen Transformer with its weights cut over all devices (FSDP), in jit.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/linen_fsdp.py

Shows `venom_jax.linen.SparseMLP` with partitioned parameters in a TrainState. The layer finds the mesh by the arrays
that jit is given and runs itself on each device's tokens; the boxes of its initializers say that the neurons are cut,
so that the weights travel packed. `phases.transition` leaves every array where it lies.

Sequences that count upwards by steps of one to three are learned dense, with 2:4 activations, routed, and dense again.
Expect the loss to fall below a third of its first value by the end. About 30 seconds on a CPU that counts as eight
devices; without XLA_FLAGS it uses the devices that are there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import venom_jax
from venom_jax import Recipe, phases

VOCABULARY, D_MODEL, D_FFN, LENGTH, ROWS = 64, 64, 512, 16, 32
DENSE = Recipe.dense()


class Block(nn.Module):
    """Attention and a feed-forward layer, whose neurons are cut over the mesh axis `fsdp`."""

    @nn.compact
    def __call__(self, x, recipe: Recipe):
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
        init = nn.initializers.lecun_normal()
        ffn = venom_jax.linen.SparseMLP(
            D_FFN,
            max_experts=4,
            w1_init=nn.with_partitioning(init, (None, "fsdp")),
            w2_init=nn.with_partitioning(init, ("fsdp", None)),
        )
        return x + ffn(nn.LayerNorm()(x), recipe=recipe)


class Transformer(nn.Module):
    layers: int = 2

    @nn.compact
    def __call__(self, tokens, recipe: Recipe = DENSE):
        embed = nn.Embed(VOCABULARY, D_MODEL)
        x = embed(tokens) + nn.Embed(LENGTH, D_MODEL)(jnp.arange(tokens.shape[1]))[None]
        for _ in range(self.layers):
            x = Block()(x, recipe)
        return embed.attend(nn.LayerNorm()(x))


class State(TrainState):
    """With the state of the method, which no gradient reaches."""

    method: Any


def batch(key):
    start, step = jax.random.randint(key, (2, ROWS, 1), 0, VOCABULARY)
    return (start + (step % 3 + 1) * jnp.arange(LENGTH + 1)[None]) % VOCABULARY


def main() -> list[float]:
    """Train through four phases and return the loss of each step."""
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    model = Transformer()

    def create(key):
        variables = model.init(key, jnp.zeros((1, LENGTH), jnp.int32))
        return State.create(
            apply_fn=model.apply, params=variables["params"], method=variables["Method"], tx=optax.adam(3e-3)
        )

    places = nn.get_sharding(jax.eval_shape(create, jax.random.key(0)), mesh)
    state = jax.jit(create, out_shardings=places)(jax.random.key(0))

    @functools.partial(jax.jit, static_argnames="recipe", donate_argnums=0)  # one compilation for each recipe
    def train_step(state, tokens, recipe):
        def loss(params):
            logits: Any = state.apply_fn({"params": params, "Method": state.method}, tokens[:, :-1], recipe)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    losses = []
    for recipe in (DENSE, Recipe.act24(), Recipe.venom(experts=4, top_k=2), DENSE):
        # old=None: the layers remember the recipe before.
        out = phases.transition(state.params, state.method, [state.opt_state], None, recipe, seed=0)
        state = state.replace(params=out.params, method=out.method, opt_state=out.trees[0])
        for _ in range(30):
            tokens = jax.device_put(batch(jax.random.key(len(losses))), NamedSharding(mesh, P("fsdp")))
            state, loss = train_step(state, tokens, recipe)
            losses.append(float(loss))
        print(f"step {len(losses)}: loss {losses[-1]:.3f}, {out.report}")
    return losses


if __name__ == "__main__":
    main()
