"""Loss curves of one or more runs: `python -m train.plot runs/a runs/b --output=loss.png [--x=seconds]`.

One run: its training loss, dots for the validation loss of the dense model, rings for that of the sparse one inside
a sparse phase; sparse phases are shaded and labelled. Several runs: the training loss is a rolling mean, a bar along
the lower edge marks each run's sparse phases, and --difference_to=runs/a draws every other run minus that one. With
--pareto: one dot for each run, its last validation loss over its measured seconds (or steps), and a line through the
runs that no other run beats in both.
"""

import sys
from collections.abc import Sequence

from absl import app, flags

from train.output import outlive_output
from train.records.plots import FIELDS, plot_pareto, plot_runs


def main(argv: Sequence[str]) -> int:
    """The command."""
    outlive_output()
    values = flags.FLAGS
    try:
        if values.pareto:
            if values.smooth is not None or values.difference_to is not None:
                raise ValueError("--pareto shows last losses: leave out --smooth and --difference_to")
            plot_pareto(argv[1:], values.output, values.x or "seconds")
        else:
            options = {"smooth": values.smooth, "difference_to": values.difference_to}
            plot_runs(argv[1:], values.output, values.x or "step", **options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(values.output)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("output", "loss.png", "image to write")
    flags.DEFINE_enum("x", None, list(FIELDS), "horizontal axis (default: step; with --pareto seconds)")
    flags.DEFINE_integer("smooth", None, "steps of the rolling mean (default: by the length of the runs; 1: none)")
    flags.DEFINE_string("difference_to", None, "draw the loss of the other runs minus that of this one")
    flags.DEFINE_boolean("pareto", False, "draw the last validation loss of each run over what it took")
    app.run(main)
