"""What `make faults` says it tried: one line of JSON for each fault, in the file that $FAULTS_LOG names.

The last line of a whole run (conftest.py) tells how many tests there were and how long they took together.
"""

import json
import os
import time
from typing import Any


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
