"""What the runs of a sweep came to: one row a run, as JSON and as Markdown, from what the runs wrote themselves."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from train.config.settings import RunConfig
from train.model import decoder
from train.records.logger import summary
from train.records.metrics import read_metrics
from train.records.step_times import StepTimes
from train.state.run_info import read_starts
from venom_jax import Recipe, StackRecipe

Record = dict[str, Any]
Row = dict[str, Any]

_LENGTH = ("Train.steps", "Train.eval_every", "Train.checkpoint_every", "Train.diagnosis_every")
"""Options in which runs of one recipe may differ: how long it is, and how often it is looked at."""
_DIAGNOSED = ("dropped_features", "dropped_tokens", "kept_router", "kept_oracle")


@dataclass(frozen=True)
class Member:
    """A run of a sweep: its name, its seed, the run it is compared with, and where it is."""

    name: str
    seed: int
    twin: str | None
    workdir: Path
    config: RunConfig
    options: tuple[str, ...]  # gin files and bindings


@dataclass(frozen=True)
class Clock:
    """What tells the time: the runs' own seconds, unless they shared a GPU, and steps that were timed by themselves."""

    step_times: tuple[StepTimes, ...] = ()
    shared: bool = False


OWN_CLOCK = Clock()


def write_table(
    members: Sequence[Member], sweep: str, output: Path, clock: Clock = OWN_CLOCK, earlier: Sequence[Row] = ()
) -> str:
    """Writes OUTPUT/table.json and table.md of the runs that have ended; returns the Markdown."""
    rows = make_rows(members, sweep, clock, earlier)
    text = markdown(rows)
    _replace(output / "table.json", "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    _replace(output / "table.md", text)
    return text


def _replace(path: Path, text: str) -> None:
    rewritten = path.with_name(path.name + ".tmp")
    rewritten.write_text(text)
    rewritten.replace(path)


def read_table(path: str) -> list[Row]:
    """The rows of a table.json.

    Raises:
      ValueError: no such file, or another kind of file.
    """
    try:
        rows = json.loads(Path(path).read_text())
        if not all({"case", "seed", "options", "val_loss", "step_seconds"} <= row.keys() for row in rows):
            raise ValueError("rows without case, seed, options, val_loss, step_seconds")
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}; give a table.json of python -m train.sweep") from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no table.json of python -m train.sweep ({error})") from error
    return rows


def row_of(member: Member, rows: Sequence[Row]) -> Row | None:
    """The row of this very run: its name, its seed and its options, but for the folder of the data."""
    for row in rows:
        if (row["case"], row["seed"]) == (member.name, member.seed) and not other_options(member, row):
            return row | {"options": list(member.options)}
    return None


def other_options(member: Member, row: Row) -> str:
    """In what the run of a row had other options, but for the folder of the data; empty where in nothing."""

    def told(options: Sequence[str]) -> list[str]:
        return [option for option in options if not option.startswith("Data.folder")]

    there, here = told(row["options"]), told(member.options)
    if there == here:
        return ""
    sides = {"there": [o for o in there if o not in here], "here": [o for o in here if o not in there]}
    return "; ".join(f"{', '.join(own)} {side}" for side, own in sides.items() if own) or "in another order"


