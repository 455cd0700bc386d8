"""The report of a run, `report.md` in its workdir with pictures: `python -m train.run_report runs/a`.

Written at the end of each run; the command writes it for a run that still goes on, or was interrupted, as well.
"""

import sys
from collections.abc import Sequence

from absl import app

from train.output import outlive_output
from train.records.run_report import write_report


def main(argv: Sequence[str]) -> int:
    """The command."""
    outlive_output()
    if len(argv) != 2:
        print("error: give one workdir: python -m train.run_report runs/a", file=sys.stderr)
        return 2
    try:
        print(write_report(argv[1]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    app.run(main)
