"""Every exception of `pipeline`, besides BadInput of `stages.errors`, and the exit code each ends a command with.

    BadInput 2    Failed 1    Refused 3    RunInterrupted 130    Terminated 143    any other exception 1

The message is one line, `where: problem (found X, expected Y). Fix: ...`, and all that a user sees: `pipeline.cli`
prints no traceback."""

from __future__ import annotations

from stages.errors import BadInput


class Failed(RuntimeError):
    """A command could not do what it was asked for, and its input is not to blame."""


class StageFailed(Failed):
    """A job of a stage ended without a result, or with one that cannot be published. The line names its log."""


class PushFailed(Failed):
    """The hub could not take an upload. Trying again may help."""


class Refused(RuntimeError):
    """A measurement speaks against going on: an alias does not move, or a run does not train. The line holds the
    numbers."""


class RunInterrupted(Exception):
    """Ctrl-C ended a run."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP, as an exception, so that every `finally` runs."""


class NotComparable(ValueError):
    """Two policies have no evaluations that can be compared; the line says why."""


class UnsafeFile(ValueError):
    """A file that must not be published."""


class Damaged(BadInput):
    """A file in a store does not hold the bytes that were put. The line names it."""


class Unreadable(BadInput):
    """A read failed (permissions, network). The content is unknown: never treat it as missing or damaged."""
