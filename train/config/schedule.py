"""Phases: which recipe runs at which optimizer step."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from venom_jax import LayerRecipes, StackRecipe

type Entry = tuple[int | float, str | None, StackRecipe]
"""Start, name or None, recipe; a start as a float is a fraction of the run's steps."""


def resolve_step(value: int | float, steps: int, name: str, *, of: str = "Train.steps") -> int:
    """A step as given, or a fraction in (0, 1) of ``steps`` rounded to the nearest step.

    of: what ``steps`` is, for the message.
    """
    if isinstance(value, float):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value!r} as a float is a fraction of {of} and must lie in (0, 1)")
        return round(value * steps)
    if not 0 <= value <= steps:
        raise ValueError(f"{name}={value} must lie between 0 and {of}={steps}")
    return value


def label(name: str | None, recipe: StackRecipe) -> str:
    """Short name of a phase for logs and plots, such as ``venom E=4 k=1 fp8``; with the layer where each part starts.

    name: of the recipe, or of each part's with slashes between; where these are not as many, parts have none.
    """
    if isinstance(recipe, LayerRecipes):
        names = (name.split("/") if "/" in name else [name] * len(recipe.starts)) if name else []
        names = names if len(names) == len(recipe.starts) else [None] * len(recipe.starts)
        parts = [(first, label(own, part)) for own, (first, part) in zip(names, recipe.starts, strict=True)]
        return ", ".join(f"{what} from layer {first}" if first else what for first, what in parts)
    if name is None and recipe.is_dense:
        name = "dense"
    elif name is None:
        parts = ["act24"] if recipe.activations else []
        parts = [*parts, "w24"] if recipe.weights else parts
        name = "+".join(parts) or "routed"
    name = f"{name} E={recipe.experts} k={recipe.top_k}" if recipe.routed else name
    return f"{name} fp8" if recipe.in_fp8 else name


@dataclass(frozen=True)
class Phase:
    start: int  # optimizer steps completed when it begins
    label: str
    recipe: StackRecipe


@dataclass(frozen=True)
class PhaseSchedule:
    """Phases in order of their start; ``recipes`` are the distinct ones, in order of first use."""

    phases: tuple[Phase, ...]

    @classmethod
    def build(cls, entries: Sequence[Entry], steps: int) -> "PhaseSchedule":
        """Entries are (start, name or None, recipe); a start may be a fraction of ``steps``."""
        phases = tuple(
            Phase(resolve_step(start, steps, "a start in Phases.schedule"), label(name, recipe), recipe)
            for start, name, recipe in entries
        )
        starts = [phase.start for phase in phases]
        if starts[0] != 0:
            raise ValueError(f"Phases.schedule starts at step {starts[0]}; its first phase must start at 0")
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise ValueError(f"Phases.schedule has the starts {starts}; they must increase")
        if starts[-1] >= steps:
            raise ValueError(
                f"Phases.schedule has a phase at step {starts[-1]} but Train.steps={steps}: it would never run"
            )
        return cls(phases)

    @property
    def recipes(self) -> tuple[StackRecipe, ...]:
        return tuple(dict.fromkeys(phase.recipe for phase in self.phases))

    @property
    def branches(self) -> tuple[int, ...]:
        """Index into ``recipes`` of each phase."""
        return tuple(self.recipes.index(phase.recipe) for phase in self.phases)

    @property
    def reroutings(self) -> tuple[int, ...]:
        """Steps at which experts or top_k of any layer change."""
        return tuple(
            after.start for before, after in pairwise(self.phases) if _routing(before.recipe) != _routing(after.recipe)
        )

    def index_at(self, step: int) -> int:
        """Index of the phase that the optimizer step number ``step`` (from 0) belongs to."""
        return max(i for i, phase in enumerate(self.phases) if phase.start <= step)

    def is_dense_from(self, index: int) -> bool:
        """Whether no phase from ``index`` on is sparse."""
        return all(phase.recipe.is_dense for phase in self.phases[index:])


def _routing(recipe: StackRecipe) -> list[tuple[int, int, int]]:
    """(first layer, experts, top_k) of each part that differs in them from the one before."""
    starts = recipe.starts if isinstance(recipe, LayerRecipes) else ((0, recipe),)
    parts = [(first, part.experts, part.top_k) for first, part in starts]
    return parts[:1] + [after for before, after in pairwise(parts) if after[1:] != before[1:]]
