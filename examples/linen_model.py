"""SparseMLP in a flax.linen model.

    python examples/linen_model.py

Shows `venom_jax.linen.SparseMLP`, which is used like any linen module. Its weights are under `params`; the state that
no gradient reaches (frozen scales, balance bias, order of the neurons) is a collection of its own, `Method`, which is
passed to `apply` beside the parameters. `phases.transition` takes both as linen keeps them.

A two-layer residual network learns to sort the sixteen numbers of its input, dense and then with weights and
activations 2:4. Expect the loss to fall below a tenth of its first value by the end of the sparse phase; the dense
model made of the sparse one at the end has nearly the same loss, before any further step. About 15 seconds on a CPU.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import venom_jax
from venom_jax import Recipe, phases


class Sorter(nn.Module):
    """Sixteen numbers to the same numbers in order, approximately."""

    layers: int = 2

    @nn.compact
    def __call__(self, numbers, recipe: Recipe):
        x = nn.Dense(64)(numbers)
        for i in range(self.layers):
            ffn = venom_jax.linen.SparseMLP(d_ffn=256, max_experts=4, name=f"ffn_{i}")
            x = x + ffn(nn.RMSNorm()(x), recipe=recipe)
        return nn.Dense(numbers.shape[-1])(x)


def main() -> dict[str, float]:
    """Train and return the first loss, the last sparse one, and that of the dense model made of the sparse one."""
    model, dense, sparse = Sorter(), Recipe.dense(), Recipe.all24()
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), jnp.zeros((4, 16)), dense)
    params, method = variables["params"], variables["Method"]
    optimizer = optax.adam(3e-3)
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, static_argnames="recipe")
    def loss(params, method, key, recipe):
        numbers = jax.random.normal(key, (128, 16))
        found = jnp.asarray(model.apply({"params": params, "Method": method}, numbers, recipe))
        return jnp.mean((found - jnp.sort(numbers)) ** 2)

    @functools.partial(jax.jit, static_argnames="recipe")
    def train_step(params, opt_state, method, key, recipe):
        value, gradient = jax.value_and_grad(loss)(params, method, key, recipe=recipe)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    losses, old = [], dense
    for recipe, steps in ((dense, 50), (sparse, 100)):
        out = phases.transition(params, method, [opt_state], old, recipe, seed=0)
        params, method, (opt_state,), old = out.params, out.method, out.trees, recipe
        for _ in range(steps):
            params, opt_state, value = train_step(params, opt_state, method, jax.random.key(len(losses)), recipe)
            losses.append(float(value))
        print(f"step {len(losses)}: loss {losses[-1]:.4f}")

    out = phases.transition(params, method, [], old, dense, seed=0)
    final = float(loss(out.params, out.method, jax.random.key(len(losses)), recipe=dense))
    print(f"as a dense model: loss {final:.4f}, {out.report}")
    return {"first": losses[0], "sparse": losses[-1], "dense": final}


if __name__ == "__main__":
    main()
