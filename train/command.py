"""What the programs of this package do around their work."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import flags, logging

from train.output import outlive_output


def print_error(text: str) -> None:
    """One clear line on stderr."""
    print(f"error: {text}", file=sys.stderr, flush=True)


def keep_compiled_programs() -> None:
    """Compiled programs go to $XDG_CACHE_HOME/venom-jax (~/.cache/venom-jax), so that a resume need not compile again.

    $JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    """
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(root) / "venom-jax"))


DETERMINISTIC_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
"""No kernel is chosen by timing it: another choice in the next process would sum in another order.

Triton's products have good tiles only where they are timed.  XLA's own xla_gpu_deterministic_ops is of no use here: on
an H100 with jax 0.11.2 the trainer fails under it (docs/reliability.md).
"""


def compute_deterministically() -> None:
    """Lets XLA choose the same kernels in every process, by `DETERMINISTIC_FLAGS` behind those of $XLA_FLAGS.

    To be called before anything is computed: XLA reads its flags once.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_FLAGS}".strip()


def print_warning(text: str) -> None:
    """One line on stderr about something that was lost or repaired."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def program(work: Callable[[flags.FlagValues], int | None]) -> Callable[[Sequence[str]], int]:
    """Makes `work(flags)` a main for `absl.app.run` that takes flags only.

    The exit code is 0 or what `work` returns; bad input (ValueError, NotImplementedError) is told in one line, with
    exit code 2.
    """

    @functools.wraps(work)
    def main(argv: Sequence[str]) -> int:
        outlive_output()
        logging.set_verbosity(logging.WARNING)  # orbax tells every checkpoint in a dozen lines
        if len(argv) > 1:
            print_error(f"unexpected arguments {argv[1:]}; see --help")
            return 2
        try:
            return work(flags.FLAGS) or 0
        except (ValueError, NotImplementedError) as error:
            print_error(str(error))
            return 2

    return main
