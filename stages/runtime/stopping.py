"""How a stage is asked to stop: SIGTERM, SIGHUP or Ctrl-C leaves a file in `work`, which training looks for after every
optimiser step. One signal more is the same wish, since the launcher and a machine that ends its whole tree both send
one. A second Ctrl-C, and any signal to a stage that has nothing to save, ends it at once.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from stages.job import Job
from stages.runtime import signals

FILE = "stop"
STOPPED = 143
"""Exit code of a stage that was asked to stop, and did: 128 + SIGTERM."""


def listen(job: Job, saves: bool) -> None:
    """Take signals from now on. `saves`: the stage looks for the file."""

    def ask(number: int) -> None:
        if not saves:
            signals.ignore()  # one is enough
            sys.exit(STOPPED)
        Path(job.work, FILE).touch()
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    signals.ignore(ask)


def asked(job: Job) -> bool:
    """Whether the stage was asked to stop."""
    return Path(job.work, FILE).exists()
