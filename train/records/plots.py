"""Pictures of loss curves, of one run and of several: what `python -m train.plot` draws."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from train.records.metrics import METRICS_FILE, read_metrics

XAxis = Literal["step", "seconds"]
Record = dict[str, Any]
FIELDS: dict[str, str] = {"step": "step", "seconds": "time"}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind readers


@dataclass(frozen=True)
class Span:
    """A sparse phase as drawn: its label, and from where to where on the x axis."""

    label: str
    start: float
    end: float


def plot_run(workdir: str | Path, output: str | Path) -> None:
    """The loss curve of one run against steps, as an image file."""
    plot_runs([workdir], output)


def plot_runs(
    workdirs: Sequence[str | Path],
    output: str | Path,
    x: XAxis = "step",
    *,
    smooth: int | None = None,
    difference_to: str | Path | None = None,
) -> None:
    """The loss curves of several runs in one image; the suffix of `output` says which kind (.png, .svg, .pdf).

    Args:
      workdirs: folders of runs.
      output: the image file.
      x: the horizontal axis.
      smooth: steps that the rolling mean of the training loss goes over; None: 1 for one run and no difference, else
        about a fiftieth of the longest run.
      difference_to: draw the loss of the other runs minus that of this one, at the same x.

    Raises:
      ValueError: no runs, a folder without training metrics, an unknown axis or image kind, nothing to compare.
    """
    if x not in FIELDS:
        raise ValueError(f"x={x!r} must be one of {', '.join(FIELDS)}")
    if smooth is not None and smooth < 1:
        raise ValueError(f"smooth={smooth} must be at least 1 step")
    if not workdirs:
        raise ValueError("give at least one run to plot")
    runs = {path: _read(path) for path in map(Path, workdirs)}
    colors = {path: COLORS[i % len(COLORS)] for i, path in enumerate(runs)}  # the same with and without a difference
    reference = None if difference_to is None else Path(difference_to)
    if reference is not None:
        runs = {path: records for path, records in runs.items() if path.resolve() != reference.resolve()}
        if not runs:
            raise ValueError(f"difference_to={str(reference)!r}: give at least one other run to compare with it")
    only = len(runs) == 1
    if smooth is None:
        smooth = 1 if only and reference is None else smoothing_steps(runs.values())
    figure, axes = new_figure()
    names = dict(zip(runs, distinct_names(runs), strict=True))
    for i, (path, records) in enumerate(runs.items()):
        color = colors[path]
        if only:
            shade_phases(axes, records, x)
        else:
            _draw_phase_bars(axes, records, x, color, row=i)
        if reference is not None:
            axes.plot(*difference(records, _read(reference), smooth, x), color=color, linewidth=1.2, label=names[path])
        else:
            _draw_losses(axes, records, smooth, x, color, label=names[path], thin=only)
    what = "training loss" if reference is not None or smooth > 1 else "loss"
    mean = f", mean of the last {smooth} steps" if smooth > 1 else ""
    if reference is not None:
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set_ylabel(
            f"{what} minus that of {reference.name or reference} at the same {x[:6]}\n(nats per token{mean})"
        )
        _limit_to_settled(axes, [difference(records, _read(reference), smooth, x) for records in runs.values()])
    else:
        axes.set_ylabel(f"{what} (nats per token{mean})")
        _key_of_markers(axes, runs.values())
        if not only:
            _limit_to_settled(axes, [smoothed(records, smooth, x) for records in runs.values()])
    axes.set_xlabel(x if only else f"{x} (bars: sparse phases)")
    axes.legend(loc="upper right", fontsize="small" if len(runs) > 3 else None)
    save(figure, output)


def plot_pareto(workdirs: Sequence[str | Path], output: str | Path, x: XAxis = "seconds") -> None:
    """The last validation loss of several runs over what each took, and the front of those that none beats in both.

    Args:
      workdirs: folders of runs.
      output: the image file.
      x: what a run took: measured seconds, from its start to that evaluation, or steps.

    Raises:
      ValueError: no runs, a folder without metrics or without an evaluation, an unknown axis or image kind.
    """
    if x not in FIELDS:
        raise ValueError(f"x={x!r} must be one of {', '.join(FIELDS)}")
    if not workdirs:
        raise ValueError("give at least one run to plot")
    runs = list(dict.fromkeys(map(Path, workdirs)))
    last = []
    for path in runs:
        taken, losses = points(_read(path), "eval", "val_loss", x)
        if not len(losses):
            raise ValueError(f"{path} has no evaluation yet: its place on the front is not known")
        last.append((float(taken[-1]), float(losses[-1])))
    figure, axes = new_figure()
    front = pareto_front(last)
    axes.plot(*zip(*(last[i] for i in front), strict=True), color="0.3", linewidth=1, label="none is better in both")
    for i, (name, (taken, loss)) in enumerate(zip(distinct_names(runs), last, strict=True)):
        color = COLORS[0] if i in front else COLORS[1]
        axes.plot([taken], [loss], marker="o", linewidth=0, color=color, markeredgecolor="white")
        axes.annotate(name, (taken, loss), xytext=(5, 4), textcoords="offset points", fontsize="small", color=color)
    axes.margins(x=0.12)
    axes.set_xlabel("seconds, measured" if x == "seconds" else "steps")
    axes.set_ylabel("validation loss of the dense model\n(nats per token)")
    axes.legend(loc="best")
    save(figure, output)


def pareto_front(runs: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that no other beats in both, by cost; of equal points the first."""
    front: list[int] = []
    for i in sorted(range(len(runs)), key=lambda i: (*runs[i], i)):
        if not front or runs[i][1] < runs[front[-1]][1]:
            front.append(i)
    return front


