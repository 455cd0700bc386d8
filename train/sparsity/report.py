"""A grid's rows as a table, as JSON, and as two pictures."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.records.plots import new_figure, save
from train.sparsity.grid import Row, check_same

PATTERNS_PICTURE = "patterns.png"
LAYERS_PICTURE = "layers.png"


def paired(row: Row, other: Row) -> tuple[float, float]:
    """Mean and standard error, over windows, of one row's loss less another's on the same windows.

    Raises:
      ValueError: the rows are of unlike windows, models or calibrations.
    """
    check_same(row, other["key"], "the table")
    difference = np.array(row["losses"]) - np.array(other["losses"])
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else math.nan
    return float(difference.mean()), spread / math.sqrt(len(difference))


def table(rows: Sequence[Row]) -> str:
    """Markdown: one row a cell, the dense model first.

    Raises:
      ValueError: as `paired`.
    """
    dense = rows[0]
    tasks = sorted({task for row in rows for task in row.get("tasks", {})})
    head = ["cell", "loss", "to dense", "bits per byte", "KL", "same token", "pruned", *tasks]
    head += ["drop"] if tasks else []
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in rows:
        mean, error = paired(row, dense)
        words = [row["cell"], f"{row['loss']:.4f}"]
        words.append("" if row is dense else f"{mean:+.4f} ± {error:.4f}")
        words += [f"{row['bits_per_byte']:.4f}", f"{row['kl']:.4f}", f"{row['agree']:.1%}"]
        words.append(f"{row['pruned']:.1%}" if "pruned" in row else "")
        words += [f"{row['tasks'][task]:.4f}" if task in row.get("tasks", {}) else "" for task in tasks]
        if tasks:
            words.append("" if row is dense or not row.get("tasks") else f"{drop(row, dense):.2%}")
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


def drop(row: Row, dense: Row) -> float:
    """The mean over tasks of (dense - sparse) / dense."""
    shares = [(dense["tasks"][t] - value) / dense["tasks"][t] for t, value in row["tasks"].items() if dense["tasks"][t]]
    return math.fsum(shares) / len(shares) if shares else math.nan


def bytes_table(rows: Sequence[Row]) -> str:
    """Markdown: bytes a token that the linear layers move, by arithmetic; no measured figure stands in it."""
    lines = ["| cell | activations written, kB | weights read decoding one sequence, MB |", "| --- | ---: | ---: |"]
    for row in rows:
        moved = row["modelled"]
        lines.append(
            f"| {row['cell']} | {moved['activation_bytes'] / 1e3:.1f} | {moved['decode_weight_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines) + "\n"


def write_report(rows: Sequence[Row], header: dict[str, Any], output: Path) -> Path:
    """`report.md`, `report.json` and the pictures, in OUTPUT; gives the page.

    Raises:
      ValueError: rows that do not belong together, or a file that cannot be written.
    """
    parts = ["# Activation sparsity\n"]
    parts += [f"- {name}: {value}" for name, value in header.items()]
    parts += ["", table(rows)]
    parts.append("Differences to dense are paired over windows, with their standard error.\n")
    parts += ["## Bytes, modelled\n", bytes_table(rows)]
    if draw_patterns(rows, output / PATTERNS_PICTURE):
        parts.append(f"![loss by pattern]({PATTERNS_PICTURE})\n")
    if draw_layers(rows, output / LAYERS_PICTURE):
        parts.append(f"![error by layer]({LAYERS_PICTURE})\n")
    path = output / "report.md"
    try:
        path.write_text("\n".join(parts))
        (output / "report.json").write_text(json.dumps({"header": header, "rows": list(rows)}, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror}") from error
    return path


def draw_patterns(rows: Sequence[Row], path: Path) -> bool:
    """Loss over the pattern, a line for each way; False where there is only one pattern."""
    lines: dict[str, list[tuple[str, float]]] = {}
    for row in rows[1:]:
        pattern, _, rest = row["cell"].partition(" ")
        lines.setdefault(rest, []).append((pattern, row["loss"]))
    names = list(dict.fromkeys(pattern for line in lines.values() for pattern, _ in line))
    if len(names) < 2:
        return False
    figure, axes = new_figure()
    for name, line in lines.items():
        axes.plot([names.index(pattern) for pattern, _ in line], [loss for _, loss in line], "o-", label=name)
    axes.axhline(rows[0]["loss"], color="black", linestyle="--", label="dense")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("loss, nats per token")
    axes.legend(fontsize="small")
    save(figure, path)
    return True


def draw_layers(rows: Sequence[Row], path: Path) -> bool:
    """Relative error of each linear layer's output by block, of the first cell that has it."""
    row = next((one for one in rows if one.get("errors")), None)
    if row is None:
        return False
    figure, axes = new_figure()
    for name, line in row["errors"].items():
        axes.plot(line, ".-", label=name)
    axes.set_xlabel("block")
    axes.set_ylabel(f"error of the layer's output, {row['cell']}")
    axes.legend(fontsize="small")
    save(figure, path)
    return True
