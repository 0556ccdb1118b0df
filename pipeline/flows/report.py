"""The run's side of what Prefect shows: the run tells a process of its own (`pipeline.flows.flow`) what became of each
step.

`flow_process` starts that process, in the environment of the user's server (PREFECT_API_URL) or of one of the run's
own. The plan and each step's outcome go out as lines over its stdin. Imports no Prefect.

The invariant: Prefect decides nothing. The user's own server is asked before the run, and refused where it would not
show it. After that no step waits for Prefect, and nothing that happens to it ends the run or changes its exit code: it
is one line on the terminal. At its end the run waits for Prefect's last lines, for a bounded time, and kills the
process.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.errors import Failed
from pipeline.flows.server import API_URL, api_url, own_server, without_user
from pipeline.plan.plan import Planned
from stages.errors import BadInput
from stages.runtime import signals
from stages.runtime.environment import cleaned

IMPORT_PATIENCE, VERDICT_PATIENCE = 300.0, 7.0
"""Seconds that the process may take to import Prefect, and the user's server to answer two requests."""
PATIENCE, STOPPED_PATIENCE = 20.0, 3.0
"""Seconds for the last lines of a run that ended by itself, and of one that a signal stopped."""
OURS = {"PREFECT_API_REQUEST_TIMEOUT": "5", "PREFECT_CLIENT_MAX_RETRIES": "1"}
"""For the user's server: it has 5 s for an answer, and a request is repeated once, for a SQLite server that is well
answers 503 while its database is locked."""
Note = Callable[[str], None]
"""Shows a line on the terminal."""


@contextmanager
def flow_process(home: Path, run: str, note: Note) -> Iterator[FlowProcess | None]:
    """The process that shows the run, on the user's server or on one of its own with its files in `home`. None where
    the run's own server does not start, after a line.

    Raises BadInput when the user's server would not show the run.
    """
    process = None
    with ExitStack() as stack:
        if api_url() is not None:
            process = stack.enter_context(FlowProcess(_users_environment(home), None, note))
            process.ask()
        else:
            try:
                own = stack.enter_context(own_server(home, run))
            except (Failed, OSError) as error:
                note(f"Prefect does not show this run: {error}")
            else:
                note(f"Prefect shows this run at {own.page} (its password: {own.password})")
                process = stack.enter_context(FlowProcess(own.environment, home, note))
        yield process


def _users_environment(home: Path) -> dict[str, str]:
    """The user's variables but those of `stages.runtime.environment`, such as PYTHONPATH. A user without a home gets
    ours, for Prefect does not start without one."""
    environment = {**cleaned(os.environ).variables, **OURS}
    try:
        Path.home()
    except RuntimeError:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment["HOME"] = str(home)
    return environment


class FlowProcess:
    """The other end of `pipeline.flows.flow`; a context manager. Leaving it says how the run ended."""

    def __init__(self, environment: Mapping[str, str], cwd: Path | None, note: Note) -> None:
        self._note = note
        self._buffer = b""
        self._ended = self._begun = False
        """The process will say no more; the run's plan has been sent."""
        with signals.held():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.flows.flow", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # what it has to say is a line of its answers
                env=environment,
                cwd=cwd,
                start_new_session=True,  # Ctrl-C on the terminal is the run's to handle
            )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def ask(self) -> None:
        """Raise BadInput when the user's server would not show the run."""
        url = without_user(api_url() or "")
        said = self._answer(IMPORT_PATIENCE) or {"lost": "Prefect was not imported"}
        if "imported" in said:
            late = f"no Prefect server answers at {url} (no answer within {VERDICT_PATIENCE:g} s). Fix: start it"
            said = self._answer(VERDICT_PATIENCE) or {"complaint": late}
        unusable = f"Prefect's settings for {url} cannot be used ({said.get('lost')}). Fix: look at PREFECT_*"
        if complaint := unusable if "lost" in said else said["complaint"]:
            raise BadInput(f"{API_URL}: {complaint}, unset the variable, or use --no-prefect")

    def begin(self, run: str, planned: list[Planned]) -> None:
        """Show the plan; its first step begins now."""
        reads = {one.step.name: [ref.step for ref in one.step.inputs.values() if ref.step] for one in planned}
        self._begun = True
        self._say({"run": run, "steps": reads})

    def became(self, state: str, text: str = "") -> None:
        """Show what became of the step that is now at its end, and that the next one begins."""
        self._say({"state": state, "text": text[:2000]})
        self._listen(0.0)

    def __enter__(self) -> FlowProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._begun and error is not None:
                self._say({"state": "Failed" if isinstance(error, Exception) else "Stopped", "text": str(error)[:2000]})
            if self._begun:
                self._listen(PATIENCE if error is None or isinstance(error, Exception) else STOPPED_PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with suppress(BrokenPipeError):
                    stream.close()  # type: ignore[union-attr]

    def _say(self, line: dict[str, Any]) -> None:
        """Send a line, without waiting for anybody to read it."""
        if self._ended:
            return
        data = json.dumps(line).encode() + b"\n"
        assert self._process.stdin is not None
        try:
            sent = os.write(self._process.stdin.fileno(), data)
        except OSError:
            sent = 0  # _listen says why
        if sent < len(data):
            self._listen(0.0)
            self._lose("its process does not listen")

    def _listen(self, seconds: float) -> None:
        """Hear what the process says within `seconds`, to its last line where that is among it."""
        ends_at = time.monotonic() + seconds
        while not self._ended:
            said = self._answer(max(0.0, ends_at - time.monotonic()))
            if said is None:
                if seconds:
                    self._lose(f"it did not take the last lines within {seconds:g} s")
                return
            if reason := said.get("complaint") or said.get("lost"):
                self._lose(reason)
            self._ended |= "lost" in said

    def _lose(self, why: str) -> None:
        """One line on the terminal, and no more of it."""
        if not self._ended:
            self._ended = True
            self._note(f"Prefect does not show the rest of this run: {why}")

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """The next line that the process says; None when it says none in time."""
        assert self._process.stdout is not None
        ends_at = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if not select.select([self._process.stdout], [], [], max(0.0, ends_at - time.monotonic()))[0]:
                return None
            if not (read := os.read(self._process.stdout.fileno(), 4096)):
                return {"lost": "its process ended"}
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)
