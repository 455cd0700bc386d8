"""Times of steps from `train.bench`, for runs whose own seconds say nothing because they shared a GPU."""

import json
from dataclasses import dataclass
from pathlib import Path

from train.config.schedule import label
from train.config.settings import RunConfig
from venom_jax import Recipe, StackRecipe

_COSTLY = ("weights", "weight_mask", "activations", "wgrad", "hidden", "token_order", "token_blocks", "token_copy")
"""Fields of a recipe on which the time of a step depends beside its experts and its precision."""


@dataclass(frozen=True)
class StepTimes:
    """Time of a step by recipe, over that of a dense step of the same model and in the same race."""

    source: str
    """The file."""
    size: str
    """The model that was timed, such as 1b."""
    device: str
    ratios: dict[str, float]
    """By the name of the recipe, see `bench_name`."""

    def of_step(self, recipe: StackRecipe, layers: int) -> float | None:
        """A step's time over a dense one's; None where a recipe of it has not been timed.

        A step in which layers differ takes the mean of its layers' recipes, each with its number of layers: all of a
        step that depends on the recipe is a sum over layers.
        """
        total = 0.0
        for first, end, part in recipe.parts(layers):
            ratio = self.ratios.get(bench_name(part) or "")
            if ratio is None:
                return None
            total += ratio * (end - first)
        return total / layers

    def of_run(self, config: RunConfig) -> float | None:
        """Mean over the steps of a run."""
        phases, steps = config.schedule.phases, config.train.steps
        ends = [phase.start for phase in phases[1:]] + [steps]
        total = 0.0
        for phase, end in zip(phases, ends, strict=True):
            ratio = self.of_step(phase.recipe, config.model.layers)
            if ratio is None:
                return None
            total += ratio * (end - phase.start)
        return total / steps


def bench_name(recipe: Recipe) -> str | None:
    """What `train.bench` calls a recipe that costs the same time, such as 'act24 E=4 k=2'; None if it has no name.

    Which neurons make an expert, and whether one is shared or balanced, costs next to nothing.
    """
    for name in ("dense", "act24", "all24"):
        preset = Recipe.preset(name)
        if all(getattr(recipe, field) == getattr(preset, field) for field in _COSTLY):
            return label("venom" if name == "all24" and recipe.routed else name, recipe)
    return None


def read_step_times(text: str) -> StepTimes:
    """The rows of one model in a file of `train.bench`: FILE, or FILE@SIZE where it has several.

    Raises:
      ValueError: no such file, no rows of steps in it, or no such model.
    """
    name, _, size = text.partition("@")
    try:
        rows = [row for row in json.loads(Path(name).read_text()) if row["bench"] == "train_step"]
        cases = [row["case"].split(" ", 1) for row in rows]
        ratios = [row["ms"] / row["rival_ms"] for row in rows]
        sizes = list(dict.fromkeys(case[0] for case in cases))
        found = {case[1]: ratio for case, ratio in zip(cases, ratios, strict=True) if case[0] == (size or sizes[0])}
        device = rows[0]["device"]
    except (OSError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{name} is no result of python -m train.bench ({error})") from error
    if not found or (len(sizes) > 1 and not size):
        raise ValueError(f"{name} has steps of {', '.join(sizes)}; name one of them: {name}@{sizes[0]}")
    return StepTimes(name, size or sizes[0], device, found)
