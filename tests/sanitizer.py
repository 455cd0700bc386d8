"""compute-sanitizer over every case of `tests.sanitize`, in a bounded time.

    python -m tests.sanitizer --output=sanitizer.json                         memcheck, racecheck and synccheck
    python -m tests.sanitizer --tools=racecheck --cases pack vnm              some cases

Several processes share the GPU, each with a few cases under one tool. One that takes a third of the time is killed. The
cases of one that is not clean are tried again in halves, so that in the end each has its own answer. A case counts as
checked when its process ended by itself and the tool gave a summary.
The allocator that is set gives each array memory of its own, whose ends memcheck knows. Exit code 1 if anything was
found or something could not be checked.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from tests import sanitize
from train.config.settings import CONFIG_ROOT

TOOLS = ("racecheck", "memcheck", "synccheck")  # the slowest first
SUMMARY = re.compile(r"========= (?:ERROR|RACECHECK) SUMMARY: (.*)")
LEAST = 10.0  # seconds: a process that would have less is not begun
NOTHING = re.compile(r"0 (?:errors|hazards)\b")


@dataclass(frozen=True)
class Slice:
    """Cases that were given to one process, and what became of it."""

    tool: str
    cases: tuple[str, ...]
    state: str  # clean, found, late, failed
    seconds: float
    summary: str = ""
    output: str = ""  # the end of what it printed, where it is not clean


def check(tool: str, cases: tuple[str, ...], seconds: float) -> Slice:
    """Runs some cases under a tool."""
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9"]
    command += [sys.executable, "-m", "tests.sanitize", "--only_run", *cases]
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=CONFIG_ROOT, start_new_session=True
        )
        try:
            process.wait(seconds)
            late = False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            late = True
        file.seek(0)
        output = file.read()
    taken, summary = round(time.monotonic() - began, 1), SUMMARY.search(output)
    if late:
        state = "late"
    elif summary is None or process.returncode not in (0, 9):
        state = "failed"
    else:
        state = "clean" if process.returncode == 0 and NOTHING.match(summary[1]) else "found"
    return Slice(tool, cases, state, taken, summary[1] if summary else "", "" if state == "clean" else output[-3000:])


def slices(names: list[str], size: int) -> list[tuple[str, ...]]:
    """Cases dealt out in turn, the whole FFNs by themselves and first."""
    large = [(name,) for name in names if name.startswith("FFN")]
    small = [name for name in names if not name.startswith("FFN")]
    count = -(-len(small) // size)
    return large + [tuple(small[i::count]) for i in range(count)]


def run(tools: list[str], names: list[str], *, size: int, processes: int, seconds: float) -> list[Slice]:
    """All slices under all tools, until the time is up; what was not begun is late."""
    end, done = time.monotonic() + seconds, []
    waiting = [(tool, cases) for tool in tools for cases in slices(names, size)]
    with ThreadPoolExecutor(processes) as pool:
        running = set()
        while waiting or running:
            while waiting and len(running) < processes:
                tool, cases = waiting.pop(0)
                left = end - time.monotonic()
                if left < LEAST:
                    done.append(Slice(tool, cases, "late", 0.0))
                else:
                    running.add(pool.submit(check, tool, cases, min(left, seconds / 3)))
            if not running:
                continue
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for found in (future.result() for future in ended):
                print(f"{found.tool}: {found.state}, {len(found.cases)} cases, {found.seconds} s", flush=True)
                if found.state != "clean" and len(found.cases) > 1 and end - time.monotonic() > LEAST:
                    half = len(found.cases) // 2
                    waiting += [(found.tool, part) for part in (found.cases[:half], found.cases[half:])]
                else:
                    done.append(found)
    return done


def main() -> int:
    """Checks, writes the result and prints it in short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--cases", nargs="*", default=[], help="names, or parts of names; all cases without")
    parser.add_argument("--size", type=int, default=6, help="cases of a process")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600, help="for everything together")
    parser.add_argument("--output", type=Path, help="a file for the result as JSON")
    given = parser.parse_args()
    names = [case[0] for case in sanitize.choose_cases(given.cases)]
    options = {"size": given.size, "processes": given.processes, "seconds": given.seconds}
    found = run(list(given.tools), names, **options)
    told = {}
    for tool in given.tools:
        states = {state: sum(len(part.cases) for part in found if (part.tool, part.state) == (tool, state))
                  for state in ("clean", "found", "late", "failed")}  # fmt: skip
        told[tool] = {"cases": len(names), **states}
    print(json.dumps(told))
    if given.output:
        parts = [asdict(part) for part in found]
        given.output.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), **told, "processes": parts}, indent=1))
    return int(any(counts["clean"] < counts["cases"] for counts in told.values()))


if __name__ == "__main__":
    sys.exit(main())
