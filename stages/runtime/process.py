"""Processes that cannot outlive the one that needs them (Linux).

A launcher, and what serves it, adopt orphans (`adopt_orphans`), so that every descendant stays findable from them, in
whatever session it put itself. A child asks the kernel to be killed with its parent (`die_with_parent`). `kill_tree`
kills all descendants until none is left.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def forked(life: Callable[[], int]) -> int:
    """The pid of a child that runs `life` and ends with the exit code it returns, with that of a SystemExit, or with 1
    where it raises anything else."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or the child would write it, too
    if pid := os.fork():
        return pid
    code = 1
    try:
        code = life()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    raise AssertionError("a child never comes here")


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
    """The living processes below `root`, without zombies."""
    return _below(root)[0]


def _below(root: int, kill_children: bool = False) -> tuple[set[int], set[int]]:
    """(the living processes below `root`, the zombies among its own children).

    With `kill_children` each living child gets a SIGKILL at the moment it is seen: one that forks the next and ends
    within a millisecond would be gone after a look at all processes."""
    parent_of: dict[int, int] = {}
    zombies: set[int] = set()
    for pid, stat in _processes():
        parent = int(stat[1])
        if stat[0] != "Z":
            parent_of[pid] = parent
            if kill_children and parent == root:
                _sigkill(pid)
        elif parent == root:
            zombies.add(pid)
    below: set[int] = set()
    newest = {root}
    while newest:
        newest = {pid for pid, parent in parent_of.items() if parent in newest and pid not in below}
        below |= newest
    return below, zombies


def _processes() -> Iterator[tuple[int, list[str]]]:
    """(pid, fields of its stat) of every process, zombies too, the newest first."""
    for pid in sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=True):  # noqa: PTH208
        stat = _stat(Path("/proc", str(pid)))
        if stat:
            yield pid, stat


def kill_tree(root: int) -> None:
    """SIGKILL everything below `root` until nothing is left.

    A process may fork the next one and end while we look. It is then a zombie that the look before did not see, so we
    look again."""
    seen: set[int] | None = None
    while True:
        living, zombies = _below(root, kill_children=True)
        if not living and seen is not None and zombies <= seen:
            return
        seen = zombies
        if living:
            _kill(living)


def _kill(pids: set[int]) -> None:
    for pid in pids:
        _sigkill(pid)
    time.sleep(0.02)


def _sigkill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def started_at(pid: int) -> str | None:
    """The start of a process in clock ticks since boot, which together with the pid identifies it. None when there is
    no such process."""
    stat = _stat(Path("/proc", str(pid)))
    if not stat or stat[0] == "Z":
        return None
    return stat[19]


def _stat(proc: Path) -> list[str] | None:
    """The fields of /proc/<pid>/stat after the command's name: state, parent, ..."""
    try:
        stat = (proc / "stat").read_bytes()  # a name may hold any bytes, and be cut within a letter
        return stat.rpartition(b")")[2].decode("ascii").split()
    except OSError:
        return None


def marked(mark: str) -> set[int]:
    """Living processes whose environment holds `mark` (NAME=value), anywhere in the process tree."""
    pids: set[int] = set()
    for pid, stat in _processes():
        try:
            environment = Path("/proc", str(pid), "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if stat[0] != "Z" and mark.encode() in environment:
            pids.add(pid)
    return pids


def kill_marked(mark: str) -> None:
    """SIGKILL every process but this one whose environment holds `mark`, until none is left."""
    pids = marked(mark) - {os.getpid()}
    while pids:
        _kill(pids)
        pids = marked(mark) - {os.getpid()}