def _read(workdir: Path) -> list[Record]:
    records = read_metrics(workdir)
    if not any(r["kind"] == "train" for r in records):
        raise ValueError(f"{workdir / METRICS_FILE} holds no training loss: is {workdir} the folder of a run?")
    return records


def points(records: Sequence[Record], kind: str, value: str, x: XAxis = "step") -> tuple[np.ndarray, np.ndarray]:
    """x and y of the records of one kind that have `value`."""
    chosen = [r for r in records if r["kind"] == kind and value in r]
    return np.array([r[FIELDS[x]] for r in chosen], float), np.array([r[value] for r in chosen], float)


def smoothed(records: Sequence[Record], steps: int, x: XAxis = "step") -> tuple[np.ndarray, np.ndarray]:
    """x, and the mean of the training loss over the last `steps` steps (fewer at the start)."""
    at, _ = points(records, "train", "loss")
    xs, losses = points(records, "train", "loss", x)
    first = np.searchsorted(at, at - steps, side="right")
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    last = np.arange(1, len(losses) + 1)
    return xs, (sums[last] - sums[first]) / (last - first)


def smoothing_steps(runs: Iterable[Sequence[Record]]) -> int:
    """About a fiftieth of the longest run: 1, 2 or 5 times a power of ten."""
    longest = max(r["step"] for records in runs for r in records) / 50
    if longest <= 1:
        return 1
    power = 10 ** math.floor(math.log10(longest))
    return power * max(digit for digit in (1, 2, 5) if digit * power <= longest)


def difference(
    records: Sequence[Record], reference: Sequence[Record], smooth: int, x: XAxis = "step"
) -> tuple[np.ndarray, np.ndarray]:
    """x and the smoothed loss minus that of `reference` at the same x, as far as both runs go."""
    (xs, losses), (other_xs, other_losses) = (smoothed(r, smooth, x) for r in (records, reference))
    both = (xs >= other_xs[0]) & (xs <= other_xs[-1])
    return xs[both], losses[both] - np.interp(xs[both], other_xs, other_losses)


