"""The last line of the ledger: how many tests there were, and how long all of them took."""

import os
import time

from tests.faults.ledger import WHOLE, tried

BEGAN = time.monotonic()


def pytest_terminal_summary(terminalreporter, exitstatus):
    """Called once, in the process that hands the tests out."""
    counts = {name: len(terminalreporter.stats.get(name, ())) for name in ("passed", "failed", "error", "skipped")}
    tried(
        WHOLE, sum(counts.values()), "passed" if exitstatus == 0 else "failed", **counts,
        minutes=round((time.monotonic() - BEGAN) / 60, 1), processes=os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"),
    )  # fmt: skip
