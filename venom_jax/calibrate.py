"""What a change of recipe takes from a sample of a layer's inputs: experts, the router's rows, how loud its output is.

Used by `venom_jax.phases.transition`, on the host, between steps.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.array_types import Array, Float
from venom_jax import router
from venom_jax.ffn import sparse_ffn, weight_operand
from venom_jax.pattern import WEIGHT_GEMMS, Recipe, StackRecipe

_EPSILON = 1e-12
MAX_TOKENS = 4096
"""Tokens of a sample that are worth having."""


class Layer(NamedTuple):
    """The arrays of one FFN: W1 [D, F], W2 [F, D], beta [4], bias [E_max], and [E_max, D] of a learned router."""

    w1: Array
    w2: Array
    beta: Array
    bias: Array
    router: Array | None = None


def clusters_by_sample(recipe: Recipe) -> bool:
    """Whether the recipe's experts cannot be formed from the weights alone."""
    return recipe.routed and (recipe.clustering == "coactivation" or recipe.shared > 0)


def reclusters(old: Recipe, new: Recipe) -> bool:
    """Whether experts are formed anew where `new` follows `old`."""

    def formed(recipe: Recipe) -> tuple[int, int, str]:
        return recipe.experts, recipe.shared, recipe.clustering

    return new.routed and formed(new) != formed(old)


def refits(old: Recipe, new: Recipe) -> bool:
    """Whether the rows of a learned router are fitted where `new` follows `old`."""
    return new.routed and new.router == "learned" and (old.router != "learned" or reclusters(old, new))


def grows(old: Recipe, new: Recipe) -> bool:
    """Whether a token computes a larger share of the neurons in `new`."""
    return new.top_k * old.experts > old.top_k * new.experts


def needs_inputs(old: StackRecipe, new: StackRecipe, layers: int, *, rescale: bool) -> bool:
    """Whether `transition` from `old` to `new` asks for a sample of the inputs of a stack of so many layers."""
    olds, news = ([part for a, b, part in r.parts(layers) for _ in range(a, b)] for r in (old, new))
    pairs = list(zip(olds, news, strict=True))
    clusters = any(clusters_by_sample(after) and reclusters(before, after) for before, after in pairs)
    return (
        clusters
        or any(refits(before, after) for before, after in pairs)
        or (rescale and any(grows(before, after) for before, after in pairs))
    )


def neuron_order(
    w1: Float[np.ndarray, "D F"], recipe: Recipe, *, seed: int, x: Float[np.ndarray, "T D"] | None = None
) -> np.ndarray:
    """An order [F] of the neurons in which each run of F / E of them is one expert of the recipe.

    The shared experts come first and take the neurons with the largest energy sum_t relu(x_t w)^4.  The others are
    clustered: by the direction of W1's columns ("kmeans"), or by that of the activations relu(x W1) over the sample,
    which groups neurons that fire for the same tokens ("coactivation").

    Raises:
      ValueError: a sample is needed and x is None, or F does not split into the experts.
    """
    if not clusters_by_sample(recipe):
        return router.cluster_columns(w1, recipe.experts, seed=seed)
    if x is None:
        raise ValueError(
            f"clustering = {recipe.clustering!r} with shared = {recipe.shared} experts needs a sample of the layers' "
            "inputs; give transition its argument inputs."
        )
    active = np.maximum(np.asarray(x, np.float32) @ np.asarray(w1, np.float32), 0)
    by_energy = np.argsort(-np.square(np.square(active)).sum(axis=0), kind="stable")
    cut = recipe.shared * (w1.shape[1] // recipe.experts)
    shared, rest = np.sort(by_energy[:cut]), np.sort(by_energy[cut:])
    features = active if recipe.clustering == "coactivation" else w1
    order = router.cluster_columns(features[:, rest], recipe.experts - recipe.shared, seed=seed)
    return np.concatenate([shared, rest[order]]).astype(np.int32)


def fit_router(x: Float[np.ndarray, "T D"], w1: Float[np.ndarray, "D F"], recipe: Recipe) -> np.ndarray:
    """Rows r_e [E, D], of mean norm 1, whose top-k by <x, r_e> are close to those by s_te = sum of e's relu(x_t w)^2.

    w are the columns that the recipe's y1 reads but for their scale, so of S(W1) where it is sparse.

    Ridge regression of each token's shares, z_te = s_te / sum_e s_te - 1 / E, on x_t / |x_t|. Of several penalties that
    one is taken that keeps the most energy, the sum of a^4, on a quarter of the tokens that is left out; experts' mean
    columns, the `cosine` router, are among the candidates. W1 is in the order of the experts.
    """
    x, w1 = np.asarray(x, np.float64), np.asarray(w1, np.float64)
    experts, choices = recipe.experts, recipe.top_k - recipe.shared
    read = weight_operand("y1", recipe, jnp.asarray(w1), jnp.ones(len(WEIGHT_GEMMS)), None, jnp.float32)
    active = np.square(np.maximum(x @ np.asarray(read, np.float64), 0)).reshape(x.shape[0], experts, -1)
    sums, energy = active.sum(axis=-1), np.square(active).sum(axis=-1)
    targets = sums / np.maximum(sums.sum(axis=1, keepdims=True), _EPSILON) - 1 / experts
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), _EPSILON)
    held_out = np.arange(x.shape[0]) % 4 == 3

    def kept(rows: np.ndarray) -> float:
        order = np.argsort(-(unit[held_out] @ rows.T)[:, recipe.shared :], axis=1, kind="stable")[:, :choices]
        return np.take_along_axis(energy[held_out, recipe.shared :], order, axis=1).sum()

    gram, cross = unit[~held_out].T @ unit[~held_out], unit[~held_out].T @ targets[~held_out]
    penalty = np.trace(gram) / gram.shape[0]
    candidates = [np.asarray(router.expert_means(jnp.asarray(w1, jnp.float32), experts), np.float64)]
    for strength in (0.01, 0.1, 1.0, 10.0, 100.0):
        candidates.append(np.linalg.solve(gram + strength * penalty * np.eye(gram.shape[0]), cross).T)
    best = max(candidates, key=kept)
    return (best / max(np.linalg.norm(best, axis=1).mean(), _EPSILON)).astype(np.float32)


def output_scale(x: Float[Array, "T D"], before: Layer, after: Layer, old: Recipe, new: Recipe) -> Float[Array, ""]:
    """s = <y_old, y_new> / <y_new, y_new>, which minimises |y_old(x) - s y_new(x)|; 1 where that is not positive."""

    def output(layer: Layer, recipe: Recipe) -> Array:
        route = None
        if recipe.routed:
            options = {"bias": layer.bias, "learned": layer.router}
            route = router.route(x, layer.w1, recipe, **options, implementation="reference")
        y = sparse_ffn(x, layer.w1, layer.w2, route, layer.beta, recipe=recipe.forward, implementation="reference")
        return y.astype(jnp.float32)

    y_old, y_new = output(before, old), output(after, new)
    energy, common = jnp.vdot(y_new, y_new), jnp.vdot(y_old, y_new)
    return jnp.where((energy > 0) & (common > 0), common / jnp.where(energy > 0, energy, 1.0), 1.0)
