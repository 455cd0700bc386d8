"""Which layers run in eight bits, and when: what ``Train.precision`` and its options make of a schedule.

A recipe says its own precision (`venom_jax.Recipe.precision`). In a schedule a name may carry it, ``act24@fp8`` or
``dense@compute``; other recipes take that of the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from train.config.schedule import Entry, resolve_step
from venom_jax import LayerRecipes, Recipe, StackRecipe
from venom_jax.pattern import Precision

COMPUTE, FP8 = PRECISIONS = get_args(Precision)


def split_precision(name: str) -> tuple[str, Any]:
    """'act24@fp8' -> ('act24', 'fp8'); without a precision ('act24', None).

    Raises:
      ValueError: another precision.
    """
    scope, mark, precision = name.partition("@")
    if mark and precision not in PRECISIONS:
        raise ValueError(f"{name!r} has the precision {precision!r}; the precisions are {', '.join(PRECISIONS)}")
    return scope, precision if mark else None


def in_precision(recipe: StackRecipe, precision: Any) -> StackRecipe:
    """The same recipe, in every layer with operands of that precision."""
    if isinstance(recipe, LayerRecipes):
        return _joined([(first, replace(part, precision=precision)) for first, part in recipe.starts])
    return replace(recipe, precision=precision)


def _joined(starts: Sequence[tuple[int, Recipe]]) -> StackRecipe:
    """One recipe where all parts have the same."""
    found = [own for i, own in enumerate(starts) if i == 0 or own[1] != starts[i - 1][1]]
    return found[0][1] if len(found) == 1 else LayerRecipes(tuple(found))


def uses_fp8(recipe: StackRecipe) -> bool:
    """Whether any layer has products of eight bits."""
    parts = [part for _, part in recipe.starts] if isinstance(recipe, LayerRecipes) else [recipe]
    return any(part.in_fp8 for part in parts)


def without_edges(recipe: StackRecipe, layers: int, edges: int) -> StackRecipe:
    """The recipe with so many first and so many last layers in the compute dtype.

    Raises:
      ValueError: no layer would be left between them.
    """
    if not edges or not uses_fp8(recipe):
        return recipe
    if 2 * edges >= layers:
        raise ValueError(
            f"Train.fp8_edges={edges} leaves no layer of Model.layers={layers} in eight bits; use a smaller one, or "
            f"Train.precision={COMPUTE!r}"
        )
    parts = recipe.parts(layers)
    firsts = sorted({edges, layers - edges, *(first for first, _, _ in parts)})
    found: list[tuple[int, Recipe]] = []
    for first in firsts:
        part = next(part for start, end, part in parts if start <= first < end)
        inner = edges <= first < layers - edges
        found.append((first, part if inner else replace(part, precision=COMPUTE)))
    return _joined(found)


def with_end(entries: Sequence[Entry], until: int | float | None, steps: int) -> list[Entry]:
    """The entries, and from step ``until`` on all of them in the compute dtype."""
    if until is None:
        return list(entries)
    end = resolve_step(until, steps, "Train.fp8_until")
    starts = [resolve_step(start, steps, "a start in Phases.schedule") for start, _, _ in entries]
    found: list[Entry] = []
    for i, (start, (_, name, recipe)) in enumerate(zip(starts, entries, strict=True)):
        plain = in_precision(recipe, COMPUTE)
        following = starts[i + 1] if i + 1 < len(starts) else steps
        if start < end:
            found.append((start, name, recipe))
        if start >= end or (end < following and uses_fp8(recipe)):
            found.append((max(start, end), name, plain))
    return found


@dataclass(frozen=True)
class RunPrecision:
    """What a run says of its precision: ``Train.precision``, ``Train.fp8_edges`` and ``Train.fp8_until``."""

    precision: str = COMPUTE
    edges: int = 0
    until: int | float | None = None

    def apply(self, recipe: Recipe, what: str | Recipe) -> Recipe:
        """The recipe that a schedule calls ``what``, in the run's precision unless its name says another."""
        named = isinstance(what, str) and split_precision(what)[1] is not None
        return recipe if named or self.precision == COMPUTE else replace(recipe, precision=FP8)

    def schedule(self, entries: Sequence[Entry], steps: int, layers: int) -> list[Entry]:
        """The entries with edges and end in the compute dtype."""
        inner = [(start, name, without_edges(recipe, layers, self.edges)) for start, name, recipe in entries]
        return with_end(inner, self.until, steps)
