"""Loss curves of one or more runs: `python -m train.plot runs/a runs/b --output=loss.png [--x=seconds]`.

A line a run for the training loss, dots for the validation loss of the dense model, rings for that of the sparse
one inside a sparse phase; sparse phases are shaded and labelled.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from absl import app, flags
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.metrics import METRICS_FILE, read_metrics

XAxis = Literal["step", "seconds"]
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


def plot_runs(workdirs: Sequence[str | Path], output: str | Path, x: XAxis = "step") -> None:
    """The loss curves of several runs in one image; the suffix of `output` says which kind (.png, .svg, .pdf).

    Raises:
      ValueError: no runs, a folder without training metrics, an unknown axis or image kind.
    """
    if x not in FIELDS:
        raise ValueError(f"x={x!r} must be one of {', '.join(FIELDS)}")
    if not workdirs:
        raise ValueError("give at least one run to plot")
    runs = {Path(workdir): read_metrics(Path(workdir)) for workdir in workdirs}
    for workdir, records in runs.items():
        if not any(r["kind"] == "train" for r in records):
            raise ValueError(f"{workdir / METRICS_FILE} holds no training loss: is {workdir} the folder of a run?")
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (workdir, records), color in zip(runs.items(), COLORS * len(runs), strict=False):
        _draw_run(axes, records, workdir.name or str(workdir), x, color, only=len(runs) == 1)
    axes.set_xlabel(x)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    axes.margins(x=0.01)
    try:
        figure.savefig(output, dpi=120)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error}") from error


def sparse_spans(records: Sequence[dict[str, Any]], x: XAxis = "step") -> list[Span]:
    """The sparse phases of a run in order.

    A phase lasts from the record that announces it to the next one's, or to the last record of the run.
    """
    field = FIELDS[x]
    switches = [r for r in records if r["kind"] == "phase"]
    end = max((r[field] for r in records), default=0)
    borders = [r[field] for r in switches] + [end]
    return [Span(r["phase"], borders[i], borders[i + 1]) for i, r in enumerate(switches) if r["phase"] != "dense"]


def _draw_run(axes: Axes, records: list[dict[str, Any]], name: str, x: XAxis, color: str, only: bool) -> None:
    field = FIELDS[x]

    def points(kind: str, value: str) -> tuple[list[float], list[float]]:
        chosen = [r for r in records if r["kind"] == kind and value in r]
        return [r[field] for r in chosen], [r[value] for r in chosen]

    shade = "0.5" if only else color
    for span in sparse_spans(records, x):
        axes.axvspan(span.start, span.end, color=shade, alpha=0.15 if only else 0.07, linewidth=0)
        top = axes.get_xaxis_transform()
        middle = (span.start + span.end) / 2
        if only:
            axes.text(middle, 0.97, span.label, transform=top, ha="center", va="top", color="0.3")
    axes.plot(*points("train", "loss"), color=color, linewidth=1, alpha=0.8, label=f"{name}: training")
    axes.plot(
        *points("eval", "val_loss"),
        color=color,
        marker="o",
        markersize=5,
        linewidth=0,
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=f"{name}: validation, dense model",
    )
    sparse = points("eval", "val_loss_sparse")
    if sparse[0]:
        axes.plot(
            *sparse,
            color=color,
            marker="o",
            markersize=5,
            linewidth=0,
            markerfacecolor="none",
            label=f"{name}: validation, sparse model",
        )


def main(argv: Sequence[str]) -> int:
    """The command."""
    values = flags.FLAGS
    try:
        plot_runs(argv[1:], values.output, values.x)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(values.output)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("output", "loss.png", "image to write")
    flags.DEFINE_enum("x", "step", list(FIELDS), "horizontal axis")
    app.run(main)
