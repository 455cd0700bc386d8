"""Prunes a trained model's feed-forward weights to V:N:M, evaluates it before and after, and trains it a little more.

python -m train.prune --workdir=runs/a --patterns=64:2:8,64:2:16,2:4 --recovery_steps=200 --json=pruned.json
python -m train.prune --workdir=runs/a --patterns=128:2:16 --columns=best --output=runs/a-pruned
"""

from pathlib import Path

from absl import app, flags

from train.command import keep_compiled_programs, program
from train.config.settings import trust_imports
from train.evaluation.prune import run


@program
def main(values: flags.FlagValues) -> None:
    """The command."""
    trust_imports(values.gin_allow_imports)
    keep_compiled_programs()
    run(
        values.workdir,
        values.patterns,
        columns=values.columns,
        json_file=Path(values.json) if values.json else None,
        output=Path(values.output) if values.output else None,
        recovery_steps=values.recovery_steps,
        recovery_rate=values.recovery_rate,
        calibration_batches=values.calibration_batches,
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of a run of train.main; FOLDER@STEP for an older step", required=True)
    flags.DEFINE_list("patterns", ["64:2:16"], "patterns V:N:M to prune to, one after another from the same weights")
    flags.DEFINE_enum("columns", "l1", ["l1", "energy", "best"], "how a block's four columns are chosen")
    flags.DEFINE_integer(
        "calibration_batches", 0, "training batches for scores |w| x input norm; 0: |w|", lower_bound=0
    )
    flags.DEFINE_integer("recovery_steps", 0, "optimizer steps after pruning, the masks held", lower_bound=0)
    flags.DEFINE_float("recovery_rate", None, "their peak learning rate; default: a tenth of the run's")
    flags.DEFINE_string("json", None, "write the figures to this file")
    flags.DEFINE_string("output", None, "write the pruned model there, as train.export does, in float32")
    flags.DEFINE_boolean("gin_allow_imports", False, "let the run's configuration import modules: runs their code")
    app.run(main)
