"""Processes that cannot outlive the one that needs them (Linux).

A launcher, and what serves it, adopt orphans (`adopt_orphans`), so that every descendant stays findable from them, in whatever session it put
itself. A child asks the kernel to be killed with its parent (`die_with_parent`). `kill_tree` kills all descendants until none is left.
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
    """SIGKILL this process when the thread that started it ends. `parent` is its pid, looked at in case it ended before we asked."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def outlive_parent() -> None:
    """Take `die_with_parent` back."""
    _libc.prctl(PR_SET_PDEATHSIG, 0)


def descendants(root: int) -> set[int]:
    """The living processes below `root`, zombies left out."""
    return _below(root)[0]


def _below(root: int) -> tuple[set[int], set[int]]:
    """(the living processes below `root`, the zombies among its own children)"""
    parent_of: dict[int, int] = {}
    ended: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(entry)):
            pid, parent = int(entry.name), int(stat[1])
            if stat[0] != "Z":
                parent_of[pid] = parent
            elif parent == root:
                ended.add(pid)
    found: set[int] = set()
    grown = {root}
    while grown:
        grown = {pid for pid, parent in parent_of.items() if parent in grown and pid not in found}
        found |= grown
    return found, ended


def kill_tree(root: int) -> None:
    """SIGKILL everything below `root` until nothing is left. What forked the next and ended while we looked is a zombie that was not there the last time: we look
    again."""
    seen: set[int] | None = None
    while True:
        _kill_children(root)
        living, ended = _below(root)
        if not living and seen is not None and ended <= seen:
            return
        seen = ended
        if living:
            _kill(living)


def _kill_children(root: int) -> None:
    """SIGKILL each at the moment that it is seen, the newest first: what forks and ends within a millisecond is gone after a look at all processes."""
    for pid in sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=True):  # noqa: PTH208
        if (stat := _stat(Path("/proc", str(pid)))) and stat[0] != "Z" and int(stat[1]) == root:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _kill(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    time.sleep(0.02)


def started_at(pid: int) -> str | None:
    """When a process started, in clock ticks since boot: with the pid, its name for ever. None when there is no such process."""
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
