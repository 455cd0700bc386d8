"""The report of a run, `report.md` in its workdir with pictures: what `python -m train.run_report` writes."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from train.evaluation.validation import CONFIG_FILE
from train.records.metrics import METRICS_FILE, read_metrics
from train.records.plots import COLORS, Record, new_figure, plot_run, points, save, shade_phases, sparse_spans
from train.state.run_info import read_starts

REPORT_FILE = "report.md"
PICTURES = "report"  # folder beside it

# Figures of a diagnosis that are drawn for each layer over time.
LAYER_FIGURES = {
    "density": "share of the neurons that are active",
    "dropped_features": "share of the energy that 2:4 along neurons drops",
    "dropped_tokens": "share of the energy that 2:4 along tokens drops",
    "kept_router": "share of the energy in the experts the router picks",
    "flip_rate": "share of the weight masks that changed since the last diagnosis",
}


def write_report(workdir: str | Path) -> Path:
    """Writes report.md and its pictures; returns its path.

    Raises:
      ValueError: the folder holds no training metrics, or a damaged run.json.
    """
    workdir = Path(workdir)
    records, starts = read_metrics(workdir), read_starts(workdir)
    if not any(r["kind"] == "train" for r in records):
        raise ValueError(f"{workdir / METRICS_FILE} holds no training loss: is {workdir} the folder of a run?")
    pictures = workdir / PICTURES
    pictures.mkdir(exist_ok=True)
    plot_run(workdir, pictures / "loss.png")
    parts = [
        f"# Run {workdir.resolve().name}",
        _state(records, starts),
        "## Figures",
        _table(["figure", "value"], _figures(records, starts)),
        "## Loss",
        _picture("loss", "Training loss; dots: validation loss of the dense model, rings: of the sparse model."),
        "## Phases",
        _table(
            ["phase", "steps", "last validation loss", "tokens/s (median)", "density (mean)", "at its start"],
            _phases(records),
        ),
        *_drawn("Layers", records, pictures / "layers.png", draw_layers, _LAYERS, _NO_LAYERS),
        *_drawn("Expert load", records, pictures / "experts.png", draw_experts, _EXPERTS, _NO_EXPERTS),
        *_drawn("Throughput", records, pictures / "throughput.png", draw_throughput, _THROUGHPUT, ""),
        *_sample(workdir / "sample.txt"),
        "## Configuration",
        _code((workdir / CONFIG_FILE).read_text() if (workdir / CONFIG_FILE).exists() else "not recorded"),
        "## Starts",
        *(_start(number, entry) for number, entry in enumerate(starts, 1)),
        *([] if starts else ["Command, versions and commit were not recorded."]),
    ]
    path = workdir / REPORT_FILE
    path.write_text("\n\n".join(parts) + "\n")
    return path


_LAYERS = "Every layer (0 is the first) at every diagnosis. White lines: a phase begins."
_NO_LAYERS = "No diagnosis with figures for each layer: set `Train.diagnosis_every`."
_EXPERTS = "Tokens of the fullest and of the emptiest expert of any layer, relative to the fair share."
_NO_EXPERTS = "No phase routes."
_THROUGHPUT = "Training steps alone: evaluations, checkpoints and changes of phase are left out."


def draw_layers(records: Sequence[Record], output: Path) -> bool:
    """A map of layers and steps for each figure of the diagnoses; False where there are none."""
    diagnoses = [r for r in records if r["kind"] == "diagnosis" and "layers" in r]
    names = [name for name in LAYER_FIGURES if any(name in r["layers"] for r in diagnoses)]
    if not sparse_spans(records):
        names = [name for name in names if name != "kept_router"]  # 1 throughout
    if not names:
        return False
    figure, rows = new_figure(len(names), 1 + 1.7 * len(names))
    steps, missing = [r["step"] for r in diagnoses], [math.nan] * len(diagnoses[0]["layers"][names[0]])
    edges, cells = _cells(steps, [r["step"] for r in records if r["kind"] == "phase"])
    for axes, name in zip(np.atleast_1d(rows), names, strict=True):
        values = np.array([r["layers"].get(name, missing) for r in diagnoses])
        if name == "kept_router":
            values[(values == 1).all(axis=1)] = math.nan  # nothing is routed there
        layers = values.shape[1]
        axes.grid(visible=False)
        shown = np.array([values[i] if i is not None else np.full(layers, math.nan) for i in cells])
        mesh = axes.pcolormesh(edges, np.arange(layers + 1) - 0.5, shown.T, cmap="viridis")
        figure.colorbar(mesh, ax=axes, pad=0.01)
        for r in records:
            if r["kind"] == "phase" and r["step"] > 0:
                axes.axvline(r["step"], color="white", linewidth=1.5)
        axes.set_title(LAYER_FIGURES[name], fontsize="medium", loc="left")
        axes.set_ylabel("layer")
        axes.yaxis.get_major_locator().set_params(integer=True)
    _last(rows).set_xlabel("step")
    save(figure, output)
    return True


def _cells(steps: Sequence[int], starts: Sequence[int]) -> tuple[list[int], list[int | None]]:
    """Borders of a row of cells, and the diagnosis that each shows, None for none.

    A diagnosis after ``steps[i]`` steps speaks of those since the one before, but of none before its phase began.
    """
    number = {step: i for i, step in enumerate(steps)}
    first = max((start for start in starts if start < steps[0]), default=steps[0] - 1)
    edges = sorted({first, *steps, *(start for start in starts if first < start < steps[-1])})
    return edges, [number.get(edge) for edge in edges[1:]]


def draw_experts(records: Sequence[Record], output: Path) -> bool:
    """The load of the fullest and the emptiest expert; False where nothing was routed."""
    routed = [r for r in records if r["kind"] == "train" and "load_max" in r]
    if not routed:
        return False
    figure, axes = new_figure(height=3.5)
    shade_phases(axes, records)
    steps = np.array([r["step"] for r in records if r["kind"] == "train"], float)
    for name, label, color in (("load_max", "fullest", COLORS[1]), ("load_min", "emptiest", COLORS[0])):
        share = {r["step"]: r[name] / r["load_mean"] for r in routed}
        # NaN where nothing is routed, so that no line is drawn across dense phases.
        axes.plot(steps, [share.get(step, np.nan) for step in steps], color=color, linewidth=1, label=label)
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, 1.01 * steps[-1])
    axes.set_xlabel("step")
    axes.set_ylabel("tokens / fair share")
    axes.legend(loc="upper right")
    save(figure, output)
    return True


def draw_throughput(records: Sequence[Record], output: Path) -> bool:
    """Tokens per second, and below it the utilisation where a peak is known."""
    utilised = any("mfu_dense" in r for r in records)
    figure, rows = new_figure(1 + utilised, 3 + 2.2 * utilised)
    axes: Axes = np.atleast_1d(rows)[0]
    shade_phases(axes, records)
    steps, rates = points(records, "train", "tokens_per_second")
    axes.plot(steps, rates, color=COLORS[0], linewidth=0.8)
    axes.set_ylim(0, _typical_top(rates))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("tokens/s")
    if utilised:
        lower: Axes = rows[1]
        shade_phases(lower, records, label=False)
        for name, label, color in (
            ("mfu_dense", "dense-equivalent", COLORS[0]),
            ("mfu_executed", "executed", COLORS[1]),
        ):
            steps, share = points(records, "train", name)
            lower.plot(steps, 100 * share, color=color, linewidth=0.8, label=label)
        lower.set_ylim(0, 100 * _typical_top(points(records, "train", "mfu_dense")[1]))
        lower.set_ylabel("model FLOPs utilisation (%)")
        lower.legend(loc="upper right")
    _last(rows).set_xlabel("step")
    save(figure, output)
    return True


def _typical_top(rates: np.ndarray) -> float:
    """Above nearly all rates: the first steps are dispatched before any has run, and look far too fast."""
    return 1.3 * float(np.quantile(rates, 0.99)) if len(rates) else 1.0


def _last(rows: Any) -> Axes:
    return np.atleast_1d(rows)[-1]


def _drawn(
    title: str, records: Sequence[Record], output: Path, draw: Callable[..., bool], caption: str, otherwise: str
) -> list[str]:
    if draw(records, output):
        return [f"## {title}", _picture(output.stem, caption)]
    output.unlink(missing_ok=True)  # of an earlier report
    return [f"## {title}", otherwise]


def _state(records: Sequence[Record], starts: Sequence[dict[str, Any]]) -> str:
    done = max(r["step"] for r in records if r["kind"] == "train")
    of = f" of {starts[-1]['steps']:,}" if starts else ""
    resumed = f", in {len(starts)} starts" if len(starts) > 1 else ""
    ended = any(r["kind"] == "end" for r in records)
    return f"{'Complete' if ended else 'Not complete'}: {done:,}{of} steps in {records[-1]['time']:,.0f} s{resumed}."


def _figures(records: Sequence[Record], starts: Sequence[dict[str, Any]]) -> list[list[str]]:
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    evaluations = [r for r in records if r["kind"] == "eval"]
    done = max(r["step"] for r in records if r["kind"] == "train")
    rows = []
    for name, value in (evaluations[-1] if evaluations else {}).items():
        if name.startswith("val_"):
            rows.append([f"{name} (step {evaluations[-1]['step']:,})", f"{value:.4f}"])
    rows.append([f"training loss, mean of the last {min(100, len(losses))} records", f"{fmean(losses[-100:]):.4f}"])
    if starts:
        rows.append(["tokens trained on", f"{done * starts[-1]['tokens_per_step']:,}"])
        rows.append(["parameters", f"{starts[-1]['parameters']:,}"])
        rows.append(["devices", starts[-1]["devices"]])
    rates = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
    if rates:
        rows.append(["tokens/s (median)", f"{median(rates):,.0f}"])
    for name in ("mfu_dense", "mfu_executed"):
        shares = [r[name] for r in records if name in r]
        if shares:
            rows.append([f"{name} (median)", f"{median(shares):.1%}"])
    return rows


def _phases(records: Sequence[Record]) -> list[list[str]]:
    switches = [r for r in records if r["kind"] == "phase"]
    last = max(r["step"] for r in records)
    rows = []
    for i, phase in enumerate(switches):
        start, end = phase["step"], switches[i + 1]["step"] if i + 1 < len(switches) else last
        inside = [r for r in records if start < r["step"] <= end]
        steps = [r for r in inside if r["kind"] == "train"]
        evaluations = [r for r in inside if r["kind"] == "eval"]
        losses = {"": "dense", "_sparse": "sparse"}
        found = [
            f"{evaluations[-1][f'val_loss{suffix}']:.4f} {name}"
            for suffix, name in losses.items()
            if evaluations and f"val_loss{suffix}" in evaluations[-1]
        ]
        rates = [r["tokens_per_second"] for r in steps if "tokens_per_second" in r]
        densities = [r["density"] for r in steps if "density" in r]
        rows.append(
            [
                phase["phase"],
                f"{start:,} to {end:,}",
                ", ".join(found) + (f" (step {evaluations[-1]['step']:,})" if found else ""),
                f"{median(rates):,.0f}" if rates else "",
                f"{fmean(densities):.1%}" if densities else "",
                ", ".join(f"{name} {value:.4g}" for name, value in phase.get("report", {}).items()),
            ]
        )
    return rows


def _sample(path: Path) -> list[str]:
    return ["## Sample", _code(path.read_text())] if path.exists() else []


def _start(number: int, entry: dict[str, Any]) -> str:
    git = entry["git"]
    commit = "not run from a checkout" if git is None else git["commit"] + (" with changes" if git["changed"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    rows = [
        ["time", entry["time"]],
        ["from step", f"{entry['step']:,}"],
        ["commit", commit],
        ["versions", versions],
        ["devices", entry["devices"]],
    ]
    return f"### Start {number}\n\n{_code(entry['command'])}\n\n{_table(['', ''], rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _picture(name: str, caption: str) -> str:
    return f"{caption}\n\n![{name}]({PICTURES}/{name}.png)"


def _code(text: str) -> str:
    """A block that shows the text as it is, whatever fences it holds."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text.rstrip()}\n{fence}"
