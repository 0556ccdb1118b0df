"""Runs user code in worker processes. A call that hangs, crashes, prints or forks costs one answer, and its process is
killed and replaced.

payloads -> one Reply each, in order. A worker (`stages.guard.worker`) is two processes: a supervisor, which user code
sees as its parent, and its child, which imports the user code once and then answers. Both die with the stage. Requests
and replies are lines of JSON over separate pipes, never pickle. Only the end of the output of user code is kept.

The invariant: `map` returns a Reply for every payload, after at most the time limit for each, and kills every process
that a call started. The guard protects against accidents and against graded models, not against the author of the code,
which has all rights of its user.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from stages.errors import BadInput, TooManyFailures
from stages.guard.user_process import HITS
from stages.guard.worker import LOAD, Lines, Reply, Worker, wait
from stages.runtime import ranks

IMPORT_LIMIT = 120.0
"""Seconds that user code may take to be imported."""
AHEAD = 32
"""Requests that are sent to a worker before it answered the first."""
FEWEST = 100
"""Failures are a share of at least so many answers, so that one bad answer of ten stops nothing."""
REFUSED = "refused"
"""The failure of code that cannot be used at all (`CodeRefused`). It costs no answer but stops the stage."""


class Limits(NamedTuple):
    """Limits of user code."""

    seconds: float
    """Wall-clock time of one call."""
    failures: float
    """Share of answers (of at least FEWEST) that may fail. 1 = any number."""
    workers: int | None = None
    """None: one a core, shared by the ranks."""
    import_seconds: float = IMPORT_LIMIT


class Guard:
    """A pool of workers with the same user code; they start when they are needed and end with the guard, or with this
    process."""

    def __init__(self, target: str, spec: dict[str, Any], limits: Limits) -> None:
        self.target, self.spec, self.limits = target, spec, limits
        self._most = limits.workers or max(1, len(os.sched_getaffinity(0)) // ranks.world())
        self._workers: list[Worker] = []
        self._about: Any = None
        self._hits = Counter[int]()
        """Payload -> workers that were replaced because a signal came while they were at it."""
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
        lines, done = Lines(call, payloads), 0
        self._hits.clear()
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
            self._workers.append(Worker(self.target, self.spec, self.limits.import_seconds))

    def _turn(self, waiting: deque[int], replies: dict[int, Reply]) -> list[int]:
        """Wait for something to happen; returns the payloads that were answered. Raises BadInput where user code is
        refused, whatever it answered."""
        wait(self._workers)
        answered: list[int] = []
        for worker in list(self._workers):
            found, lost = worker.look()
            if lost:
                self._workers.remove(worker)
                worker.end()
                found += self._given_up(worker)
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

    def _given_up(self, worker: Worker) -> list[tuple[int, Reply]]:
        """The failed reply of a call that signals hit in one worker after another, since it may send them itself."""
        if not worker.spoilt:
            return []
        call = worker.asked[0]
        self._hits[call] += 1
        if self._hits[call] <= HITS * (self._most if call == LOAD else 1):
            return []
        return [(worker.asked.popleft(), Reply(None, "crash", "a signal ended it again and again"))]

    def _loaded(self, reply: Reply) -> None:
        if reply.failure:
            _end(self._workers)
            raise BadInput(_import_failed(self.spec["name"], reply, self.limits.import_seconds))
        self._about = reply.value
        del self._hits[LOAD]

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


def _end(workers: list[Worker]) -> None:
    while workers:
        workers.pop().end()
