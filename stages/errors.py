"""Every exception that a stage, or what a stage is made of, may raise. Standard library only.

A line of text goes in, and `error.json` and an exit code come out (`stages.runtime.worker`): 2 for BadInput, 143 for
StageStopped, 1 for anything else. The message of BadInput and TooManyFailures is all that a user needs: `where:
problem (found X, expected Y). Fix: ...`."""

from __future__ import annotations


class BadInput(ValueError):
    """The user gave something that cannot be used. One line: where, what was found, what was expected and how to fix
    it."""


class TooFew(BadInput):
    """A range asks for more rows than there are. The caller that knows the range's field names it."""

    def __init__(self, message: str, there: int) -> None:
        super().__init__(message)
        self.there = there
        """Rows that the split has."""


class TooManyFailures(RuntimeError):
    """User code failed more often than `max_failures` allows."""


class NoSignal(RuntimeError):
    """A stage's rewards said nothing about its rollouts, so it would publish what it was given. Nothing is
    published, and the run ends as one that an audit refuses."""


class StageStopped(Exception):
    """A stage that was asked to stop has saved a checkpoint and ends early."""


class CodeRefused(Exception):
    """User code was imported and cannot be used: a function is missing, or has other parameters. Raised in the user's
    process only."""


class CallFailed(Exception):
    """A call of user code returned something that is not an answer. Raised in the user's process only; `kind` is the
    failure it is counted as."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def printable(text: str) -> str:
    """`text` where a terminal shows it as it is; else quoted, escaped and cut to 200 characters."""
    return text if text.isprintable() and 0 < len(text) <= 200 else repr(text[:200])


class NoSmallCopy(Exception):
    """There is no small model of an architecture to try things on."""
