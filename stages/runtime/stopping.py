"""How a stage is asked to stop: SIGTERM (or Ctrl-C where it runs on a terminal) leaves a file in `work`, which training
looks for after every optimiser step. A second signal, and any signal to a stage that has nothing to save, ends it at
once.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

from stages.job import Job

FILE = "stop"
STOPPED = 143
"""Exit code of a stage that was asked to stop, and did: 128 + SIGTERM."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def listen(job: Job, saves: bool) -> None:
    """Take signals from now on. `saves`: the stage looks for the file."""

    def ask(number: int, frame: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        if not saves:
            sys.exit(STOPPED)
        Path(job.work, FILE).touch()

    for number in SIGNALS:
        signal.signal(number, ask)


def asked(job: Job) -> bool:
    """Whether the stage was asked to stop."""
    return Path(job.work, FILE).exists()
