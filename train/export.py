"""Exports a run as a Hugging Face model: `python -m train.export --workdir=runs/a --output=runs/a-hf`.

The folder holds an `ArceeForCausalLM` with its tokenizer, as `transformers`, vLLM and others load it.
"""

from pathlib import Path

from absl import app, flags

from train.command import program
from train.config.settings import trust_imports
from train.evaluation.export import DTYPES, export


@program
def main(values: flags.FlagValues) -> None:
    """The command."""
    trust_imports(values.gin_allow_imports)
    print(export(values.workdir, Path(values.output), values.dtype, ema=values.ema))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of a run of train.main; FOLDER@STEP for an older step", required=True)
    flags.DEFINE_string("output", None, "folder to write", required=True)
    flags.DEFINE_boolean("ema", False, "the averaged weights (Optimizer.ema) in place of the last ones")
    flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "type of the stored weights")
    flags.DEFINE_boolean("gin_allow_imports", False, "let the run's configuration import modules: runs their code")
    app.run(main)
