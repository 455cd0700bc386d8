"""V: cluster hidden neurons into equal experts, and send each token to its top-k of them.

There are no trained parameters. An expert is a contiguous slice of F / E neurons (W1's columns are permuted once, see
`venom_jax.phases`), and a token's score for it comes from the slice's mean column, or from a row fitted beforehand.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.array_types import Array, Float, Int
from pallas_kernels.dispatch import Implementation
from pallas_kernels.permute import api as permute
from pallas_kernels.permute import reference as permute_reference
from venom_jax.ffn import weight_operand
from venom_jax.pattern import WEIGHT_GEMMS, Recipe

_EPSILON = 1e-12

Axis = str | tuple[str, ...]
"""One mesh axis, or several as one, the first the slowest."""


def cluster_columns(w1: np.ndarray, experts: int, *, seed: int, iterations: int = 15) -> np.ndarray:
    """An order [F] of W1's columns in which each run of F / E columns is one cluster.

    Balanced k-means on the L2-normalised columns: in every iteration each column goes to the nearest centre (largest
    cosine) that has room, and where a centre is wanted by too many, those go first that would lose most by their next
    choice. Runs on the host in float32; the result depends on the seed and on nothing else but W1.

    Args:
      w1: [D, F] master weights.
      experts: E, must divide F.

    Raises:
      ValueError: F is not divisible by E, or W1 is not finite.
    """
    columns = np.asarray(w1, np.float32).T
    count = columns.shape[0]
    if count % experts:
        raise ValueError(f"{count} columns do not split into {experts} equal experts; change d_ffn or experts.")
    if not np.isfinite(columns).all():
        raise ValueError("W1 holds NaN or inf; its columns cannot be clustered. Go back to a finite checkpoint.")
    columns = columns / (np.linalg.norm(columns, axis=1, keepdims=True) + _EPSILON)
    rng = np.random.default_rng(seed)
    centres = columns[rng.choice(count, experts, replace=False)]
    assignment = np.full(count, -1)
    for _ in range(iterations):
        previous, assignment = assignment, _assign_balanced(columns @ centres.T)
        if np.array_equal(previous, assignment):
            break
        one_hot = np.eye(experts, dtype=np.float32)[assignment]
        centres = one_hot.T @ columns
        centres /= np.linalg.norm(centres, axis=1, keepdims=True) + _EPSILON
    return np.argsort(assignment, kind="stable").astype(np.int32)


def _assign_balanced(similarity: np.ndarray) -> np.ndarray:
    """Columns [F] -> centres, F / E each: rounds in which the undecided ask for their best centre with room."""
    count, experts = similarity.shape
    room = np.full(experts, count // experts)
    assignment = np.full(count, -1)
    undecided = np.arange(count)
    while undecided.size:
        wanted = np.where(room > 0, similarity[undecided], -np.inf)
        choice = wanted.argmax(axis=1)
        best = np.sort(wanted, axis=1)
        # Where only one centre is left there is no second choice to lose against.
        regret = best[:, -1] - best[:, -2] if (room > 0).sum() > 1 else best[:, -1]
        for expert in np.flatnonzero(room):
            asking = np.flatnonzero(choice == expert)
            winners = asking[np.argsort(-regret[asking], kind="stable")][: room[expert]]
            assignment[undecided[winners]] = expert
            room[expert] -= winners.size
        undecided = undecided[assignment[undecided] < 0]
    return assignment


def expert_means(
    w1: Float[Array, "D F"], experts: int, *, normalise: bool = True, axis: Axis | None = None
) -> Float[Array, "E D"]:
    """mean_e = normalised mean over the columns of slice e, each normalised first; f32, no gradient.

    With `normalise=False` the plain mean of the columns. axis: as in `scores`.
    """
    w1 = jax.lax.stop_gradient(w1).astype(jnp.float32)
    if normalise:
        w1 = w1 / (jnp.linalg.norm(w1, axis=0, keepdims=True) + _EPSILON)
    if axis is not None:
        # Means of the longest runs that neither a device's columns nor an expert's cut: D numbers each to exchange.
        run = math.gcd(w1.shape[1], w1.shape[1] * jax.lax.axis_size(axis) // experts)
        w1 = jax.lax.all_gather(w1.reshape(w1.shape[0], -1, run).mean(axis=-1), axis, axis=1, tiled=True)
    means = w1.reshape(w1.shape[0], experts, -1).mean(axis=-1).T
    return means / (jnp.linalg.norm(means, axis=1, keepdims=True) + _EPSILON) if normalise else means


def scores(
    x: Float[Array, "T D"],
    w1: Float[Array, "D F"],
    recipe: Recipe,
    *,
    learned: Float[Array, "E_max D"] | None = None,
    key: Array | None = None,
    axis: Axis | None = None,
) -> Float[Array, "T E"]:
    """The score of each token for each expert, in f32, without gradient.

    `cosine`: <x, mean_e> / |x| with normalised means. `dot`: <x, mean_e> with the plain mean column.
    `learned`: <x, r_e> / |x|, r_e the first E rows of `learned`, see `venom_jax.calibrate.fit_router`.
    `oracle`: sum over the slice of relu(x w1)^2, which needs the whole hidden layer, with S(w1) in place of w1 where
    y1 reads that; its scale is the same for all and left out. `random`: noise from `key` (the same for every call if
    none is given).

    axis: inside `jax.shard_map`, the mesh axis over whose devices W1 is cut along F, so that each holds a part.
    """
    x = jax.lax.stop_gradient(x)
    match recipe.router:
        case "random":
            return jax.random.normal(jax.random.key(0) if key is None else key, (x.shape[0], recipe.experts))
        case "oracle":
            whole = jax.lax.stop_gradient(w1 if axis is None else jax.lax.all_gather(w1, axis, axis=1, tiled=True))
            operand = weight_operand("y1", recipe, whole, jnp.ones(len(WEIGHT_GEMMS)), None, x.dtype)
            hidden = jnp.square(jax.nn.relu(jnp.dot(x, operand, preferred_element_type=jnp.float32)))
            return hidden.reshape(x.shape[0], recipe.experts, -1).sum(axis=-1)
        case "dot" | "cosine" | "learned":
            rows = _rows(w1, recipe, learned, axis)
            return permute_reference.score_experts(x, rows, cosine=recipe.router != "dot")


def route(
    x: Float[Array, "T D"],
    w1: Float[Array, "D F"],
    recipe: Recipe,
    *,
    bias: Float[Array, "E_max"] | None = None,
    learned: Float[Array, "E_max D"] | None = None,
    key: Array | None = None,
    axis: Axis | None = None,
    implementation: Implementation | None = None,
) -> Int[Array, "T k"]:
    """The top-k experts of each token in ascending order, shared ones always; ties go to the lower expert.

    Args:
      bias: balance bias, added to the scores for this choice only; longer arrays are cut to E.
      learned, key, axis: as in `scores`.
      implementation: "reference"; "hopper", the kernel that scores and chooses reading x once, for the routers
        `cosine`, `dot` and `learned`; None takes it where `pallas_kernels.permute.api.choose_experts` says. Its scores
        differ from the reference's in their last bits.

    Raises:
      NotImplementedError: the named implementation does not run here, or not this router.
      ValueError: the router is `learned`, and `learned` is not given.

    Source: arXiv 2602.06183, algorithm 3; bias: auxiliary-loss-free balancing, arXiv 2408.15664.
    """
    bias = None if bias is None else jax.lax.stop_gradient(bias[: recipe.experts])
    if recipe.shared:
        bias = (jnp.zeros(recipe.experts) if bias is None else bias).at[: recipe.shared].set(jnp.inf)
    if recipe.router in ("cosine", "dot", "learned"):
        x, cosine = jax.lax.stop_gradient(x), recipe.router != "dot"
        rows = _rows(w1, recipe, learned, axis)
        return permute.choose_experts(x, rows, bias, recipe.top_k, cosine=cosine, implementation=implementation)
    if implementation == "hopper":
        raise NotImplementedError(f"no kernel scores with router = {recipe.router!r}; use implementation=None.")
    return permute_reference.choose_top(scores(x, w1, recipe, key=key, axis=axis), bias, recipe.top_k)


def _rows(w1: Float[Array, "D F"], recipe: Recipe, learned: Array | None, axis: Axis | None) -> Float[Array, "E D"]:
    """What a token is compared with, one row an expert."""
    if recipe.router == "learned":
        if learned is None:
            raise ValueError(
                "Recipe.router = 'learned' needs its fitted rows; make the layer with learned_router=True."
            )
        return jax.lax.stop_gradient(learned[: recipe.experts])
    return expert_means(w1, recipe.experts, normalise=recipe.router == "cosine", axis=axis)


def load(routed: Int[Array, "T k"], max_experts: int) -> Float[Array, "E_max"]:
    """How many tokens each expert got."""
    chosen = (
        routed.reshape(-1, 1) == jnp.arange(max_experts)[None]
    )  # compared and summed: a scatter would add one by one
    return jax.lax.stop_gradient(jnp.sum(chosen, axis=0, dtype=jnp.float32))


def updated_bias(
    bias: Float[Array, "*L E_max"], loads: Float[Array, "*L E_max"], recipe: Recipe
) -> Float[Array, "*L E_max"]:
    """b_e + balance_rate * sign(mean load - load_e), for the experts there is a choice of; once per optimizer step."""
    index = jnp.arange(bias.shape[-1])
    used = (index >= recipe.shared) & (index < recipe.experts)
    mean = jnp.sum(jnp.where(used, loads, 0), axis=-1, keepdims=True) / (recipe.experts - recipe.shared)
    return bias + jnp.where(used, recipe.balance_rate * jnp.sign(mean - loads), 0)
