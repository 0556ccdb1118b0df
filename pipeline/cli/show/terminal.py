"""The one way to the terminal: a console for tables and coloured text, `write` for lines, `write_error` for stderr.

Whatever is printed passes through `visible`, so no name, message or completion moves the cursor, sets a title or
reorders a line. The console's own colours stay."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from stages.visible import visible

LONGEST = 4000
"""Characters of a line on stderr; of a longer one its beginning and its end are shown."""


class _Console(Console):
    """A console that shows text as it is, and that stops printing when its pipe is closed, so that a training run
    continues."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of rich, each with its text made visible."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))

    def on_broken_pipe(self) -> None:
        """Print nothing any more; rich would exit."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> Console:
    """A console as wide as the terminal; 200 columns when piped."""
    terminal = _plain()
    return terminal if terminal.is_terminal else _plain(width=200)


def _plain(width: int | None = None) -> Console:
    """A console to which a string is no mark-up: colours are those of Text."""
    return _Console(highlight=False, markup=False, emoji=False, width=width)


def write(text: str) -> None:
    """Print lines on stdout."""
    print(visible(text))


def write_error(text: str) -> None:
    """Print one line on stderr."""
    line = visible(" ".join(text.split()))
    half = LONGEST // 2
    print(line if len(line) <= LONGEST else f"{line[:half]} [...] {line[-half:]}", file=sys.stderr)
