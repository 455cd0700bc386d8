"""Runs lists of runs over the GPUs present and collects a table of each:

    python -m train.sweep configs/sweeps/recipes.toml --gin_bindings="Data.folder='runs/data'" --output=runs/recipes

The file is TOML; what a run is stays gin: files and bindings, as `train.main` takes them.

    gin_files = ["configs/size/40m.gin"]     # of every run; gin_bindings likewise
    seeds = [0, 1]                           # each run once for each
    twin = "dense"                           # the run that the others are compared with, at the same seed

    [runs.dense]
    [runs.act24]
    gin_files = ["configs/recipe/act24.gin"] # after those of every run; gin_bindings, seeds and twin likewise

A run is a process of its own on one GPU, in OUTPUT/NAME-SEED; what it prints is in OUTPUT/logs.  Runs begin in the
order of the file, so those that matter most come first.  The table, OUTPUT/table.md and table.json, is written anew
whenever a run ends.  Type the command again after a kill: finished runs are skipped, the others go on from their
checkpoints; those that outlived the kill of the sweep are waited for.

Several files, a.toml and b.toml, take turns in one queue; their folders are then OUTPUT/a and OUTPUT/b.  With
``--per_device`` runs share a GPU, and the table leaves out their seconds, which say nothing; ``--step_times`` takes the
times of steps from what `train.bench` has measured by itself; it may be given for several models.  ``--earlier`` takes
the rows of runs that finished elsewhere from a table.json: they are in the table, and are not run again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from train.command import print_error
from train.output import outlive_output
from train.sweeps.sweep import run_sweep


def main(argv: Sequence[str]) -> int:
    """The command."""
    outlive_output()
    values = flags.FLAGS
    if len(argv) < 2:
        print_error("give a sweep, or several: python -m train.sweep configs/sweeps/recipes.toml")
        return 2
    output = Path(values.output or (Path("runs") / Path(argv[1]).stem if len(argv) == 2 else "runs"))
    names = ("gin_bindings", "only", "gpus", "per_device", "collect", "step_times", "earlier")
    options: dict[str, Any] = {name: values[name].value for name in names}
    try:
        return run_sweep(argv[1:], output, **options)
    except ValueError as error:
        print_error(str(error))
        return 2
    except OSError as error:
        print_error(f"{error.filename or output}: {error.strerror}; give a folder that can be written to as --output")
        return 2


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "folder of the runs and the table (default: runs/NAME of the sweep; runs)")
    flags.DEFINE_multi_string("gin_bindings", [], "bindings for every run, after those of the sweep")
    flags.DEFINE_list("only", None, "names of the runs to do, with commas between; their twins are done too")
    flags.DEFINE_list("gpus", None, "GPUs to use, as CUDA_VISIBLE_DEVICES names them (default: all that are visible)")
    flags.DEFINE_integer("per_device", 1, "runs at a time on each GPU, or on the CPU")
    flags.DEFINE_multi_string(
        "step_times", [], "FILE or FILE@SIZE of python -m train.bench to take the times of steps from"
    )
    flags.DEFINE_multi_string("earlier", [], "table.json with runs of these sweeps that finished elsewhere")
    flags.DEFINE_boolean("collect", False, "only write the table of the runs that have finished")
    app.run(main)
