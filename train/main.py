"""Pre-trains a language model from gin files; run again with the same workdir, it goes on where it was:

    python -m train.main --gin_file=configs/size/tiny.gin --gin_file=configs/recipe/venom.gin \\
        --gin_bindings="Data.folder='runs/data'" --workdir=runs/a
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from train import loop
from train.command import compute_deterministically, keep_compiled_programs, print_error
from train.config.settings import load_config, trust_imports
from train.output import outlive_output
from train.records import logger
from train.state import processes
from train.state.checkpoint import CheckpointError
from train.state.remote import Remote, is_remote
from train.step.guard import BadStepError

OPTIONS = ("dry_run", "gin_allow_imports", "distributed", "init_from", "init_state", "profile_steps", "deterministic")


def run(
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
    workdir: str | Path,
    *,
    dry_run: bool = False,
    distributed: str | None = None,
    gin_allow_imports: bool = False,
    deterministic: bool = False,
    **options: Any,
) -> int:
    """Trains to the end.  Returns 0 (done or saved), 1 (stopped), 2 (bad input).

    distributed as ``processes.connect``, options as ``loop.prepare`` has them; deterministic: ``Train.deterministic``.
    """
    try:
        processes.connect(distributed)
        bindings = [*gin_bindings, *(["Train.deterministic = True"] if deterministic else [])]
        trust_imports(gin_allow_imports)
        config = load_config(gin_files, bindings)
        if config.train.deterministic:
            compute_deterministically()
        if dry_run:
            print(logger.plan(config))
            return loop.rehearse(config, None if workdir is None or is_remote(workdir) else Path(workdir))
        if not str(workdir):
            raise ValueError("--workdir= is empty; give a folder")
        remote = Remote(str(workdir)) if is_remote(workdir) else None
        prepared = loop.prepare(config, remote.local if remote else Path(workdir), remote=remote, **options)
    except (ValueError, NotImplementedError) as error:
        print_error(str(error))
        return 2
    try:
        try:
            return loop.train(prepared)
        finally:
            if remote:
                remote.send_records()
    except (BadStepError, CheckpointError, OSError) as error:
        print_error(str(error))
        return 1


def main(argv: Sequence[str]) -> int:
    """The command."""
    outlive_output()
    logging.set_verbosity(logging.WARNING)  # orbax tells every checkpoint in a dozen lines
    if len(argv) > 1:
        print_error(f"unexpected arguments {argv[1:]}; see --help")
        return 2
    keep_compiled_programs()
    values: Any = flags.FLAGS
    if values.workdir is None and not values.dry_run:
        print_error("give --workdir=FOLDER, or --dry_run")
        return 2
    return run(values.gin_file, values.gin_bindings, values.workdir, **{name: values[name].value for name in OPTIONS})


if __name__ == "__main__":
    flags.DEFINE_multi_string("gin_file", [], "configuration file; later ones override earlier ones")
    flags.DEFINE_multi_string("gin_bindings", [], "single bindings, applied after the files")
    flags.DEFINE_boolean("gin_allow_imports", False, "let gin files import modules, which runs those modules' code")
    flags.DEFINE_string("workdir", None, "folder of the run, or an address such as gs://bucket/run")
    flags.DEFINE_string("init_from", None, "start with the weights of WORKDIR[@STEP] or of a Hugging Face folder")
    flags.DEFINE_boolean("init_state", False, "with --init_from=WORKDIR[@STEP]: its whole state, to go on from there")
    flags.DEFINE_string("profile_steps", None, "START:STOP: write a profiler's trace of these steps into the workdir")
    flags.DEFINE_boolean(
        "deterministic", False, "binds Train.deterministic: the same bits in every run on one kind of GPU; slower"
    )
    flags.DEFINE_string("distributed", None, "'auto' (SLURM, Open MPI) or HOST:PORT,COUNT,INDEX: several processes")
    flags.DEFINE_boolean("dry_run", False, "print parameters, FLOPs, memory and phases, and stop")
    app.run(main)