def sparse_spans(records: Sequence[Record], x: XAxis = "step") -> list[Span]:
    """The sparse phases of a run in order.

    A phase lasts from the record that announces it to the next one's, or to the last record of the run.
    """
    field = FIELDS[x]
    switches = [r for r in records if r["kind"] == "phase"]
    end = max((r[field] for r in records), default=0)
    borders = [r[field] for r in switches] + [end]
    return [Span(r["phase"], borders[i], borders[i + 1]) for i, r in enumerate(switches) if r["phase"] != "dense"]


def distinct_names(workdirs: Collection[Path]) -> list[str]:
    """The last parts of the paths, with as many parents as it takes to tell them apart."""
    parts = [path.parts or (str(path),) for path in workdirs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in workdirs]


def new_figure(rows: int = 1, height: float = 5) -> tuple[Figure, Any]:
    """A figure for files, and its axes (an array of them where there are several rows)."""
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, sharex=True)
    for one in np.atleast_1d(axes):
        one.grid(alpha=0.3)
        one.margins(x=0.01)
    return figure, axes


def save(figure: Figure, output: str | Path) -> None:
    """Writes the image.  Raises ValueError where it cannot."""
    try:
        figure.savefig(output, dpi=120)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error}") from error


def shade_phases(axes: Axes, records: Sequence[Record], x: XAxis = "step", *, label: bool = True) -> None:
    """Grey over the sparse phases, with their names."""
    for span in sparse_spans(records, x):
        axes.axvspan(span.start, span.end, color="0.5", alpha=0.15, linewidth=0)
        if label:
            middle = (span.start + span.end) / 2
            place = axes.get_xaxis_transform()
            axes.text(middle, 0.97, span.label, transform=place, ha="center", va="top", color="0.3")


def _draw_phase_bars(axes: Axes, records: Sequence[Record], x: XAxis, color: str, row: int) -> None:
    for span in sparse_spans(records, x):
        height = 0.012 * (row + 1)
        place = axes.get_xaxis_transform()
        axes.plot(
            [span.start, span.end], [height] * 2, transform=place, color=color, linewidth=3, solid_capstyle="butt"
        )


def _draw_losses(
    axes: Axes, records: Sequence[Record], smooth: int, x: XAxis, color: str, *, label: str, thin: bool
) -> None:
    axes.plot(*smoothed(records, smooth, x), color=color, linewidth=1 if thin else 1.2, alpha=0.8, label=label)
    markers = {"marker": "o", "markersize": 5, "linewidth": 0, "color": color}
    axes.plot(*points(records, "eval", "val_loss", x), **markers, markeredgecolor="white", markeredgewidth=0.5)
    axes.plot(*points(records, "eval", "val_loss_sparse", x), **markers, markerfacecolor="none")


def _key_of_markers(axes: Axes, runs: Iterable[Sequence[Record]]) -> None:
    """Legend entries that hold for every run."""
    records = [r for run in runs for r in run if r["kind"] == "eval"]
    markers = {"marker": "o", "markersize": 5, "linewidth": 0, "color": "0.3"}
    if records:
        axes.add_line(Line2D([], [], **markers, markeredgecolor="white", label="validation, dense model"))
    if any("val_loss_sparse" in r for r in records):
        axes.add_line(Line2D([], [], **markers, markerfacecolor="none", label="validation, sparse model"))


def _limit_to_settled(axes: Axes, curves: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Leaves out the first fall, in which all runs are one line, so that their differences can be seen."""
    end = max((xs[-1] for xs, _ in curves if len(xs)), default=0)
    settled = np.concatenate([ys[xs >= 0.05 * end] for xs, ys in curves])
    if len(settled) and np.ptp(settled) > 0:
        height = np.ptp(settled)
        below = 0.05 + 0.015 * len(curves)  # room for the bars of the phases
        axes.set_ylim(settled.min() - below * height, settled.max() + 0.1 * height)
