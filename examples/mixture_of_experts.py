"""A mixture-of-experts layer whose experts are SparseMLPs, all of them in one vmapped call.

    python examples/mixture_of_experts.py

Shows that SparseMLP can be mapped over a leading axis: `nnx.vmap` makes a stack of them (w1 is [experts, D, F]), and
`jax.vmap` applies each to its own tokens, forward and backward. The outer router is an ordinary one, learned, with a
fixed capacity for each expert. Inside an expert the V:N:M recipe routes again, by directions of the weights, among
clusters of the expert's own neurons. `phases.transition` clusters each expert for itself.

Four experts learn four different linear maps of the input, one for each quadrant of its first two numbers. Expect the
loss to fall by a third or more in the dense phase, to stay there in the sparse one, and the mapped call to equal a
loop over the experts up to rounding. About 15 seconds on a CPU.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from venom_jax import Method, Recipe, SparseMLP, phases

D_MODEL, D_FFN, EXPERTS, TOKENS = 16, 64, 4, 256


class MixtureOfExperts(nnx.Module):
    """y_t = p_t expert_{e_t}(x_t) for the expert e_t of the largest router probability p_t."""

    def __init__(self, rngs: nnx.Rngs, capacity: int):
        self.capacity = capacity  # tokens an expert takes; what exceeds it gets y = 0
        self.router = nnx.Linear(D_MODEL, EXPERTS, use_bias=False, rngs=rngs)

        @nnx.split_rngs(splits=EXPERTS)
        @nnx.vmap
        def stack(rngs):
            return SparseMLP(D_MODEL, D_FFN, max_experts=2, rngs=rngs)

        self.experts = stack(rngs)

    def __call__(self, x, recipe: Recipe):
        probabilities = jax.nn.softmax(self.router(x))  # [T, E]
        chosen = jax.nn.one_hot(probabilities.argmax(-1), EXPERTS)
        place = jnp.sum((jnp.cumsum(chosen, 0) - 1) * chosen, -1).astype(int)  # of a token among those of its expert
        dispatch = chosen[..., None] * jax.nn.one_hot(place, self.capacity)[:, None]  # [T, E, capacity]
        inputs = jnp.einsum("tec,td->ecd", dispatch, x)
        outputs = self.apply_experts(inputs, recipe)
        return jnp.einsum("tec,te,ecd->td", dispatch, probabilities, outputs)

    def apply_experts(self, inputs, recipe: Recipe):
        """[E, capacity, D] -> [E, capacity, D]: each expert on its own tokens."""
        graph, stacked = nnx.split(self.experts)
        return jax.vmap(lambda state, x: nnx.merge(graph, state)(x, recipe=recipe))(stacked, inputs)


def apply_one_by_one(layer: MixtureOfExperts, inputs, recipe: Recipe):
    """The same as `layer.apply_experts` by a loop over the experts."""
    graph, stacked = nnx.split(layer.experts)
    apply = jax.jit(lambda state, x: nnx.merge(graph, state)(x, recipe=recipe))
    states = (jax.tree.map(operator.itemgetter(i), stacked) for i in range(EXPERTS))
    return jnp.stack([apply(state, x) for state, x in zip(states, inputs, strict=True)])


def batch(key):
    """Inputs, and each one's image under the linear map of its quadrant."""
    x = jax.random.normal(key, (TOKENS, D_MODEL))
    maps = jax.random.normal(jax.random.key(1), (4, D_MODEL, D_MODEL)) / D_MODEL**0.5
    quadrant = 2 * (x[:, 0] > 0) + (x[:, 1] > 0)
    return x, jnp.einsum("td,tde->te", x, maps[quadrant])


def main() -> dict[str, float]:
    """Train dense, then sparse; return the first and last loss and how far the mapped call is from the loop."""
    layer = MixtureOfExperts(nnx.Rngs(0), capacity=TOKENS // 2)
    graph, params, method = nnx.split(layer, nnx.Param, Method)
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, static_argnames="recipe")
    def train_step(params, opt_state, method, key, recipe):
        x, wanted = batch(key)

        def loss(params):
            return jnp.mean((nnx.merge(graph, params, method)(x, recipe) - wanted) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    losses, old, recipe = [], Recipe.dense(), Recipe.venom(experts=2, top_k=1)
    for new, steps in ((old, 60), (recipe, 60)):
        out = phases.transition(params, method, [opt_state], old, new, seed=0)
        params, method, (opt_state,), old = out.params, out.method, out.trees, new
        for _ in range(steps):
            params, opt_state, loss = train_step(params, opt_state, method, jax.random.key(len(losses)), new)
            losses.append(float(loss))
        print(f"step {len(losses)}: loss {losses[-1]:.3f} ({new.pattern if new.routed else 'dense'})")

    layer = nnx.merge(graph, params, method)
    inputs = jax.random.normal(jax.random.key(2), (EXPERTS, 64, D_MODEL))
    mapped = nnx.jit(MixtureOfExperts.apply_experts, static_argnums=2)(layer, inputs, recipe)
    looped = apply_one_by_one(layer, inputs, recipe)
    difference = float(jnp.abs(mapped - looped).max() / jnp.abs(looped).max())
    print(f"mapped against looped: largest difference {difference:.1e} of the largest output")
    return {"first": losses[0], "last": losses[-1], "difference": difference}


if __name__ == "__main__":
    main()
