"""What `python -m train.sparsify` does: texts to windows, windows to cells, cells to a report."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.sparsity import usage
from train.sparsity.grid import Cell, Options, Row, file_name, run_grid
from train.sparsity.report import table, write_report
from train.sparsity.saved import SETTINGS, read
from train.sparsity.subject import Subject
from train.sparsity.texts import cut_windows, find_texts

HOOKS = "torch_hooks.py"


class Texts(NamedTuple):
    """What is read and how it is cut."""

    text: Sequence[str]
    calibration: Sequence[str]
    window: int
    windows: int
    skip: int
    each: int | None


def run(
    subject: Subject,
    cells: Sequence[Cell],
    texts: Texts,
    output: Path,
    options: Options,
    *,
    calibration_windows: int,
    tasks: Sequence[str],
    data_dir: Path | None,
    limit: int | None,
    torch_hooks: bool = False,
) -> list[Row]:
    """Runs a grid, tasks included, and writes and prints its report.

    Raises:
      ValueError: as `run_grid`; a calibration text that is also the held-out text.
    """
    held_out, calibration = find_texts(texts.text), find_texts(texts.calibration)
    if both := [str(path) for path in held_out if path in calibration]:
        raise ValueError(
            f"{', '.join(both)}: both in --text and --calibration; the loss would be of a text it has seen"
        )
    cut = {"length": texts.window, "skip": texts.skip, "each": texts.each}
    windows = cut_windows(held_out, subject.tokenizer, count=texts.windows, **cut)
    seen = cut_windows(calibration, subject.tokenizer, count=calibration_windows, **cut)
    rows = run_grid(subject, cells, windows, seen, output, options, say=lambda line: print(line, flush=True))
    if tasks:
        rows = [
            _with_tasks(subject, row, output, len(cells) == 1, tasks, data_dir=data_dir, limit=limit) for row in rows
        ]
    size = f"{len(windows.tokens)} of {texts.window} tokens, {rows[0]['tokens']:,} predictions"
    header: dict[str, Any] = {
        "model": subject.name,
        "text": f"{', '.join(map(str, held_out[:8]))}{' and more' if len(held_out) > 8 else ''}",
        "windows": f"{size}, no chat template",
        "calibration": f"{seen.tokens.size:,} tokens of {len(calibration)} texts",
        "sha256 of the windows": windows.sha256,
    }
    if torch_hooks:
        for folder in {path.parent for path in output.rglob(SETTINGS)}:
            shutil.copyfile(Path(__file__).with_name(HOOKS), folder / HOOKS)
    path = write_report(rows, header, output)
    print(f"\n{table(rows)}\nwritten to {path}")
    return rows


def _with_tasks(subject: Subject, row: Row, output: Path, alone: bool, tasks: Sequence[str], **options: Any) -> Row:
    """The row with lm-eval's accuracies; kept in the cell's file, so that the next call has them."""
    place = output if alone else output / file_name(row["cell"])
    if row["cell"] != "dense" and not (place / "sparsity.json").is_file():
        return row  # pruned weights are not saved
    path = output / f"tasks-{file_name(row['cell'])}.json"
    key = {"tasks": list(tasks), "limit": options["limit"], "identity": row["identity"]}
    try:
        kept = json.loads(path.read_text())
        if kept["key"] == key:
            return row | {"tasks": kept["tasks"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or of other tasks
    model = usage.Model(subject)
    if row["cell"] != "dense":
        found = read(place, subject.architecture, subject.hashes)
        model = usage.Model(subject, found.sparsity, found.parameters)
    text, _ = usage.run_tasks(model, tasks, **options)
    results = json.loads(text)["results"]
    values = {task: _accuracy(results[task]) for task in tasks}
    path.write_text(json.dumps({"key": key, "tasks": values, "lm_eval": json.loads(text)}) + "\n")
    return row | {"tasks": values}


def _accuracy(result: dict[str, Any]) -> float:
    """acc where the task has it, else the first of its numbers."""
    numbers = {name: value for name, value in result.items() if isinstance(value, float) and "stderr" not in name}
    return numbers.get("acc,none", next(iter(numbers.values()), float("nan")))
