"""Crashes at every step: a child does something, and is killed just before the n-th change it would make to the file
system.

Nothing in the product knows of it. The child is forked, installs an audit hook (`sys.addaudithook`), and counts what
Python is about to do below the watched directories: open for writing, rename, link, remove, mkdir, rmdir, truncate,
shutil's copies. What native code writes by itself (safetensors, torch.save, parquet) has no event of its own; the
renames and records around it do.

    points(action, root)              every point that the action passes, by name; the action is run to its end
    crash_at(action, root, n, mode)   the action again, killed at point n: True; or to its end,
                                     where it has no such point: False
    stopped_at(action, root, n)       the action again, standing still at point n while the block runs,
                                     so that something else can happen there

`before` kills just before the change; `torn` first puts half a line of rubbish into the file that was to be written.
Works in a process that has imported torch, as long as the action does not need another thread of it."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Action = Callable[[], object]
Roots = Path | tuple[Path, ...]
Mode = Literal["before", "torn"]
PATIENCE = 120
"""Seconds that a child may take."""
FAILED = 70
"""Exit code of a child whose action raised."""
RUBBISH = b'{"torn": "half a li'
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
PATHS: dict[str, int] = {
    "os.rename": 1, "os.link": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.truncate": 0, "os.symlink": 1,
    "shutil.copyfile": 1, "shutil.copytree": 1, "shutil.move": 1, "shutil.rmtree": 0,
}  # fmt: skip
"""Event -> which of its arguments is the path that changes."""
DIR_FDS: dict[str, int] = {"os.rename": 3, "os.link": 3, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1}
"""Event -> which of its arguments is the directory that the path counts from; -1 for the working directory."""
MADE_UP = (
    (r"[0-9a-f]{64}", "KEY"),
    (r"[0-9a-f]{32}", "HEX"),
    (r"\d{8}-\d{6}-[0-9a-f]{4}", "RUN"),
    (r"-[0-9a-f]{8}\b", "-ID"),
    (r"\b\d{6}\b", "N"),
)
"""What differs from run to run in a path, and what stands for it."""


def points(action: Action, root: Roots) -> list[str]:
    """The names of all points, in order; equal names where an action does the same thing twice."""
    with tempfile.NamedTemporaryFile("r") as said:
        _forked(action, _Hook(root, report=Path(said.name)))
        return said.read().splitlines()


def crash_at(action: Action, root: Roots, n: int, mode: Mode = "before") -> bool:
    """Whether the action was killed: at its point `n`, from 0."""
    return _forked(action, _Hook(root, kill_at=n, mode=mode))


@contextmanager
def stopped_at(action: Action, root: Roots, n: int) -> Iterator[bool]:
    """Whether the action stands still, at its point `n`; it goes on to its end after the block. False: it has no such
    point, and has ended."""
    with tempfile.TemporaryFile("w+") as errors:
        child = _fork(action, _Hook(root, kill_at=n, signal=signal.SIGSTOP), errors)
        _, status = os.waitpid(child, os.WUNTRACED)
        stands = os.WIFSTOPPED(status)
        try:
            yield stands
        finally:
            if stands:
                os.kill(child, signal.SIGCONT)
                _, status = os.waitpid(child, 0)
        _well(status, errors)


def is_write(point: str) -> bool:
    """Whether a point writes a file, so that it can be torn."""
    return point.startswith("open ")


class _Hook:
    """Counts points in the child; at one of them the child ends."""

    def __init__(
        self,
        root: Roots,
        report: Path | None = None,
        kill_at: int = -1,
        mode: Mode = "before",
        signal: int = signal.SIGKILL,
    ) -> None:
        roots = root if isinstance(root, tuple) else (root,)
        self.roots = [str(one.absolute()) for one in roots]
        self.report, self.kill_at, self.mode, self.signal = report, kill_at, mode, signal
        self.passed, self.busy = 0, False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.busy or not (event in PATHS or event == "open"):
            return
        self.busy = True  # what is done here has events, too
        try:
            if path := self._changed(event, arguments):
                self._pass(event, path, arguments)
        finally:
            self.busy = False

    def _changed(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        """The path that is about to change below the watched directories; None for any other event."""
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return None
        path = arguments[PATHS.get(event, 0)]
        if not isinstance(path, (str, bytes)):
            return None  # an open descriptor
        base = arguments[DIR_FDS[event]] if event in DIR_FDS else -1
        start = Path(f"/proc/self/fd/{base}").readlink() if isinstance(base, int) and base >= 0 else Path.cwd()
        full = os.path.normpath(start / os.fsdecode(path))
        return full if any(full == root or full.startswith(root + "/") for root in self.roots) else None

    def _pass(self, event: str, path: str, arguments: tuple[Any, ...]) -> None:
        if self.report:
            with self.report.open("a") as file:
                file.write(f"{event} {self._named(path)}\n")
        if self.passed == self.kill_at:
            if event == "open" and self.mode == "torn" and not Path(path).is_dir():
                _tear(path, arguments[2])
            os.kill(os.getpid(), self.signal)
        self.passed += 1

    def _named(self, path: str) -> str:
        root = next(root for root in self.roots if path.startswith(root))
        name = path.removeprefix(root).lstrip("/") or "."
        for pattern, stands_for in MADE_UP:
            name = re.sub(pattern, stands_for, name)
        return name


def _tear(path: str, flags: int) -> None:
    """Half a line, where the file would have been written from: its start, or its end."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | (flags & (os.O_APPEND | os.O_TRUNC)), 0o644)
    os.write(descriptor, RUBBISH)


def _forked(action: Action, hook: _Hook) -> bool:
    """Run an action in a child; whether the hook killed it. Raises AssertionError with the traceback when it failed by
    itself."""
    with tempfile.TemporaryFile("w+") as errors:
        _, status = os.waitpid(_fork(action, hook, errors), 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return True
        _well(status, errors)
        return False


def _fork(action: Action, hook: _Hook, errors: Any) -> int:
    """A child that does the action under the hook; its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _live(action, hook, errors)
    return child


def _well(status: int, errors: Any) -> None:
    errors.seek(0)
    assert status == 0, f"the child ended with status {status}:\n{errors.read()}"


def _live(action: Action, hook: _Hook, errors: Any) -> None:
    """The child's life; it never returns."""
    code = FAILED
    try:
        signal.alarm(PATIENCE)
        sys.addaudithook(hook)
        action()
        code = 0
    except BaseException:
        hook.busy = True
        traceback.print_exc(file=errors)
        errors.flush()
    finally:
        os._exit(code)
