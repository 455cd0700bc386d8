"""The documentation's figures, drawn from results and configurations: what `python -m train.figures` writes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from train.config.settings import load_config
from train.model import decoder
from train.records.plots import COLORS, new_figure, pareto_front
from train.records.trace import COMMUNICATION, IDLE, OTHER, PARTS
from train.sweeps.table import slope
from venom_jax import Recipe

SIZES = ("40m", "125m", "1b", "7b")
RECIPES = {"act24": Recipe.act24(), "all24": Recipe.all24(), "venom E=4 k=1": Recipe.venom(4, 1)}
_GROUPED = re.compile(r"E=(?P<experts>\d+) D=(?P<d_model>\d+) F=\d+ mode=(?P<mode>\w+) sizes=equal")

LINEAR = 0.02
"""Differences of the loss below this are drawn to scale, larger ones by their logarithm."""
LETTER, LINE = 5.5, 10.0
"""Pixels that a letter of a name in front.svg takes across, and a line of them down."""

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The benchmark's rows against dense products.

    Raises:
      ValueError: no such file, or none in it.
    """
    try:
        rows = [row for row in json.loads(path.read_text()) if row["rival"] == "dense"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of python -m pallas_kernels.bench ({error})") from error
    if not rows:
        raise ValueError(f"{path} holds no comparison with dense products")
    return rows


def draw_operations(output: Path) -> None:
    """Shares of the operations of a dense step, and the operations of a sparse step of each recipe, by size."""
    figure, axes = new_figure()
    places, bottom = np.arange(len(SIZES)), np.zeros(len(SIZES))
    configs = [load_config([f"configs/size/{size}.gin"], ["Data.synthetic = True"]) for size in SIZES]
    parts = [decoder.component_flops(config.model, config.train.seq_len) for config in configs]
    for name, color in zip(("ffn", "projections", "attention", "head"), COLORS, strict=False):
        share = np.array([100 * part[name] / sum(part.values()) for part in parts])
        axes.bar(places, share, 0.5, bottom, color=color, label=name)
        bottom += share
    for marker, (name, recipe) in zip("o^s", RECIPES.items(), strict=True):
        left = [
            100 * decoder.flops_per_token(config.model, config.train.seq_len, recipe) / sum(part.values())
            for config, part in zip(configs, parts, strict=True)
        ]
        axes.plot(places, left, marker, color="black", markerfacecolor="white", label=f"executed by {name}")
    axes.set_xticks(places, [f"{s}, S={c.train.seq_len:,}" for s, c in zip(SIZES, configs, strict=True)])
    axes.set_ylabel("share of a dense step's operations (%)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    _save(figure, output)


def draw_products(rows: Sequence[Row], output: Path) -> None:
    """Speed of the 2:4 products over dense ones of the same shape, B row-major or column-major."""
    found = [row for row in rows if row["bench"] == "sparse24" and "out=" not in row["case"]]
    shapes = list(dict.fromkeys(row["case"].split()[0] for row in found))
    figure, axes = new_figure()
    for i, layout in enumerate(("nmajor", "kmajor")):
        speed = {row["case"].split()[0]: row["speedup"] for row in found if row["case"].endswith(f"b={layout}")}
        values = [speed.get(shape, np.nan) for shape in shapes]
        axes.bar(np.arange(len(shapes)) + 0.4 * i - 0.2, values, 0.38, color=COLORS[i], label=f"B {layout}")
    _against_dense(axes, rows)
    axes.set_xticks(np.arange(len(shapes)), shapes, fontsize="small")
    axes.set_xlabel("m x n x k")
    _save(figure, output)


def draw_routed(rows: Sequence[Row], output: Path) -> None:
    """Speed of one expert a token over the dense product of the same tokens, over the number of experts."""
    curves: dict[tuple[int, str], dict[int, float]] = {}
    for row in rows:
        if row["bench"] == "grouped24" and (case := _GROUPED.fullmatch(row["case"])):
            curve = curves.setdefault((int(case["d_model"]), case["mode"]), {})
            curve[int(case["experts"])] = row["speedup"]
    figure, axes = new_figure()
    modes = list(dict.fromkeys(mode for _, mode in curves))
    widths = list(dict.fromkeys(d_model for d_model, _ in curves))
    for (d_model, mode), curve in curves.items():
        style = {"color": COLORS[widths.index(d_model)], "marker": "o^s"[modes.index(mode)]}
        axes.plot(*zip(*sorted(curve.items()), strict=True), **style, label=f"D={d_model}, {mode}")
    experts = sorted({count for curve in curves.values() for count in curve})
    axes.plot(experts, [2 * count for count in experts], color="0.6", linestyle="--", label="2 E: operations skipped")
    _against_dense(axes, rows)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(experts, [f"E={count}\n64:2:{4 * count}" for count in experts])
    axes.yaxis.set_major_formatter("{x:g}")
    _save(figure, output)


def read_sweep(path: Path) -> list[Row]:
    """The rows of a sweep whose steps were timed.

    Raises:
      ValueError: no such file, or none in it.
    """
    try:
        rows = [row for row in json.loads(path.read_text()) if any(t["step_time"] for t in row["step_times"])]
        rows = [row for row in rows if row["twin"] is None or row["difference"] is not None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of python -m train.sweep ({error})") from error
    if not any(row["twin"] for row in rows):
        raise ValueError(f"{path} holds no run with a time; give train.sweep --step_times")
    return rows


def draw_front(rows: Sequence[Row], output: Path) -> None:
    """Loss against the twin's over the run's time of the twin's, for each model whose steps were timed.

    Means over the seeds, the front of those that none beats in both, and, where the twin was run in two lengths, what
    it loses with fewer steps: below that line a recipe wins.  Off the front, a dot whose name would lie over another's
    has none.
    """
    models = [[row | times for row in rows if (times := row["step_times"][i])["step_time"]] for i in _models(rows)]
    figure, axes = new_figure(len(models), height=5 * len(models))
    for timed, one in zip(models, np.atleast_1d(axes), strict=True):
        _draw_front(timed, one)
        one.set_title(f"times of {timed[0]['of']}", fontsize="small", loc="left")
        one.tick_params(labelbottom=True)
    _save(figure, output)


def _models(rows: Sequence[Row]) -> list[int]:
    """Those for which a run that has a twin was timed."""
    found = range(len(rows[0]["step_times"]))
    return [i for i in found if any(row["twin"] and row["step_times"][i]["step_time"] for row in rows)]


def _draw_front(rows: Sequence[Row], axes: Any) -> None:
    twins = {(row["case"], row["seed"]): row for row in rows if row["twin"] is None}
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        twin = twins.get((row["twin"], row["seed"]))
        if twin is not None:
            time = row["steps"] * row["step_time"] / (twin["steps"] * twin["step_time"])
            found.setdefault(row["case"], []).append((time, row["difference"]))
    names = [*found, *dict.fromkeys(row["twin"] for row in rows if row["twin"])]
    dots = [(fmean(t for t, _ in runs), fmean(d for _, d in runs)) for runs in found.values()]
    dots += [(1.0, 0.0)] * (len(names) - len(dots))
    front = pareto_front(dots)
    axes.plot(*zip(*(dots[i] for i in front), strict=True), color="0.3", linewidth=1, label="none is better in both")
    for i, dot in enumerate(dots):
        color = COLORS[0 if i in front else 1]
        axes.plot(*dot, marker="o", linewidth=0, color=color, markeredgecolor="white")
    twin = twins[next((row["twin"], row["seed"]) for row in rows if (row["twin"], row["seed"]) in twins)]
    if (steep := slope(rows, twin)) is not None:
        axis = np.linspace(min(time for time, _ in dots), 1, 200)
        axes.plot(axis, -steep * np.log(axis), color="0.6", linestyle="--", label=f"{twin['case']}, fewer steps")
    axes.set_yscale("symlog", linthresh=LINEAR)
    axes.yaxis.set_major_formatter("{x:+g}")
    axes.margins(x=0.12)
    axes.get_xlim(), axes.get_ylim()  # brings the limits, and with them the pixels, up to date
    named: list[tuple[float, float, float]] = []
    for i in sorted(range(len(dots)), key=lambda i: i not in front):
        place, side = ((-5, -5), "right") if i in front else ((5, 2), "left")
        x, y = axes.transData.transform(dots[i])
        left, right = (x - LETTER * len(names[i]), x) if i in front else (x, x + LETTER * len(names[i]))
        if i in front or all(right < start or left > end or abs(y - at) > LINE for start, end, at in named):
            axes.annotate(names[i], dots[i], xytext=place, textcoords="offset points", ha=side, fontsize="x-small")
            named.append((left, right, y))
    axes.set_xlabel("time of the steps, of the dense run's")
    axes.set_ylabel("validation loss against the dense run (nats per token)")
    axes.legend(fontsize="small")


def read_steps(path: Path) -> list[Row]:
    """The rows of whole steps that say where their time went.

    Raises:
      ValueError: no such file, or none in it.
    """
    try:
        rows = [row for row in json.loads(path.read_text()) if row["bench"] == "train_step" and row.get("part_ms")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of python -m train.bench ({error})") from error
    if not rows:
        raise ValueError(f"{path} holds no part_ms; run python -m train.bench with --parts on a GPU")
    return rows


def draw_steps(rows: Sequence[Row], output: Path) -> None:
    """A bar for each recipe: milliseconds of a step, by part."""
    figure, axes = new_figure()
    places, bottom = np.arange(len(rows)), np.zeros(len(rows))
    parts = (*PARTS, COMMUNICATION, OTHER, IDLE)
    for part, color in zip(parts, [*COLORS, "0.6", "0.88"], strict=True):
        ms = np.array([row["part_ms"].get(part, 0.0) for row in rows])
        if ms.any():
            axes.bar(places, ms, 0.6, bottom, color=color, label=part)
        bottom += ms
    for place, height in zip(places, bottom, strict=True):
        axes.annotate(f"{height:.0f}", (place, height), ha="center", va="bottom", fontsize="small")
    axes.set_xticks(places, [row["case"].replace(" ", "\n", 2) for row in rows], fontsize="small")
    axes.set_ylabel("time of a step (ms)")
    axes.set_title(f"{rows[0]['device']}, jax {rows[0]['jax']}, {rows[0]['date']}", fontsize="small", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    _save(figure, output)


def _against_dense(axes: Any, rows: Sequence[Row]) -> None:
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set_ylabel("speed over the dense product")
    axes.set_title(f"{rows[0]['device']}, jax {rows[0]['jax']}, {rows[0]['date']}", fontsize="small", loc="left")
    axes.legend(fontsize="small")


def _save(figure: Figure, output: Path) -> None:
    try:
        figure.savefig(output, metadata={"Date": None})  # the same input gives the same file
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error}") from error


def draw_all(kernels: Path, output: Path, sweep: Path | None = None, steps: Path | None = None) -> list[Path]:
    """Writes the figures into a folder.

    Raises:
      ValueError: `kernels` or `steps` is no table of its benchmark, `sweep` none of a sweep, or the folder cannot be
        written.
    """
    rows, runs = read_rows(kernels), None if sweep is None else read_sweep(sweep)
    timed = None if steps is None else read_steps(steps)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {output}: {error}") from error
    paths = [output / f"{name}.svg" for name in ("operations", "products", "routed")]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "venom-jax"}):
        draw_operations(paths[0])
        draw_products(rows, paths[1])
        draw_routed(rows, paths[2])
        if runs is not None:
            paths.append(output / "front.svg")
            draw_front(runs, paths[-1])
        if timed is not None:
            paths.append(output / "steps.svg")
            draw_steps(timed, paths[-1])
    return paths
