"""The launcher: a Job becomes a process tree of our own, and a Result comes back.

A local job is forked from a serving worker (`stages.runtime.server`) that imported torch and trl once. The tree dies
with its deadline, with an exception here, and with the launcher itself, however that dies. Ctrl-C and SIGTERM are
exceptions that leave the job a grace time, to save what it has, or to come to its end. Deadline and grace do not count
time in which this process was stopped. Every attempt has its own log."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import Refused, StageFailed
from pipeline.launch.serving_worker import ServingWorker
from stages.errors import BadInput
from stages.job import Job, Result
from stages.kinds import STAGES
from stages.runtime import locks, signals
from stages.runtime.metrics import FILE as METRICS
from stages.runtime.stopping import STOPPED
from stages.runtime.workdir import BUSY, ERROR, LOCK, PATIENCE, RESULT, WORDS
from stages.tokens import limits

ENDLESS = (-signal.SIGPROF, 128 + signal.SIGPROF)
"""How a job, or a rank of it, ends in which one call of a template does not (`stages.tokens.limits`)."""
TICK = 0.2
"""Seconds between two looks at a job."""
MOMENT = 1.0
"""Seconds between the first and the last process of a tree that a signal to all of them reaches."""

OnMetrics = Callable[[dict[str, Any]], None]
OnWord = Callable[[str], None]


class Launcher:
    """Runs jobs, one at a time; owns the serving worker from its first need to `close`."""

    def __init__(self, threads: int | None = None, preload: bool = True) -> None:
        """`threads` is OMP_NUM_THREADS of the worker, which has to be set before torch is imported. Without `preload`
        the worker imports what the one job it is for needs, and not TRL."""
        self._threads, self._preload = threads, preload
        self._worker: ServingWorker | None = None
        self.asked_to_end: BaseException | None = None
        """Ctrl-C or SIGTERM that came when a job was about to end. Its result is to be published, and this raised."""

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm_up(self) -> None:
        """Start the worker's imports without waiting for them."""
        if self._worker is None:
            self._worker = ServingWorker(self._threads, self._preload)

    def launch(
        self,
        job: Job,
        deadline: float | None = None,
        on_metrics: OnMetrics = lambda line: None,
        on_word: OnWord = lambda text: None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> Result:
        """Run a job to its end; `on_metrics` hears each line it logs, `on_word` what it says about itself, and
        `on_tick` is called again and again. Raises BadInput or StageFailed.

        Whatever is raised, nothing of the job lives on. `deadline` is in seconds.
        """
        if self.asked_to_end is not None:
            raise self.asked_to_end
        self.warm_up()
        assert self._worker is not None
        _refuse_busy(job)
        path, log = job.save(), _next_log(Path(job.work))
        metrics = Path(job.out, METRICS)
        for stale in (metrics, Path(job.work, RESULT), Path(job.work, ERROR), Path(job.work, WORDS)):
            stale.unlink(missing_ok=True)  # an earlier attempt's
        lines, words = _new_lines(metrics), _new_lines(Path(job.work, WORDS))
        try:
            self._worker.start(path, log)
            ends_at = time.monotonic() + (deadline or float("inf"))
            status = None
            while status is None:
                looked = time.monotonic()
                status = self._worker.status(TICK)
                ends_at += signals.overslept(looked, TICK)
                for word in next(words):
                    on_word(word["text"])
                for line in next(lines):
                    on_metrics(line)
                on_tick()
                if status is None and time.monotonic() > ends_at:
                    raise StageFailed(f"{job.name}: killed after its deadline of {deadline:g} s; its log is {log}")
        except BaseException as error:
            if isinstance(error, Exception) or self._let_it_save(job, on_word) != 0:
                self.close()
                raise
            status, self.asked_to_end = 0, error
        result = _result(job, status, log)
        return result.model_copy(update={"seen": {**result.seen, **_left_out(self._worker.dropped)}})

    def _let_it_save(self, job: Job, on_word: OnWord) -> int | None:
        """Ask the job to stop, and give it its grace time; returns its exit status once it has ended. SIGTERM again is
        the same wish, and another Ctrl-C ends the grace."""
        assert self._worker is not None
        if self._worker.job is None or not job.execution.grace:
            return None
        with signals.heard(), suppress(KeyboardInterrupt, StageFailed):
            if job.kind in STAGES and STAGES[job.kind].saves:
                with suppress(OSError):  # the terminal may be gone
                    on_word(
                        f"asked to stop; saves at its next step, within {job.execution.grace:g} s (Ctrl-C: ends at "
                        "once)"
                    )
            return self._worker.stop(job.execution.grace)
        return None

    def close(self) -> None:
        """Leave no process behind."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


def _refuse_busy(job: Job) -> None:
    """Raise StageFailed, and touch nothing, where another job works in the directory; one whose launcher was killed
    needs a moment to be gone."""
    path = Path(job.work, LOCK)
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lock:
        if not locks.lock_within(lock, PATIENCE):
            raise _busy(job)


def _busy(job: Job) -> StageFailed:
    return StageFailed(f"{job.name}: another job still works in {job.work}; wait for it or stop it")


def _left_out(dropped: tuple[str, ...]) -> dict[str, list[str]]:
    """The variables that the job did not see, for its provenance: names only, since a value may be a secret."""
    return {"dropped_environment": list(dropped)} if dropped else {}


def _next_log(work: Path) -> Path:
    """logs/attempt-<n>.log, n from 1: an attempt never writes into another's."""
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return logs / f"attempt-{len(list(logs.glob('attempt-*.log'))) + 1}.log"


def _new_lines(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Each `next` gives the whole lines that were written since the last one."""
    read = 0
    while True:
        whole = b""
        if path.exists():
            with path.open("rb") as file:
                file.seek(read)
                whole = file.read()
            whole = whole[: whole.rfind(b"\n") + 1]
        read += len(whole)
        yield [json.loads(line) for line in whole.splitlines()]


def _result(job: Job, status: int, log: Path) -> Result:
    """What the worker made, or why it made nothing."""
    work = Path(job.work)
    if status in (STOPPED, -signal.SIGTERM):
        time.sleep(MOMENT)  # a signal to the whole tree may be about to raise here what ends the run
    if status == 0:
        return Result.model_validate_json((work / RESULT).read_text(encoding="utf-8"))
    if status in ENDLESS:
        raise BadInput(
            f"{job.name}: a template did not end within {limits.ENDED_AFTER * limits.SECONDS:g} s of CPU time (log: "
            f"{log}). Fix: use another template"
        )
    if (work / ERROR).exists():
        error = json.loads((work / ERROR).read_text(encoding="utf-8"))
        if error["bad_input"]:
            raise BadInput(error["message"])
        if error["refused"]:
            raise Refused(f"{job.name}: {error['message']}")
        raise StageFailed(f"{job.name}: {error['message']}{'' if error['told'] else f' (log: {log})'}")
    if status == BUSY:
        raise _busy(job)
    if status == STOPPED:
        raise StageFailed(
            f"{job.name}: it was asked to stop; the same command resumes from its checkpoint (log: {log})"
        )
    how = f"killed by signal {-status}" if status < 0 else f"exited with {status}"
    raise StageFailed(f"{job.name}: {how} without a word; its log is {log}")
