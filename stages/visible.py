"""Text that is not ours, as a terminal or a log may hold it.

a message of a model's template, an exception or print of user code, a name in somebody's manifest -> the same text,
with an escape in place of every character that a terminal obeys or hides: control characters (ESC and with it all ANSI
and OSC sequences, C1), marks of direction, zero-width characters, line separators and lone surrogates. Letters of every
script and all blanks stay as they are. Standard library only."""

from __future__ import annotations

import unicodedata

LINES = "\n\t"
"""What a text of several lines may hold besides."""


def visible(text: str, keep: str = LINES) -> str:
    """`text` with Python's escape for each character that is not printable, but for blanks and those in `keep`."""
    if text.isprintable():  # as nearly every text
        return text
    return "".join(char if char in keep or _is_shown(char) else repr(char)[1:-1] for char in text)


def _is_shown(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"
