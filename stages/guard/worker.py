"""The stage's side of one worker: a supervisor, and its child that runs user code (`stages.guard.user_process`).

requests --pipe--> worker --pipe--> replies, lines of JSON in order. A Worker never waits: `look` takes what is there.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from stages.guard.redaction import redacted
from stages.guard.user_process import AGAIN
from stages.runtime import environment
from stages.runtime.process import descendants, kill_marked, kill_tree
from stages.runtime.signals import held, overslept

MARK = "SWITCHBACK_GUARD"
"""Environment variable that names a worker. Its forks inherit the variable, so they are found in any session."""
TAIL = 4000
"""Bytes of what a worker printed that are kept."""
LONGEST = 256 * 2**20
"""Bytes that a reply may have, such as all rows of a range; a worker that writes more is killed."""
ITS_OWN = 2
"""Processes of a worker: the supervisor and its child."""
SWEEPS = 20
"""How often what a call left behind is looked for, where it forks while it is killed."""
TICK = 0.5
"""Seconds between two looks at a worker, at most. Of what one takes longer, this process was stopped or had no core,
and user code is not charged for it."""
LOAD = -1
"""The number of a worker's first request: import the user's code."""


class Reply(NamedTuple):
    """The result of a call."""

    value: Any
    """JSON; None when it failed."""
    failure: str | None = None
    """timeout, crash, exception, not_a_number, ...; None: it answered."""
    message: str = ""
    """The reason of the failure, in one line."""


class Lines(NamedTuple):
    """Payloads as the lines that a worker reads."""

    call: str
    payloads: Sequence[Any]

    def line(self, i: int) -> bytes:
        """The request for a payload."""
        return json.dumps({"id": i, "call": self.call, "with": self.payloads[i]}).encode() + b"\n"


class Worker:
    """The stage's side of one supervisor and its child."""

    def __init__(self, target: str, spec: dict[str, Any], import_seconds: float) -> None:
        self.mark = f"{MARK}={uuid.uuid4().hex}"
        reads, self.requests = os.pipe2(os.O_CLOEXEC)
        self.replies, writes = os.pipe2(os.O_CLOEXEC)
        self.output, prints = os.pipe2(os.O_CLOEXEC)
        command = [sys.executable, "-P", "-m", "stages", "--guarded", str(os.getpid()), str(reads), str(writes)]
        name, _, value = self.mark.partition("=")
        variables = environment.cleaned(os.environ).variables
        env = {**variables, name: value, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
        with held():
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=prints,
                stderr=prints,
                pass_fds=(reads, writes),
                env=env,
                start_new_session=True,
            )
        for fd in (reads, writes, prints):
            os.close(fd)
        self.ended = os.pidfd_open(self.process.pid)
        for fd in (self.requests, self.replies, self.output):
            os.set_blocking(fd, False)
        self.asked, self.kept, self.spoilt = deque[int]([LOAD]), {self.process.pid}, False
        self.outgoing = bytearray(json.dumps({"id": LOAD, "call": target, "with": spec}).encode() + b"\n")
        self.incoming, self.tail = bytearray(), bytearray()
        self.limit, self.looked = import_seconds, time.monotonic()
        self.ends_at = self.looked + import_seconds

    def take(self, waiting: deque[int], share: int, lines: Lines, limit: float) -> None:
        """Ask for as many as its share; nothing while it imports."""
        if LOAD in self.asked:
            return
        if not self.asked:
            self.looked = time.monotonic()
            self.ends_at = self.looked + limit
        self.limit = limit
        while waiting and len(self.asked) < share:
            self.asked.append(waiting.popleft())
            self.outgoing += lines.line(self.asked[-1])

    def look(self) -> tuple[list[tuple[int, Reply]], bool]:
        """(what was answered, whether the worker is lost). Nothing here waits."""
        over = self.process.poll() is not None
        self.ends_at += overslept(self.looked, TICK)
        self.looked = time.monotonic()
        self._send()
        self._read_output()
        found, sound = self._answers()
        if self.spoilt or not self.asked:
            return found, self.spoilt or over or not sound
        if over or not sound:
            return [*found, *self._failed_first("crash", self._how_it_ended())], True
        if self.looked > self.ends_at:
            return [*found, *self._failed_first("timeout", f"no answer within {self.limit:g} s")], True
        return found, False

    def sweep(self) -> None:
        """Kill the descendants that calls started. Those of the import stay; a worker that still imports has none."""
        if LOAD in self.asked:
            return
        for _ in range(SWEEPS):
            started = descendants(self.process.pid) - self.kept
            if not started:
                return
            for pid in started:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the worker and all its descendants, in any session."""
        # A stopped supervisor still adopts orphans, and does not end when its child does. The signal goes through the
        # Popen handle, since the pid may be reused once the supervisor has ended.
        self.process.send_signal(signal.SIGSTOP)
        kill_tree(self.process.pid)
        self.process.kill()
        self.process.wait()
        kill_marked(self.mark)
        for fd in (self.requests, self.replies, self.output, self.ended):
            os.close(fd)

    def _failed_first(self, failure: str, message: str) -> list[tuple[int, Reply]]:
        """The failed reply of the current call; another worker gets the remaining requests."""
        if not self.asked:
            return []
        return [(self.asked.popleft(), Reply(None, failure, self._with_tail(message)))]

    def _with_tail(self, message: str) -> str:
        printed = " ".join(self.tail.decode(errors="replace").split())[-300:]
        if not printed:
            return message
        return redacted(f"{message}; it printed last: {printed}")

    def _how_it_ended(self) -> str:
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            if len(self.incoming) > LONGEST:
                return f"its answer is longer than {LONGEST // 2**20} MiB; ask for less at a time"
            return "it closed the guard's own pipe, or wrote into it"
        number = -code if code < 0 else code - 128
        if number in {each.value for each in signal.Signals}:
            return f"its process was killed by {signal.Signals(number).name}"
        return f"its process ended with exit code {code}"

    def _send(self) -> None:
        with suppress(BlockingIOError, BrokenPipeError):
            while self.outgoing:
                del self.outgoing[: os.write(self.requests, self.outgoing[: 2**16])]

    def _read_output(self) -> None:
        for _ in range(64):  # a bound, since a worker may print without end
            data = _read(self.output)
            if not data:
                return
            self.tail = (self.tail + data)[-TAIL:]

    def _answers(self) -> tuple[list[tuple[int, Reply]], bool]:
        """(replies that arrived, whether the pipe is still intact)."""
        data = _read(self.replies)
        while data:
            self.incoming += data
            if len(self.incoming) > LONGEST:
                return [], False
            data = _read(self.replies)
        intact = data is None
        replies: list[tuple[int, Reply]] = []
        for line in self._complete_lines():
            expected = self.asked[0] if self.asked else None
            reply = _reply(line, expected)
            if reply is None:
                return replies, False
            if reply.failure == AGAIN:
                # an import that was hit is not made twice in one process; what it left running may have ended
                self.spoilt = expected == LOAD or len(self.kept) > ITS_OWN
                self.ends_at = time.monotonic() + self.limit
                if self.spoilt:
                    break
                continue
            if expected == LOAD:
                self.kept |= descendants(self.process.pid)
            replies.append((self.asked.popleft(), reply))
            self.ends_at = time.monotonic() + self.limit
            self.tail.clear()
        return replies, intact

    def _complete_lines(self) -> list[bytes]:
        """The complete lines of `incoming`, which keeps the rest."""
        if b"\n" not in self.incoming:  # a long line arrives in many parts: do not copy it for each
            return []
        *lines, rest = bytes(self.incoming).split(b"\n")
        self.incoming = bytearray(rest)
        return lines


def _reply(line: bytes, expected: int | None) -> Reply | None:
    """The reply in a line; None for any line but the answer to request `expected`."""
    try:
        reply = json.loads(line)
        if reply["id"] != expected:
            return None
        failure = reply["failure"] and str(reply["failure"])
        message = str(reply["message"]).encode(errors="backslashreplace").decode()
        return Reply(reply["value"], failure, redacted(message))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _read(fd: int) -> bytes | None:
    """The bytes in a pipe; b"" at its end, None for an empty pipe."""
    try:
        return os.read(fd, 2**16)
    except BlockingIOError:
        return None


def wait(workers: Sequence[Worker]) -> None:
    """Until a worker says something, can be written to, ends, or is out of time, but no longer than TICK."""
    poll = select.poll()
    for worker in workers:
        for fd in (worker.replies, worker.output, worker.ended):
            poll.register(fd, select.POLLIN)
        if worker.outgoing:
            poll.register(worker.requests, select.POLLOUT)
    left = min((worker.ends_at for worker in workers if worker.asked), default=0.0) - time.monotonic()
    poll.poll(min(TICK, max(0.0, left)) * 1000 + 1)