def make_rows(
    members: Sequence[Member], sweep: str, clock: Clock = OWN_CLOCK, earlier: Sequence[Row] = ()
) -> list[Row]:
    """A row for each run that has ended, here or, by the rows of an `earlier` table, elsewhere.

    val_loss, val_bits_per_byte: of the dense model at the end; val_loss_sparse: by the last phase's recipe.
    train_loss_last_100: mean training loss of the last 100 records, the paper's metric.
    difference, difference_train: these two minus the twin's of the same seed.
    sparse_share, operations: share of the steps that are sparse; operations executed, of the dense run's.
    tokens_per_second, seconds, step_seconds, time_to_twin: null where runs shared a GPU.
    seconds: measured, everything included; step_seconds: of the steps alone, at each phase's median speed.
    time_to_twin: step_seconds up to the first evaluation that reaches the twin's final loss, over the twin's
      step_seconds; null where it does not.
    steps_to_twin: steps in which the recipe, lengthened with its schedule, reaches the twin's final loss: between the
      longest run that does not and the shortest one that does, by a straight line; null where none reaches it. Runs
      that differ in their length only are one recipe's.
    twin_steps, twin_steps_train: the other way round, the steps in which the twin reaches this run's val_loss or
      train_loss_last_100: on a straight line over the logarithm of the steps, through the twin at the same seed, as
      steep as between runs of the twin of two lengths; null where there are none.
    step_times: for each model and GPU of `Clock.step_times`, named in `of`, the mean time of the run's steps over that
      of a dense step there, `step_time`, null where a recipe has not been timed; `time_to_twin`, steps_to_twin
      times that over the twin's steps; and `time_for_loss`, the run's steps times that over twin_steps: below 1 the
      recipe gets further in a given time.
    density and the diagnoses: at the end of the last routed phase, or the last sparse one where none routes;
    load_max, load_min: there, the fullest and emptiest expert of any layer over the fair share, mean of 100 records;
      load_bar: what load_max should not exceed; starved: share of these steps in which some expert got no token.
    jump: largest rise of the training loss within 20 steps of a change of phase, over the mean of 5 steps before.
    """
    found: dict[tuple[str, int], Row] = {}
    ran: dict[tuple[str, int], list[Record]] = {}
    for member in members:
        key, records = (member.name, member.seed), read_metrics(member.workdir)
        row = None
        if records and records[-1]["kind"] == "end":
            ran[key], row = records, _row(member, records)
        elif known := row_of(member, earlier):
            row = known
        if row is not None:
            found[key] = {"bench": f"sweep {sweep}", **row}
    rows = list(found.values())
    for member in members:
        key = (member.name, member.seed)
        if key not in found:
            continue
        twin = found.get((member.twin, member.seed)) if member.twin else None
        found[key] |= _against(member, found[key], ran.get(key), twin)
        found[key]["step_times"] = [
            {"of": f"{times.size} on {times.device}", "step_time": _rounded(times.of_run(member.config), 4)}
            for times in clock.step_times
        ]
    if clock.shared:
        for key in ran:
            found[key] |= dict.fromkeys(("tokens_per_second", "seconds", "step_seconds", "time_to_twin"))
    _add_steps_to_twin(rows)
    _add_twin_steps(rows)
    return rows


def recipe_of(row: Row) -> tuple[str, ...]:
    """The options of a row but its length: the same for the runs of one recipe."""
    return tuple(option for option in row["options"] if not option.startswith(_LENGTH))


def _add_twin_steps(rows: list[Row]) -> None:
    by_name = {(row["case"], row["seed"]): row for row in rows}
    for row in rows:
        twin = by_name.get((row["twin"], row["seed"]))
        for name, loss in (("twin_steps", "val_loss"), ("twin_steps_train", "train_loss_last_100")):
            row[name] = None
            if twin is None or recipe_of(row) == recipe_of(twin):
                continue
            steep = slope(rows, twin, loss)
            if steep is not None:
                row[name] = round(twin["steps"] * math.exp((twin[loss] - row[loss]) / steep))
        for times in row["step_times"]:
            known = times["step_time"] is not None and row["twin_steps"] is not None
            times["time_for_loss"] = (
                _rounded(times["step_time"] * row["steps"] / row["twin_steps"], 4) if known else None
            )


def slope(rows: Sequence[Row], of: Row, loss: str = "val_loss") -> float | None:
    """How much lower a recipe's loss gets where steps grow by a factor of e.

    From the two longest runs of each seed, the mean over the seeds; None where no seed has two lengths, or the longer
    one is no better.
    """
    found = []
    same = [row for row in rows if recipe_of(row) == recipe_of(of)]
    for seed in {row["seed"] for row in same}:
        losses: dict[int, list[float]] = {}
        for row in same:
            if row["seed"] == seed:
                losses.setdefault(row["steps"], []).append(row[loss])
        if len(losses) > 1:
            less, more = sorted(losses)[-2:]
            found.append((fmean(losses[less]) - fmean(losses[more])) / math.log(more / less))
    return fmean(found) if found and fmean(found) > 0 else None


