"""What `make faults` says it tried: one line of JSON for each fault, in the file that $FAULTS_LOG names.

    python -m tests.faults.ledger docs/results/faults.jsonl        the table of docs/reliability.md

The last line of a run (conftest.py) tells how many tests there were and how long they took together.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

WHOLE = "all of this run of pytest"


def tried(fault: str, times: int, outcome: str, **figures: Any) -> None:
    """Records that a fault was tried so many times and what became of it; called behind the assertions."""
    if path := os.environ.get("FAULTS_LOG"):
        date = time.strftime("%Y-%m-%d")
        line = {
            "fault": fault,
            "times": times,
            "outcome": outcome,
            "date": date,
            "cores": len(os.sched_getaffinity(0)),
            **figures,
        }
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


def table(path: Path) -> str:
    """A file as a table of Markdown, lines of one fault and outcome added up, and the whole runs below it."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    text = "| Fault | Times | What became of it |\n|---|---|---|\n"
    end = ""
    for line in map(json.loads, path.read_text().splitlines()):
        if line["fault"] == WHOLE:
            names = {"passed": "passed", "failed": "failed", "error": "errors", "skipped": "skipped"}
            counts = ", ".join(f"{line[name]} {word}" for name, word in names.items())
            end += f"\n{counts} in {line['minutes']} minutes on {line['cores']} cores, {line['date']}.\n"
            continue
        row = rows.setdefault((line["fault"], line["outcome"]), {"times": 0})
        row["times"] += line["times"]
        if "seconds" in line:
            row["seconds"] = max(line["seconds"], row.get("seconds", 0))
            row["most"] = f"; at most {row['seconds']} s"
        if mib := line.get("resident_MiB"):
            row["most"] = f"; {min(mib)} to {max(mib)} MiB resident"
    for (fault, outcome), row in rows.items():
        text += f"| {fault} | {row['times']:,} | {outcome}{row.get('most', '')} |\n"
    return text + end


if __name__ == "__main__":
    print(table(Path(sys.argv[1])), end="")
