"""The trees of a model as `venom_jax.phases` works on them: the FFNs taken out layer by layer, and put back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from venom_jax import memory_of_phase
from venom_jax import trees as named
from venom_jax.pattern import LayerRecipes, Recipe, StackRecipe
from venom_jax.trees import Path, Weight

NEURONS = {"w1": -1, "w2": -2, "up": -1, "b1": -1, "b_up": -1}
"""The parameters of an FFN, of which those of gates and biases may be absent, and where their neurons run."""
_WEIGHTS = tuple(NEURONS)
_BIASES = ("b1", "b_up")
_STATE = ("beta", "beta_up", "bias", "permutation", "router", "phase")


class Part(NamedTuple):
    """Layers [first, end) of one FFN node that share both recipes, and the number of the first one in the model."""

    path: Path
    first: int
    end: int
    old: Recipe
    new: Recipe
    number: int


class Arrays(NamedTuple):
    """Leaves of one FFN by name, layers first, the averages' beside the parameters'."""

    params: dict[str, Any]
    method: dict[str, Any]
    averages: list[dict[str, Any]]


class Model:
    """The trees of a transition, the leaves of their FFNs taken out to be worked on."""

    def __init__(self, given: tuple[Any, Any, list[Any], list[Any]], layer_axis: int, method_axis: int):
        """given: parameters, Method variables, optimizers' states, averages of the parameters."""
        params, method, *_ = self._given = given
        self._axes = dict.fromkeys(_WEIGHTS, layer_axis) | dict.fromkeys(_STATE, method_axis)
        self.layers = named.find_layers(params, method)
        self._work = {path: self._take_out(path) for path in self.layers}
        self._orders: dict[Path, np.ndarray] = {}

    def _take_out(self, path: Path) -> Arrays:
        params, method, _, averages = self._given

        def of(tree: Any, names: Sequence[str]) -> dict[str, Any]:
            leaves = {p[-1]: leaf for p, leaf in named.named_leaves(tree) if p[:-1] == path and p[-1] in names}
            return {name: self._turned(leaf, name, 0) for name, leaf in leaves.items()}

        found = Arrays(of(params, _WEIGHTS), of(method, _STATE), [of(tree, _WEIGHTS) for tree in averages])
        w1, w2 = found.params["w1"], found.params["w2"]
        stack = w1.shape[:-2]
        if w2.shape != (*stack, *w1.shape[:-3:-1]):
            raise ValueError(
                f"layer {'/'.join(path)} has w1 {w1.shape} and w2 {w2.shape}, layers first; want [..., D, F] and "
                "[..., F, D]. Give layer_axis where the layers of a stack do not come first."
            )
        if found.method["beta"].shape[:-1] != stack:
            raise ValueError(
                f"layer {'/'.join(path)} has w1 {w1.shape} and beta {found.method['beta'].shape}, layers first; give "
                "method_axis where those of the Method variables do not."
            )
        return found

    def _turned(self, leaf: Any, name: str, to: int | None) -> Any:
        """The leaf with its layers first (to = 0), or where they were (to = None)."""
        axis = self._axes[name]
        if not axis or np.ndim(leaf) < (2 if name in (*_STATE, *_BIASES) else 3):
            return leaf
        return named.move_axis(leaf, axis, 0) if to == 0 else named.move_axis(leaf, 0, axis)

    def parts(
        self, old: StackRecipe | None, new: StackRecipe, first_layer: int, *, remembered: bool = True
    ) -> list[Part]:
        """The runs of layers that share both recipes.

        Raises:
          ValueError: the layers remember another recipe than `old`, or nothing where old is None.
        """
        counts = {path: int(np.prod(self._work[path].params["w1"].shape[:-2])) for path in self.layers}
        after = self._each(new, counts)
        before = self._each(old, counts) if old is not None else [None] * sum(counts.values())
        pairs, found = iter(zip(before, after, strict=True)), []
        for path, count in counts.items():
            memory = _rows(self._work[path].method.get("phase")) if remembered else None
            for layer in range(count):
                given, wanted = next(pairs)
                known = None if memory is None else memory_of_phase.decode(memory[layer])
                before_it = given or known
                if before_it is None:
                    raise ValueError(f"layer {'/'.join(path)} remembers no recipe; give the one before as old.")
                if given is not None and known is not None and not memory_of_phase.same(given, known):
                    raise ValueError(
                        f"layer {'/'.join(path)} was made for {memory_of_phase.describe(known)}, old says "
                        f"{memory_of_phase.describe(given)}; give the recipe it was trained with, or old = None."
                    )
                last = found[-1] if layer else None
                if last is not None and (last.old, last.new) == (before_it, wanted):
                    found[-1] = last._replace(end=layer + 1)
                else:
                    found.append(Part(path, layer, layer + 1, before_it, wanted, first_layer + layer))
        return found

    def _each(self, recipe: StackRecipe, counts: dict[Path, int]) -> list[Recipe]:
        """The recipe of every layer."""
        total = sum(counts.values())
        stacks = [self._work[path].params["w1"].ndim - 2 for path in self.layers]
        if isinstance(recipe, LayerRecipes) and any(stacks) and stacks != [1]:
            path = self.layers[stacks.index(max(stacks))]
            raise ValueError(
                f"LayerRecipes take one FFN with a leading axis of layers, or FFNs without one, found {len(stacks)}, "
                f"of which {'/'.join(path)} has w1 {self._work[path].params['w1'].shape}; "
                "give each its own recipe in a transition of its own."
            )
        return [part for first, end, part in recipe.parts(total) for _ in range(first, end)]

    def take(self, part: Part) -> Arrays:
        """The arrays of a part, to be changed at will."""

        def of(leaves: dict[str, Any]) -> dict[str, Any]:
            return {
                name: leaf if self._is_whole(part) else leaf[part.first : part.end] for name, leaf in leaves.items()
            }

        work = self._work[part.path]
        return Arrays(of(work.params), of(work.method), [of(average) for average in work.averages])

    def put(self, part: Part, arrays: Arrays, order: np.ndarray | None = None) -> None:
        """The arrays of a part in place of those that it had; `order` of its neurons [..., F] for all other trees."""
        work = self._work[part.path]
        pairs = [(work.params, arrays.params), (work.method, arrays.method)]
        for leaves, new in [*pairs, *zip(work.averages, arrays.averages, strict=True)]:
            for name, leaf in leaves.items():
                whole = self._is_whole(part)
                leaves[name] = new[name] if whole else _pasted(leaf, new[name], part.first)
        if order is not None:
            shape = (*work.params["w1"].shape[:-2], order.shape[-1])
            orders = self._orders.setdefault(part.path, np.broadcast_to(np.arange(shape[-1]), shape).copy())
            orders.reshape(-1, shape[-1])[part.first : part.end] = order.reshape(-1, shape[-1])

    def _is_whole(self, part: Part) -> bool:
        return part.end - part.first == int(np.prod(self._work[part.path].params["w1"].shape[:-2]))

    def close(self) -> tuple[Any, Any, list[Any], list[Any]]:
        """The trees with the changed leaves, and the optimizers' states in the new order."""
        params, method, others, averages = self._given
        every = [path for path, _ in named.named_leaves(params)]
        weights: dict[Path, Weight] = {
            (*path, name): self._weight(path, name) for path in self._orders for name in self._work[path].params
        }
        moved = [named.permute(tree, weights, every) if weights else tree for tree in others]

        def back(tree: Any, work: dict[Path, dict[str, Any]]) -> Any:
            def new_value(path: Path, leaf: Any) -> Any:
                return (
                    self._turned(work[path[:-1]][path[-1]], path[-1], None)
                    if path[:-1] in work and path[-1] in work[path[:-1]]
                    else leaf
                )

            return named.map_named(new_value, tree)

        return (
            back(params, {path: work.params for path, work in self._work.items()}),
            back(method, {path: work.method for path, work in self._work.items()}),
            moved,
            [back(t, {path: work.averages[i] for path, work in self._work.items()}) for i, t in enumerate(averages)],
        )

    def _weight(self, path: Path, name: str) -> Weight:
        shape = self._work[path].params[name].shape
        own = 1 if name in _BIASES else 2
        stack = list(range(len(shape) - own))
        axes = list(range(len(shape)))  # where each axis of the leaf as it is comes from
        if stack and self._axes[name]:
            axes.insert(self._axes[name], axes.pop(0))
        neurons = len(shape) + NEURONS[name]
        at = tuple(axes.index(axis) for axis in stack)
        return Weight(tuple(shape[axis] for axis in axes), axes.index(neurons), at, self._orders[path])


def _pasted(whole: Any, part: Any, first: int) -> Any:
    if part.shape == whole.shape:
        return part
    if isinstance(whole, np.ndarray):
        return np.concatenate([whole[:first], part, whole[first + part.shape[0] :]])
    return jnp.concatenate([whole[:first], part, whole[first + part.shape[0] :]])


def _rows(memory: Any) -> np.ndarray | None:
    """The numbers of each layer, one a row; None where they are not at hand."""
    if memory is None or isinstance(memory, jax.core.Tracer):
        return None
    return named.on_host(memory).reshape(-1, memory_of_phase.LENGTH)