def _add_steps_to_twin(rows: list[Row]) -> None:
    families: dict[Any, list[Row]] = {}
    for row in rows:
        if row["difference"] is not None:
            families.setdefault((recipe_of(row), row["seed"], row["twin"]), []).append(row)
    steps_of = {(row["case"], row["seed"]): row["steps"] for row in rows}
    for row in rows:
        row["steps_to_twin"] = None
        for times in row["step_times"]:
            times["time_to_twin"] = None
    for family in families.values():
        steps = crossing([(row["steps"], row["difference"]) for row in family])
        if steps is None:
            continue
        for row in family:
            row["steps_to_twin"] = round(steps)
            relative = steps / steps_of[row["twin"], row["seed"]]
            for times in row["step_times"]:
                if times["step_time"] is not None:
                    times["time_to_twin"] = _rounded(relative * times["step_time"], 4)


def crossing(points: Sequence[tuple[int, float]]) -> float | None:
    """Where differences by steps reach zero: the steps of the first that is not positive, or on the line before it."""
    points = sorted(points)
    first = next((i for i, (_, difference) in enumerate(points) if difference <= 0), None)
    if first is None:
        return None
    steps, difference = points[first]
    if first == 0:
        return float(steps)
    before, above = points[first - 1]
    return before + (steps - before) * above / (above - difference)


def _against(member: Member, row: Row, records: Sequence[Record] | None, twin: Row | None) -> Row:
    """A row's comparison with its twin's; time_to_twin only where the run's own records are here."""
    if twin is None:
        return {"twin": None, "difference": None, "difference_train": None, "time_to_twin": None}
    found: Row = {
        "twin": member.twin,
        "difference": round(row["val_loss"] - twin["val_loss"], 5),
        "difference_train": round(row["train_loss_last_100"] - twin["train_loss_last_100"], 5),
    }
    if records is not None:
        reached = [r["step"] for r in records if r["kind"] == "eval" and r["val_loss"] <= twin["val_loss"]]
        if reached and twin["step_seconds"]:
            found["time_to_twin"] = round(step_seconds(member, records, reached[0]) / twin["step_seconds"], 3)
    return found


def _row(member: Member, records: Sequence[Record]) -> Row:
    config, final = member.config, summary(member.workdir)
    start = read_starts(member.workdir)[-1]
    row = {"case": member.name, "seed": member.seed, "twin": None}
    row |= {name: round(final[name], 6) for name in ("val_loss", "val_bits_per_byte", "train_loss_last_100")}
    row |= {"val_loss_sparse": _rounded(final.get("val_loss_sparse"))}
    row |= {"difference": None, "difference_train": None, "time_to_twin": None}
    steps, share = config.train.steps, operations(config)
    ends = [phase.start for phase in config.schedule.phases[1:]] + [steps]
    spans = list(zip(config.schedule.phases, ends, strict=True))
    sparse = [(phase.start, end) for phase, end in spans if not phase.recipe.is_dense]
    routed = [(phase.start, end) for phase, end in spans if phase.recipe.routed]
    rates = [r["tokens_per_second"] for r in records if r["kind"] == "train"]
    row |= {
        "sparse_share": round(sum(end - begin for begin, end in sparse) / steps, 4),
        "operations": round(share, 4),
        "tokens_per_second": round(median(rates)),
        "seconds": round(final["seconds"], 1),
        "step_seconds": round(step_seconds(member, records), 3),
        **_sparse_figures(records, (routed or sparse or [(0, steps)])[-1]),
        "load_bar": load_bar([phase.recipe for phase in config.schedule.phases if phase.recipe.routed]),
        "jump": jump(records),
        "steps": steps,
        "phases": [[phase.start, phase.label] for phase in config.schedule.phases],
        "options": list(member.options),
        "implementation": config.train.implementation,
        "device": start["devices"],
        "jax": start["versions"].get("jax"),
        "commit": start["git"] and start["git"]["commit"] + ("+" if start["git"]["changed"] else ""),
        "date": start["time"][:10],
    }
    return row


def _rounded(value: float | None, digits: int = 5) -> float | None:
    return None if value is None else round(value, digits)


