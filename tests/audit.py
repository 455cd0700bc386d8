"""Known vulnerabilities of the versions in constraints.txt, as pip-audit knows them from the package index.

    python -m tests.audit                    make audit

pip-audit goes into a folder of its own, not into the environment. Without a network, or with an index that has no
advisories, that is said in one line beginning with "audit skipped", with exit code 0. Exit code 1 if any is known.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "audit"
TOOL = "pip-audit==2.10.1"
SECONDS = 90  # for installing the tool, and for its questions

Runner = Callable[[Sequence[str]], tuple[str, str]]


def pins(constraints: Path) -> list[str]:
    """Its lines `NAME==VERSION`."""
    lines = (line.split("#")[0].strip() for line in constraints.read_text().splitlines())
    return [line for line in lines if line]


def run(command: Sequence[str]) -> tuple[str, str]:
    """What a module of this Python prints on stdout and on stderr, whatever its exit code."""
    environment = os.environ | {"PYTHONPATH": str(FOLDER / "site")}
    whole = [sys.executable, "-m", *command]
    try:
        done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} took more than {SECONDS} s"
    return done.stdout, done.stderr


def last_line(text: str) -> str:
    """The reason, of what a program says when it fails."""
    return (text.strip().splitlines() or ["no message"])[-1]


def install(runner: Runner) -> str | None:
    """Puts the tool into its folder where it is not there yet; why that failed, or None."""
    site = FOLDER / "site"
    if (site / "pip_audit").exists():
        return None
    where = ["--target", str(site), "--no-compile", "--quiet", "--disable-pip-version-check"]
    _, errors = runner(["pip", "install", TOOL, *where, "--retries=0", "--timeout=5"])
    return None if (site / "pip_audit").exists() else last_line(errors)


def ask(some: Sequence[str], runner: Runner) -> tuple[list[dict[str, Any]], str]:
    """The packages that the index told about, and why there are none."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    asked = FOLDER / "asked.txt"
    asked.write_text("\n".join(some) + "\n")
    output, errors = runner(
        ["pip_audit", f"--requirement={asked}", "--no-deps", "--disable-pip", "--format=json", "--timeout=5",
         "--progress-spinner=off", f"--cache-dir={FOLDER / 'cache'}"]
    )  # fmt: skip
    try:
        told = json.loads(output)["dependencies"]
    except (ValueError, KeyError):
        return [], f"no network ({last_line(errors)})"
    return [package for package in told if "vulns" in package], "the package index has no advisories"


def audit(versions: Sequence[str], runner: Runner = run) -> int:
    """Prints what is known of these versions; 1 if anything is."""
    if reason := install(runner):
        print(f"audit skipped: no network ({TOOL}: {reason})")
        return 0
    # One question first: an index without advisories need not be asked a hundred times.
    told, reason = ask(versions[:1], runner)
    if told:
        told, reason = ask(versions, runner)
    if not told:
        print(f"audit skipped: {reason}")
        return 0
    for package in told:
        for known in package["vulns"]:
            remedy = ", ".join(known["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {known['id']}, mended in {remedy}")
    count = sum(len(package["vulns"]) for package in told)
    known = f"{count} known vulnerabilities" if count else "nothing known"
    print(f"audit: {known}; {len(told)} of the {len(versions)} versions in constraints.txt looked up")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(audit(pins(ROOT / "constraints.txt")))
