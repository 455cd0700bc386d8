"""The last line of the ledger: how many tests there were, and how long all of them took."""

import os
import time

from tests.faults.ledger import WHOLE, tried

BEGAN = time.monotonic()


def pytest_terminal_summary(terminalreporter, exitstatus):
    """Called in every process; only the one that hands the tests out knows of all."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    counts = {name: len(terminalreporter.stats.get(name, ())) for name in ("passed", "failed", "error", "skipped")}
    processes = terminalreporter.config.getoption("numprocesses", None) or 1
    tried(
        WHOLE, sum(counts.values()), "passed" if exitstatus == 0 else "failed", **counts,
        minutes=round((time.monotonic() - BEGAN) / 60, 1), processes=processes,
    )  # fmt: skip
