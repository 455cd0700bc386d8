"""Output that outlives its reader."""

import io
import os
import sys
from typing import Any


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
