"""The streams of a job, which its log is made of.

Whatever Python prints there is made visible first: tracebacks, warnings of libraries, messages that quote a model's
template or its completions. A log that is shown on a terminal moves no cursor and hides no line."""

from __future__ import annotations

import io
import sys

from stages.visible import visible


class _VisibleStream(io.TextIOWrapper):
    """A stream to which no control character is written."""

    def write(self, s: str, /) -> int:
        """Write the text with escapes, and say that all of it was written. A progress bar begins its line again with
        each of its states, and here each has a line of its own."""
        super().write(visible(s.replace("\r", "\n")))
        return len(s)


def make_visible() -> None:
    """Put such streams in place of stdout and stderr, before any library keeps one of them."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    sys.stdout, sys.stderr = _opened(1), _opened(2)


def _opened(fd: int) -> _VisibleStream:
    binary = io.open(fd, "wb", closefd=False)  # noqa: SIM115, UP020 - as long as the process
    return _VisibleStream(binary, encoding="utf-8", errors="backslashreplace", line_buffering=True)