def step_seconds(member: Member, records: Sequence[Record], until: int | None = None) -> float:
    """Seconds of the first `until` steps alone, each taken at the median speed of its phase.

    Compilation, evaluations and checkpoints are left out, and so is what a busy machine adds to single steps.
    """
    train = member.config.train
    steps, phases = train.steps if until is None else until, member.config.schedule.phases
    ends = [phase.start for phase in phases[1:]] + [train.steps]
    total = 0.0
    for index, (phase, end) in enumerate(zip(phases, ends, strict=True)):
        count = min(end, steps) - phase.start
        rates = [r["tokens_per_second"] for r in records if r["kind"] == "train" and r["phase_index"] == index]
        if count > 0 and rates:
            total += count * train.batch_size * train.seq_len / median(rates)
    return total


def operations(config: RunConfig) -> float:
    """Floating-point operations of the whole run over those of the same steps dense."""
    train = config.train

    def flops(recipe: StackRecipe) -> float:
        return decoder.flops_per_token(config.model, train.seq_len, recipe)

    phases = config.schedule.phases
    ends = [phase.start for phase in phases[1:]] + [train.steps]
    executed = sum(flops(p.recipe) * (end - p.start) for p, end in zip(phases, ends, strict=True))
    return executed / (flops(Recipe.dense()) * train.steps)


def _sparse_figures(records: Sequence[Record], span: tuple[int, int]) -> Row:
    """Density, diagnoses and load near the end of the steps of `span`."""
    inside = [r for r in records if span[0] < r["step"] <= span[1]]
    train = [r for r in inside if r["kind"] == "train"][-100:]
    diagnoses = [r for r in inside if r["kind"] == "diagnosis"]
    routed = [r for r in train if r.get("load_mean")]
    row: Row = {"density": round(fmean(r["density"] for r in train), 4) if train else None}
    for name in _DIAGNOSED:
        shown = diagnoses and (routed or name.startswith("dropped"))
        row[name] = _rounded(diagnoses[-1].get(name), 4) if shown else None
    for name in ("load_max", "load_min"):
        row[name] = round(fmean(r[name] / r["load_mean"] for r in routed), 3) if routed else None
    row["starved"] = round(fmean(r["load_min"] == 0 for r in routed), 3) if routed else None
    return row


def load_bar(routed: Sequence[StackRecipe]) -> float | None:
    """What the fullest expert should not exceed, in fair shares, in the last of the routed phases."""
    if not routed:
        return None
    return 1.5 if routed[-1].experts <= 4 else 2.0


