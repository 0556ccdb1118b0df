"""Processes that cannot outlive the one that needs them (Linux).

A launcher, and what serves it, adopt orphans (`adopt_orphans`), so that every descendant stays findable from them, in
whatever session it put itself. A child asks the kernel to be killed with its parent (`die_with_parent`). `kill_tree`
kills all descendants until none is left.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent dies (PR_SET_CHILD_SUBREAPER)."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """SIGKILL this process when the thread that started it ends. `parent` is its pid, looked at in case it ended before
    we asked."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def outlive_parent() -> None:
    """Take `die_with_parent` back."""
    _libc.prctl(PR_SET_PDEATHSIG, 0)


def descendants(root: int) -> set[int]:
    """The living processes below `root`, zombies left out."""
    parent_of: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(entry)) and stat[0] != "Z":
            parent_of[int(entry.name)] = int(stat[1])
    found: set[int] = set()
    grown = {root}
    while grown:
        grown = {pid for pid, parent in parent_of.items() if parent in grown and pid not in found}
        found |= grown
    return found


def kill_tree(root: int) -> None:
    """SIGKILL everything below `root` until nothing is left."""
    while left := descendants(root):
        _kill(left)


def _kill(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    time.sleep(0.02)


def started_at(pid: int) -> str | None:
    """When a process started, in clock ticks since boot: with the pid, its name for ever. None when there is no such
    process."""
    stat = _stat(Path("/proc", str(pid)))
    return stat[19] if stat and stat[0] != "Z" else None


def _stat(proc: Path) -> list[str] | None:
    """The fields of /proc/<pid>/stat after the command's name: state, parent, ..."""
    try:
        stat = (proc / "stat").read_bytes()  # a name may hold any bytes, and be cut within a letter
        return stat.rpartition(b")")[2].decode("ascii").split()
    except OSError:
        return None


def marked(mark: str) -> set[int]:
    """Living processes whose environment holds `mark` (NAME=value), wherever they are in the tree."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(entry)) and stat[0] != "Z":
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark.encode() in environment:
                found.add(int(entry.name))
    return found


def kill_marked(mark: str) -> None:
    """SIGKILL every process whose environment holds `mark`, until none is left; this one is spared."""
    while left := marked(mark) - {os.getpid()}:
        _kill(left)
