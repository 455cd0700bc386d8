"""Do the kernels train as the reference does?  The same steps with both, and the kernels once more for the noise.

    python -m tests.same_loss --tokens=FOLDER --output=same-loss.json            40m, 200 steps, on a Hopper GPU
    python -m tests.same_loss --tokens=FOLDER --output=x.json --size=tiny --ways reference reference

FOLDER is one that `train.prepare` wrote.  For each recipe three runs of `train.main`, processes of their own with the
same seed and batches: the first way, the first way again, the second way.  No more than --parallel of them share the
device.  `between` compares the two ways, `noise` the two runs of the first one: the kernels cannot be nearer to the
reference than to themselves.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import jax

from train.config.settings import CONFIG_ROOT
from train.records.metrics import read_metrics

LAST = 20  # steps whose mean stands for where a run has come to


def options(given: argparse.Namespace, recipe: str, way: str) -> tuple[str, list[str]]:
    """The gin file and the bindings of a run."""
    sparse_from = max(1, given.steps // 10)  # to the end, as what is compared is the sparse step
    bindings = {
        "Data.folder": str(given.tokens.resolve()),
        "Phases.schedule": [(0, "dense"), (sparse_from, recipe)],
        "Train.steps": given.steps,
        "Train.implementation": way,
        "Train.sample_tokens": 0,
        "Train.log_every": 1,
        "Train.eval_every": given.steps,
        "Train.checkpoint_every": given.steps,
    }
    return f"configs/size/{given.size}.gin", [f"{name} = {value!r}" for name, value in bindings.items()] + given.binding


def train(workdir: Path, given: argparse.Namespace, recipe: str, way: str) -> list[float] | str:
    """The losses of all steps, or the last words of a run that failed."""
    file, bindings = options(given, recipe, way)
    command = [sys.executable, "-m", "train.main", f"--workdir={workdir}", f"--gin_file={file}"]
    command += [f"--gin_bindings={binding}" for binding in bindings]
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    try:
        done = subprocess.run(
            command, cwd=CONFIG_ROOT, env=environment, capture_output=True, text=True, timeout=given.seconds
        )
    except subprocess.TimeoutExpired:
        return f"not done after {given.seconds:.0f} s"
    if done.returncode:
        return " / ".join(done.stderr.strip().splitlines()[-3:])[-400:]
    return [record["loss"] for record in read_metrics(workdir) if record["kind"] == "train"]


def difference(first: list[float], second: list[float]) -> dict[str, float]:
    """How far two runs are apart: at the worst step, in the mean of the last ones, and at the end."""
    apart = [a - b for a, b in zip(first, second, strict=True)]
    return {
        "largest": round(max(map(abs, apart)), 5),
        "mean_of_last_20": round(fmean(apart[-LAST:]), 5),
        "final": round(apart[-1], 5),
    }


def compare(case: str, ways: list[str], losses: list[list[float] | str]) -> dict[str, Any]:
    """A row of the result."""
    row: dict[str, Any] = {"bench": "same_loss", "case": f"{case}, {' and '.join(ways)}"}
    failures = [told for told in losses if isinstance(told, str)]
    if failures:
        return row | {"failed": failures[0]}
    first, again, second = (told for told in losses if not isinstance(told, str))
    row |= {"steps": len(first), "final": {"first": first[-1], "second": second[-1]}}
    row |= {"between": difference(first, second), "noise": difference(first, again)}
    device = jax.devices()[0].device_kind
    return row | {"device": device, "jax": jax.__version__, "date": datetime.date.today().isoformat()}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="folder that train.prepare wrote")
    parser.add_argument("--output", type=Path, required=True, help="a file for the rows as JSON")
    parser.add_argument("--recipes", nargs="+", default=["act24", "all24", "venom"])
    parser.add_argument("--ways", nargs=2, default=["hopper", "reference"], help="Train.implementation of the two")
    parser.add_argument("--size", default="40m", help="of configs/size")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--parallel", type=int, default=3)
    parser.add_argument("--limit", type=float, default=0.02)
    parser.add_argument("--seconds", type=float, default=600, help="limit of one run")
    parser.add_argument("--binding", action="append", default=[], help="one more gin binding; may be repeated")
    return parser.parse_args(words)


def main() -> int:
    """Trains, writes the rows and prints them."""
    given = arguments()
    first, second = given.ways
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the runs need the device too
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(given.parallel) as pool:
        running = {
            recipe: [
                pool.submit(train, Path(scratch) / f"{recipe}-{number}", given, recipe, way)
                for number, way in enumerate((first, first, second))
            ]
            for recipe in given.recipes
        }
        rows = []
        for recipe, futures in running.items():
            rows.append(compare(f"{given.size} {recipe}", given.ways, [future.result() for future in futures]))
            print(json.dumps(rows[-1]), flush=True)
            given.output.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any("failed" in row or abs(row["between"]["mean_of_last_20"]) > given.limit for row in rows))


if __name__ == "__main__":
    sys.exit(main())
