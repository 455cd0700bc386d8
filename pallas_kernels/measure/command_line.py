"""The arguments that the benchmarks share."""

import argparse

from pallas_kernels import device

ONE_WORD = "only cases whose name contains this"
SEVERAL_WORDS = "only cases whose name contains one of these, comma-separated"


def parser(description: str | None, *, json: str | None = None, cases: str = ONE_WORD) -> argparse.ArgumentParser:
    """A parser with --json and --cases.

    Args:
      description: the program's docstring, for --help.
      json: the default of --json, which has to be given where there is none.
      cases: what --cases takes, for --help.
    """
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", default=json, required=json is None, help="the file of results")
    found.add_argument("--cases", default="", help=cases)
    return found


def add_table(found: argparse.ArgumentParser) -> None:
    """Adds --table, for programs that have one."""
    found.add_argument("--table", help="also write them as Markdown")


def require_hopper(what: str = "the benchmark") -> None:
    """Ends the program where there is no Hopper GPU."""
    if not device.hopper_available():
        raise SystemExit(f"{what} needs a Hopper GPU")
