"""A training loop with phases, dense -> V:N:M -> dense, with venom_jax and optax alone.

    python examples/phases_without_train.py

Shows the whole of what a training loop of your own has to do, in `main`: pass the recipe of the phase to the layer, and
call `phases.transition` where the recipe changes. It clusters and permutes the neurons, the optimizer's moments with
them, when the sparse phase begins, and makes the weights those of a dense layer when it ends.

A student of 256 neurons learns a teacher of 64. Expect the loss to fall in the dense phase, to jump where routing
begins (each token then has a quarter of the neurons, and half of those count), to fall again inside the sparse phase,
and to end lowest after the last dense one. About 10 seconds on a CPU.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from venom_jax import Method, Recipe, SparseMLP, phases

SCHEDULE = {0: Recipe.dense(), 80: Recipe.venom(experts=4, top_k=1), 200: Recipe.dense()}
STEPS, TOKENS, D_MODEL, D_FFN = 300, 256, 32, 256


def main() -> list[float]:
    """Train and return the loss of each step."""
    teacher = SparseMLP(D_MODEL, 64, rngs=nnx.Rngs(1))
    student = SparseMLP(D_MODEL, D_FFN, max_experts=4, rngs=nnx.Rngs(0))
    graph, params, method = nnx.split(student, nnx.Param, Method)
    optimizer = optax.adam(5e-3)
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, static_argnames="recipe")  # one compilation for each recipe
    def train_step(params, opt_state, method, key, recipe):
        x = jax.random.normal(key, (TOKENS, D_MODEL))

        def loss(params):
            y = nnx.merge(graph, params, method)(x, recipe=recipe)
            return jnp.mean((y - teacher(x)) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    losses, recipe = [], SCHEDULE[0]
    for step in range(STEPS):
        new = SCHEDULE.get(step, recipe)
        if new != recipe:
            out = phases.transition(params, method, [opt_state], recipe, new, seed=step)
            params, method, (opt_state,), recipe = out.params, out.method, out.trees, new
            print(f"step {step}: pattern {new.pattern if new.routed else 'dense'}, {out.report}")
        params, opt_state, loss = train_step(params, opt_state, method, jax.random.key(step), recipe)
        losses.append(float(loss))
        if step % 25 == 24:
            print(f"step {step + 1}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
