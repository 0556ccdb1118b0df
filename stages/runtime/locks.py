"""Exclusive locks on open files and directories (flock).

The kernel frees a lock when its last holder ends, however that ends. A child that inherits the descriptor holds the
lock too. A holder may write its pid into the file, so that a process that waits can name it."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from stages.runtime.process import started_at

RETRY = 0.1
"""Seconds between two attempts to get a lock."""

Lockable = IO[str] | int
"""An open file, or a file descriptor."""


def lock(file: Lockable) -> None:
    """Wait until this process holds the lock."""
    fcntl.flock(file, fcntl.LOCK_EX)


def try_lock(file: Lockable) -> bool:
    """Whether this process holds the lock now. Never waits."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_within(file: Lockable, seconds: float) -> bool:
    """Whether this process got the lock within `seconds`."""
    ends_at = time.monotonic() + seconds
    while not try_lock(file):
        if time.monotonic() > ends_at:
            return False
        time.sleep(RETRY)
    return True


def write_holder(file: IO[str]) -> None:
    """Write this process's pid into the file of a lock that it holds."""
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


def erase_holder(file: IO[str]) -> None:
    """Remove the pid, before the lock is freed."""
    file.truncate(0)


def holder(file: IO[str], seconds: float = 0.0) -> str:
    """The pid in the file, or that of a process which inherited the lock from one that has ended; "" where neither is
    found within `seconds`."""
    ends_at = time.monotonic() + seconds
    while True:
        file.seek(0)
        pid = file.read().strip()
        if pid and started_at(int(pid)):
            return pid
        if time.monotonic() > ends_at:
            return _inheritor(file)
        time.sleep(RETRY / 2)


def _inheritor(file: IO[str]) -> str:
    """The pid of a process with a descriptor that holds the lock, as /proc tells; "" where none can be seen."""
    wanted = os.fstat(file.fileno())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.path.samestat(descriptor.stat(), wanted):
                process = descriptor.parents[1]
                if "FLOCK" in (process / "fdinfo" / descriptor.name).read_text():
                    return process.name
        except OSError:  # it has ended, or is not ours to look at
            continue
    return ""
