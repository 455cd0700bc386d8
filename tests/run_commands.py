"""Runs lines such as `python -m train.main --workdir=a`, one a line of standard input, in one process.

Importing jax anew for each would take most of the time.  Prints `exit CODE` after each.
"""

import runpy
import shlex
import sys
import warnings
from importlib.util import find_spec

from absl import flags


def run(line: str) -> int:
    """The exit code of one command; its flags are forgotten again."""
    _, _, module, *arguments = shlex.split(line)
    spec = find_spec(module)
    assert spec is not None
    sys.argv = [str(spec.origin), *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        for flag in flags.FLAGS.get_flags_for_module(sys.argv[0]):  # so absl calls what __main__ has defined
            delattr(flags.FLAGS, flag.name)
        flags.FLAGS.unparse_flags()
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # runpy warns of modules that another command has imported
    for command in sys.stdin.read().splitlines():
        code = run(command)
        sys.stderr.flush()
        print(f"exit {code}", flush=True)
