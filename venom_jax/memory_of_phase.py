"""What a layer's arrays were made for: the recipe of the last change of phase, as five numbers beside them.

A checkpoint holds arrays, not the program that wrote them. Only what the arrays depend on is kept: which weights are
soft-thresholded with frozen scales, and how neurons were grouped and the router fitted.
"""

import functools
import warnings
from pathlib import Path
from typing import get_args

import flax
import jax
import numpy as np

from pallas_kernels.array_types import Array
from venom_jax.pattern import WEIGHT_GEMMS, Clustering, Recipe, Router, WeightMask

LENGTH = 5
_MASKS, _CLUSTERINGS, _ROUTERS = (get_args(choices) for choices in (WeightMask, Clustering, Router))
_PACKAGES = tuple(str(Path(file or "").parent) for file in (flax.__file__, jax.__file__, __file__))


class PhaseWarning(UserWarning):
    """A layer runs a recipe that its arrays were not made for."""


def encode(recipe: Recipe) -> np.ndarray:
    """[5] int32: experts, top_k, shared, the weight-sparse products as bits, and mask, clustering and router."""
    bits = sum(1 << WEIGHT_GEMMS.index(gemm) for gemm in recipe.weights)
    choices = _MASKS.index(recipe.weight_mask) + 8 * _CLUSTERINGS.index(recipe.clustering)
    choices += 64 * _ROUTERS.index(recipe.router)
    return np.array([recipe.experts, recipe.top_k, recipe.shared, bits, choices], np.int32)


def decode(numbers: np.ndarray) -> Recipe:
    """A recipe that `encode` gives these numbers for; what they do not say is as in `Recipe.dense()`.

    Raises:
      ValueError: no recipe has these numbers.
    """
    experts, top_k, shared, bits, choices = (int(number) for number in np.asarray(numbers))
    try:
        router = _ROUTERS[choices // 64]
        return Recipe(
            weights=tuple(gemm for i, gemm in enumerate(WEIGHT_GEMMS) if bits >> i & 1),
            weight_mask=_MASKS[choices % 8],
            clustering=_CLUSTERINGS[choices % 64 // 8],
            router=router,
            hidden="full" if router == "oracle" else "routed",
            experts=experts,
            top_k=top_k,
            shared=shared,
        )
    except (IndexError, ValueError) as error:
        raise ValueError(f"a layer's memory of its phase holds {numbers}, which no recipe has.") from error


def same(first: Recipe, second: Recipe) -> bool:
    """Whether arrays made for the one are those of the other."""
    return _essence(first) == _essence(second)


def fits(made_for: Recipe, recipe: Recipe) -> bool:
    """Whether a recipe computes with these arrays what they were made for; a dense one takes any order of neurons."""
    return made_for.weights == recipe.weights and holds(made_for, recipe)


def holds(made_for: Recipe, recipe: Recipe) -> bool:
    """Whether the arrays hold the scales, experts and router rows that the recipe uses."""
    if not set(recipe.weights) <= set(made_for.weights):
        return False
    if recipe.weights and made_for.weight_mask != recipe.weight_mask:
        return False
    if not recipe.routed:
        return True
    learned = (made_for.router == "learned") >= (recipe.router == "learned")
    return learned and _groups(made_for) == _groups(recipe)


def describe(recipe: Recipe) -> str:
    """The part that arrays depend on, in words."""
    weights = f"weights {', '.join(recipe.weights)} 2:4" if recipe.weights else "no sparse weight"
    if not recipe.routed:
        return weights
    return f"{weights}, {recipe.experts} experts ({recipe.clustering}, {recipe.shared} shared, {recipe.router} router)"


def warn_unless_made_for(numbers: Array, recipe: Recipe) -> None:
    """`PhaseWarning` unless the arrays hold what the recipe uses, where that can be seen: not inside `jax.jit`."""
    if isinstance(numbers, jax.core.Tracer) or not isinstance(recipe, Recipe) or numbers.ndim != 1:
        return
    if not numbers.is_fully_addressable and not numbers.is_fully_replicated:
        return
    key = tuple(int(number) for number in np.asarray(numbers))
    if not holds(decode(np.array(key)), recipe):
        _warn(key, recipe)


@functools.cache
def _warn(key: tuple[int, ...], recipe: Recipe) -> None:
    warnings.warn(
        f"a layer whose arrays were made for {describe(decode(np.array(key)))} runs a recipe with {describe(recipe)}; "
        "venom_jax.phases.change_recipe (or transition) carries them over.",
        PhaseWarning,
        skip_file_prefixes=_PACKAGES,
    )


def _groups(recipe: Recipe) -> tuple[int, int, str]:
    return recipe.experts, recipe.shared, recipe.clustering


def _essence(recipe: Recipe) -> tuple:
    mask = recipe.weight_mask if recipe.weights else None
    routing = (*_groups(recipe), recipe.top_k, recipe.router == "learned") if recipe.routed else None
    return recipe.weights, mask, routing
