"""A trace of a few optimizer steps: `python -m train.main ... --profile_steps=100:105`.

The trace lies in the workdir's folder `profile/`; TensorBoard (with its plug-in xprof) and Perfetto show it.
"""

import re
from pathlib import Path
from typing import Any

import jax

FOLDER = "profile"


def parse_steps(text: str | None, steps: int) -> range:
    """'START:STOP' -> the steps START to STOP - 1, counted from 0; none for None.

    Raises:
      ValueError: another form, an empty range, or one that ends after the run.
    """
    if text is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise ValueError(f"--profile_steps={text} must read START:STOP, such as 100:105")
    start, stop = map(int, match.groups())
    if start >= stop or stop > steps:
        raise ValueError(f"--profile_steps={text} must have START < STOP <= Train.steps={steps}")
    return range(start, stop)


class Profiler:
    """Traces the steps of a range; a run that starts or stops inside the range traces what it runs of it."""

    def __init__(self, steps: range, workdir: Path):
        self._steps, self.folder = steps, workdir / FOLDER
        self._active = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._active:
            self._stop()

    def before(self, step: int, state: Any) -> None:
        """Called before the optimizer step number ``step`` (from 0); waits for ``state`` where the trace begins."""
        if step in self._steps and not self._active:
            jax.block_until_ready(state)  # what was dispatched earlier does not belong into the trace
            jax.profiler.start_trace(str(self.folder))
            self._active = True

    def after(self, step: int, state: Any) -> bool:
        """Called after the step has been dispatched; True where it was the last of the trace."""
        if not self._active or step + 1 in self._steps:
            return False
        jax.block_until_ready(state)
        self._stop()
        return True

    def _stop(self) -> None:
        self._active = False
        jax.profiler.stop_trace()
