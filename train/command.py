"""What the programs of this package do around their work."""

import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging


class _Lasting:
    """A text stream that goes on without its reader: what can be written no longer is dropped, in silence."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """As a stream's; characters that the terminal's encoding lacks are written as escapes."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):
            self._drop()
            return len(text)

    def flush(self) -> None:
        """As a stream's."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        """Points the descriptor at nothing: else the bytes still in its buffer fail once more at the end."""
        try:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
        except (OSError, ValueError, AttributeError):
            self._stream = io.StringIO()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_output() -> None:
    """Output is a convenience: a reader that ends (`| head`) or a terminal that goes away stops no work."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell (`>&-`)
            setattr(sys, name, io.StringIO())
        elif not isinstance(stream, _Lasting):
            setattr(sys, name, _Lasting(stream))


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
