"""What the programs of this package do around their work."""

import functools
import sys
from collections.abc import Callable, Sequence

from absl import flags, logging


def print_error(text: str) -> None:
    """One clear line on stderr."""
    print(f"error: {text}", file=sys.stderr, flush=True)


def program(work: Callable[[flags.FlagValues], int | None]) -> Callable[[Sequence[str]], int]:
    """Makes `work(flags)` a main for `absl.app.run` that takes flags only.

    The exit code is 0 or what `work` returns; bad input (ValueError, NotImplementedError) is told in one line, with
    exit code 2.
    """

    @functools.wraps(work)
    def main(argv: Sequence[str]) -> int:
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
