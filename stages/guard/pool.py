"""Runs user code in worker processes. A call that hangs, crashes, prints or forks costs one answer, and its process is
killed and replaced.

payloads -> one Reply each, in order. A worker is two processes: a supervisor, which user code sees as its parent, and
its child, which imports the user code once and then answers (`stages.guard.user_process`). Both die with the stage.
Requests and replies are lines of JSON over separate pipes, never pickle. Only the end of the output of user code is
kept.

The invariant: `map` returns a Reply for every payload, after at most the time limit for each, and kills every process
that a call started. The guard protects against accidents and against graded models, not against the author of the code,
which has all rights of its user.
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
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from stages.errors import BadInput, TooManyFailures
from stages.guard.redaction import redacted
from stages.runtime import environment, ranks
from stages.runtime.process import descendants, kill_marked, kill_tree

MARK = "SWITCHBACK_GUARD"
"""Environment variable that names a worker. Its forks inherit the variable, so they are found in any session."""
IMPORT_LIMIT = 120.0
"""Seconds that user code may take to be imported."""
AHEAD = 32
"""Requests that are sent to a worker before it answered the first."""
TAIL = 4000
"""Bytes of what a worker printed that are kept."""
LONGEST = 256 * 2**20
"""Bytes that a reply may have, such as all rows of a range; a worker that writes more is killed."""
FEWEST = 100
"""Failures are a share of at least so many answers, so that one bad answer of ten stops nothing."""
SWEEPS = 20
"""How often what a call left behind is looked for, where it forks while it is killed."""
REFUSED = "refused"
"""The failure of code that cannot be used at all (`CodeRefused`). It costs no answer but stops the stage."""
LOAD = -1
"""The number of a worker's first request: import the user's code."""


class Limits(NamedTuple):
    """Limits of user code."""

    seconds: float
    """Wall-clock time of one call."""
    failures: float
    """Share of answers (of at least FEWEST) that may fail. 1 = any number."""
    workers: int | None = None
    """None: one a core, shared by the ranks."""
    import_seconds: float = IMPORT_LIMIT


class Reply(NamedTuple):
    """The result of a call."""

    value: Any
    """JSON; None when it failed."""
    failure: str | None = None
    """timeout, crash, exception, not_a_number, ...; None: it answered."""
    message: str = ""
    """The reason of the failure, in one line."""


class Guard:
    """A pool of workers with the same user code; they start when they are needed and end with the guard, or with this
    process."""

    def __init__(self, target: str, spec: dict[str, Any], limits: Limits) -> None:
        self.target, self.spec, self.limits = target, spec, limits
        self._most = limits.workers or max(1, len(os.sched_getaffinity(0)) // ranks.world())
        self._workers: list[_Worker] = []
        self._about: Any = None
        self.judged, self._failed, self.first = 0, Counter[str](), ""
        self._finalizer = weakref.finalize(self, _end, self._workers)

    def about(self) -> Any:
        """The facts that the user's code reports after its import. Raises BadInput when the import fails."""
        while self._about is None:
            self._start(1)
            self._turn(deque(), {})
        return self._about

    def one(self, call: str, payload: Any, seconds: float | None = None) -> Any:
        """The value of one call that must not fail. Raises BadInput, one line, when it does."""
        reply = self.map(call, [payload], seconds)[0]
        if reply.failure:
            raise BadInput(
                f"{self.spec['name']}: {call} failed ({reply.failure}): {reply.message}; fix it and run again"
            )
        return reply.value

    def one_afresh(self, call: str, payload: Any, seconds: float | None = None) -> Any:
        """`one` in a worker that was asked nothing before. All others end first, so there are never more than the
        limit."""
        _end(self._workers)
        return self.one(call, payload, seconds)

    def map(
        self, call: str, payloads: Sequence[Any], seconds: float | None = None, counted: bool = False
    ) -> list[Reply]:
        """A Reply for each payload, in order. `seconds` overrules the time limit; `counted` stops when failures are too
        many (TooManyFailures)."""
        limit = seconds or self.limits.seconds
        waiting, replies = deque(range(len(payloads))), dict[int, Reply]()
        lines, done = _Lines(call, payloads), 0
        while len(replies) < len(payloads):
            self._start(len(waiting))
            share = max(1, min(AHEAD, len(waiting) // (2 * max(1, len(self._workers)))))
            for worker in self._workers:
                worker.take(waiting, share, lines, limit)
            for i in self._turn(waiting, replies):
                done += 1
                if counted and replies[i].failure:
                    self._count(replies[i], self.judged + done, len(payloads))
        if counted:
            self.judged += len(payloads)
        return replies_in_order(replies)

    def sweep(self) -> None:
        """Kill what calls started and left behind. Processes that the import started may stay."""
        for worker in self._workers:
            worker.sweep()

    def note(self, answers: int) -> None:
        """Count answers that were judged in calls with `counted=False`."""
        self.judged += answers

    def blame(self, reply: Reply, answers: int, left: int) -> None:
        """Count answers of `note` as failed, all by one reply; `left` answers are still to be judged. Raises
        TooManyFailures."""
        for _ in range(answers):
            self._count(reply, self.judged, left)

    def close(self) -> None:
        """End all workers."""
        self._finalizer()

    def _start(self, wanted: int) -> None:
        while len(self._workers) < min(self._most, max(1, wanted)) and (wanted or not self._workers):
            self._workers.append(_Worker(self.target, self.spec, self.limits.import_seconds))

    def _turn(self, waiting: deque[int], replies: dict[int, Reply]) -> list[int]:
        """Wait for something to happen; returns the payloads that were answered. Raises BadInput where user code is
        refused, whatever it answered."""
        _wait(self._workers)
        answered: list[int] = []
        for worker in list(self._workers):
            found, lost = worker.look()
            if lost:
                self._workers.remove(worker)
                worker.end()
                waiting.extendleft(reversed([i for i in worker.asked if i != LOAD]))
            for i, reply in found:
                if i == LOAD:
                    self._loaded(reply)
                elif reply.failure == REFUSED:
                    _end(self._workers)
                    raise BadInput(reply.message)
                else:
                    replies[i] = reply
                    answered.append(i)
        return answered

    def _loaded(self, reply: Reply) -> None:
        if reply.failure:
            _end(self._workers)
            raise BadInput(_import_failed(self.spec["name"], reply, self.limits.import_seconds))
        self._about = reply.value

    def _count(self, reply: Reply, seen: int, of: int) -> None:
        """Stop as soon as the share of failures is sure to be too high when this call ends, in whatever order answers
        come. `seen`: answers so far."""
        self._failed[str(reply.failure)] += 1
        self.first = self.first or reply.message
        failed, every = self._failed.total(), max(FEWEST, self.judged + of)
        if failed > self.limits.failures * every:
            counts = ", ".join(f"{name} {count}" for name, count in self._failed.most_common())
            raise TooManyFailures(
                f"{self.spec['name']} failed on {failed} of the first {seen} answers it was asked to judge "
                f"({counts}), more than max_failures={self.limits.failures:g} of {every} allows; the first said: "
                f"{self.first}; fix it and run again, or raise problem.max_failures"
            )


def replies_in_order(replies: dict[int, Reply]) -> list[Reply]:
    """By the number of their payload."""
    return [replies[i] for i in range(len(replies))]


def _import_failed(name: str, reply: Reply, seconds: float) -> str:
    if reply.failure == REFUSED:
        return reply.message
    if reply.failure == "timeout":
        return f"{name}: its import did not end within {seconds:g} s; let it do less while it is imported"
    return f"{name}: its import failed ({reply.failure}): {reply.message}; fix it and run again"


class _Lines(NamedTuple):
    """Payloads as the lines that a worker reads."""

    call: str
    payloads: Sequence[Any]

    def line(self, i: int) -> bytes:
        return json.dumps({"id": i, "call": self.call, "with": self.payloads[i]}).encode() + b"\n"


class _Worker:
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
        self.asked, self.kept = deque[int]([LOAD]), {self.process.pid}
        self.outgoing = bytearray(json.dumps({"id": LOAD, "call": target, "with": spec}).encode() + b"\n")
        self.incoming, self.tail = bytearray(), bytearray()
        self.limit = import_seconds
        self.ends_at = time.monotonic() + import_seconds

    def take(self, waiting: deque[int], share: int, lines: _Lines, limit: float) -> None:
        """Ask for as many as its share; nothing while it imports."""
        if LOAD in self.asked:
            return
        if not self.asked:
            self.ends_at = time.monotonic() + limit
        self.limit = limit
        while waiting and len(self.asked) < share:
            self.asked.append(waiting.popleft())
            self.outgoing += lines.line(self.asked[-1])

    def look(self) -> tuple[list[tuple[int, Reply]], bool]:
        """(what was answered, whether the worker is lost). Nothing here waits."""
        over = self.process.poll() is not None
        self._send()
        self._read_output()
        found, sound = self._answers()
        if not self.asked:
            return found, over or not sound
        if over or not sound:
            return [*found, *self._failed_first("crash", self._how_it_ended())], True
        if time.monotonic() > self.ends_at:
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


def _wait(workers: Sequence[_Worker]) -> None:
    """Until a worker says something, can be written to, ends, or is out of time."""
    poll = select.poll()
    for worker in workers:
        for fd in (worker.replies, worker.output, worker.ended):
            poll.register(fd, select.POLLIN)
        if worker.outgoing:
            poll.register(worker.requests, select.POLLOUT)
    left = min((worker.ends_at for worker in workers if worker.asked), default=0.0) - time.monotonic()
    poll.poll(max(0.0, left) * 1000 + 1)


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()
