"""The processes of a job, where no accelerate file says how to start them: forked from the job's own process.

    job --fork, PDEATHSIG--> rank 0, rank 1, ...

The job's process has done its imports and touched no accelerator, so a fork of it is clean and starts at once. It waits
for all ranks. One that fails takes the others along, since they would wait for it for ever."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress

from stages.runtime import ranks, signals
from stages.runtime.process import die_with_parent, forked
from stages.runtime.stopping import STOPPED


def run(processes: int, meeting: str, rank: Callable[[], int]) -> int:
    """Run `rank` in so many processes, which meet through the directory `meeting`; returns the exit code.

    It is that of the first rank that did not end with 0: 128 + its number for one that a signal killed.
    """
    waiting = {_fork(number, processes, meeting, rank) for number in range(processes)}
    code = 0
    while waiting:
        pid, status = os.wait()
        waiting.discard(pid)
        ended = os.waitstatus_to_exitcode(status)
        code = code or (ended if ended >= 0 else 128 - ended)
        if ended not in (0, STOPPED):
            _kill(waiting)
    return code


def _fork(number: int, processes: int, meeting: str, rank: Callable[[], int]) -> int:
    """The pid of a rank."""
    job = os.getpid()

    def life() -> int:
        die_with_parent(job)
        signals.ignore()  # the job's process hears them, and leaves a file for all ranks
        os.environ |= ranks.variables(number, processes, meeting)
        return rank()

    return forked(life)


def _kill(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