def jump(records: Sequence[Record]) -> float | None:
    """The largest rise of the training loss at a change of phase; None where no phase changes."""
    losses = {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
    rises = []
    for switch in (r["step"] for r in records if r["kind"] == "phase" and r["step"] > 0):
        before = [losses[step] for step in losses if switch - 5 < step <= switch]
        after = [losses[step] for step in losses if switch < step <= switch + 20]
        if before and after:
            rises.append(max(after) - fmean(before))
    return round(max(rises), 4) if rises else None


_LOSSES = {
    "sparse steps": ("sparse_share", "{:.0%}"),
    "operations": ("operations", "{:.0%}"),
    "validation loss": ("val_loss", "{:.4f}"),
    "by the last recipe": ("val_loss_sparse", "{:.4f}"),
    "bits per byte": ("val_bits_per_byte", "{:.4f}"),
    "against its twin": ("difference", "{:+.4f}"),
    "training loss, last 100": ("train_loss_last_100", "{:.4f}"),
    "against its twin's": ("difference_train", "{:+.4f}"),
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "seconds": ("seconds", "{:,.0f}"),
    "of the steps": ("step_seconds", "{:,.0f}"),
    "time to the twin's loss": ("time_to_twin", "{:.2f}"),
}
_CLOCK = {
    "steps": ("steps", "{:,}"),
    "against its twin": ("difference", "{:+.4f}"),
    "steps to the twin's loss": ("steps_to_twin", "{:,}"),
    "the twin's steps to this loss": ("twin_steps", "{:,}"),
    "to this training loss": ("twin_steps_train", "{:,}"),
}
_DIAGNOSES = {
    "density": ("density", "{:.1%}"),
    "dropped along neurons": ("dropped_features", "{:.2%}"),
    "dropped along tokens": ("dropped_tokens", "{:.2%}"),
    "kept by the router": ("kept_router", "{:.1%}"),
    "by the best choice": ("kept_oracle", "{:.1%}"),
    "fullest expert": ("load_max", "{:.2f}"),
    "bar": ("load_bar", "{:.1f}"),
    "emptiest": ("load_min", "{:.2f}"),
    "steps with one empty": ("starved", "{:.0%}"),
    "jump at a switch": ("jump", "{:+.3f}"),
}
_MEANS = {
    "validation loss": ("val_loss", "{:.4f}"),
    "against its twin": ("difference", "{:+.4f}"),
    "training loss, last 100": ("train_loss_last_100", "{:.4f}"),
    "against its twin's": ("difference_train", "{:+.4f}"),
}


def markdown(rows: Sequence[Row]) -> str:
    """Tables of losses, of diagnoses, of times by measured steps, and of means over the seeds with their scatter."""
    text = _table(rows, _LOSSES) + "\n" + _table(rows, _DIAGNOSES)
    if any(times["step_time"] is not None for row in rows for times in row["step_times"]):
        text += "\n" + _clock_table(rows)
    if len({row["seed"] for row in rows}) > 1:
        text += "\n" + _means(rows)
    return text


def _clock_table(rows: Sequence[Row]) -> str:
    columns, flat = dict(_CLOCK), [dict(row) for row in rows]
    for i, times in enumerate(rows[0]["step_times"]):
        size = times["of"].split(" on ")[0]
        for column, key in (
            ("a step", "step_time"),
            ("to the twin's loss", "time_to_twin"),
            ("for the loss", "time_for_loss"),
        ):
            columns[f"{column}, {size}"] = (f"{key} {i}", "{:.3f}")
            for row in flat:
                row[f"{key} {i}"] = row["step_times"][i][key]
    return _table(flat, columns)


def _table(rows: Sequence[Row], columns: dict[str, tuple[str, str]]) -> str:
    columns = {name: (key, form) for name, (key, form) in columns.items() if any(row[key] is not None for row in rows)}
    lines = [["run", "seed", *columns], ["---"] * (2 + len(columns))]
    for row in rows:
        cells = ["" if row[key] is None else form.format(row[key]) for key, form in columns.values()]
        lines.append([row["case"], str(row["seed"]), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def scatter(rows: Sequence[Row], loss: str = "val_loss") -> tuple[float, int] | None:
    """By how much a run's loss differs from itself: its standard deviation, and the degrees of freedom behind it.

    What is left of the losses of all recipes with several seeds when a value for each recipe and one for each seed
    are taken away, by least squares.  None where nothing is left over.
    """
    seeds: dict[str, int] = {}
    for row in rows:
        seeds[row["case"]] = seeds.get(row["case"], 0) + 1
    used = [row for row in rows if seeds[row["case"]] > 1]
    columns = [*dict.fromkeys(row["case"] for row in used), *dict.fromkeys(row["seed"] for row in used)]
    design = np.array([[name in (row["case"], row["seed"]) for name in columns] for row in used], float)
    if not used or len(used) == (rank := int(np.linalg.matrix_rank(design))):
        return None
    losses = np.array([row[loss] for row in used])
    residuals = losses - design @ np.linalg.lstsq(design, losses)[0]
    return float(np.sqrt(residuals @ residuals / (len(used) - rank))), len(used) - rank


def _means(rows: Sequence[Row]) -> str:
    lines = [["run", "seeds", *_MEANS], ["---"] * (2 + len(_MEANS))]
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        cells = []
        for key, form in _MEANS.values():
            values = [row[key] for row in own if row[key] is not None]
            spread = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
            cells.append(form.format(fmean(values)) + spread if values else "")
        lines.append([case, str(len(own)), *cells])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if (found := scatter(rows)) is not None:
        deviation, freedom = found
        text += (
            f"\nStandard deviation of a run's validation loss, without what recipe and seed explain: {deviation:.4f} "
            f"({freedom} degrees of freedom); of the difference of two runs: {deviation * math.sqrt(2):.4f}.\n"
        )
    return text
