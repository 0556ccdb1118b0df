"""One job, from its file to its result: take the directory's lock, check what the launcher promised, run the stage,
write `result.json` last.

A job for several processes forks them, or starts them with accelerate where a config file is given; each of those is
`python -m stages --rank job.json`. The exit code and one line in `error.json` say how it went wrong: 2 for something
the user gave, 1 for anything else. The traceback is in the log."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Protocol

from stages.errors import BadInput, NoSignal, StageStopped, TooManyFailures
from stages.job import Job, Result
from stages.runtime import checkpoints, chunks, forked_ranks, locks, ranks, signals, stopping
from stages.runtime.disk import replace, share_from_now_on
from stages.runtime.metrics import FILE as METRICS
from stages.runtime.metrics import say, seconds_so_far
from stages.runtime.process import die_with_parent
from stages.runtime.workdir import ATTEMPTS, BUSY, ERROR, LOCK, MEETING, PATIENCE, RESULT, WORDS

TOLD = (BadInput, TooManyFailures, NoSignal)
"""Errors whose line says all that a user needs; of others the class and the log help, too."""


class Runs(Protocol):
    """What the worker asks of a kind of stage. `stages.stage.Stage` has it, and this room imports no kind."""

    @property
    def run(self) -> Callable[[Job], Result]:
        """The function that does a job of this kind."""
        ...

    @property
    def torch(self) -> bool:
        """The kind needs torch."""
        ...

    @property
    def saves(self) -> bool:
        """The kind writes checkpoints, so SIGTERM asks it for a last one."""
        ...


LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")


def main(path: str, stages: Mapping[str, Runs]) -> int:
    """Run the job in a file, in as many processes as it is for; returns the exit code. `stages` says what runs each
    kind."""
    job = Job.model_validate_json(Path(path).read_text(encoding="utf-8"))
    work = Path(job.work)
    share_from_now_on(work)
    with (work / LOCK).open("a+", encoding="utf-8") as lock:
        if not _take(lock):
            print(
                f"{job.name}: process {locks.holder(lock) or '?'} is already working in {work}; wait for it or stop it",
                file=sys.stderr,
            )
            return BUSY
        _empty(job)
        sampled = chunks.count(work)
        if sampled:
            say(job, f"resumed with {sampled} batches that were sampled already")
        stopping.listen(job, saves=job.kind in stages and stages[job.kind].saves)
        if job.execution.processes > 1 or job.execution.accelerate:
            return _share_out(job, path, stages)
        signals.at_fork(signals.obey_parent)  # a loader's processes, whose end would be an error
        return attempt(job, stages)


def main_of_rank(path: str, stages: Mapping[str, Runs]) -> int:
    """One of the processes of a job whose directory is held and emptied; it dies with the one that started it."""
    die_with_parent(os.getppid())
    signals.obey_parent()
    return _attempt_of_rank(Job.model_validate_json(Path(path).read_text(encoding="utf-8")), stages)


def _attempt_of_rank(job: Job, stages: Mapping[str, Runs]) -> int:
    signals.at_fork(signals.obey_parent)
    code = attempt(job, stages)
    if code == 0:
        ranks.part()
    return code


def attempt(job: Job, stages: Mapping[str, Runs]) -> int:
    """The stage, and its result or what went wrong; returns the exit code."""
    try:
        result = _run(job, stages[job.kind])
    except StageStopped as stopped:
        print(f"{job.name}: {stopped}", file=sys.stderr)
        return stopping.STOPPED
    except Exception as error:
        traceback.print_exc()
        bad_input, whole = isinstance(error, BadInput), isinstance(error, TOLD)
        message = " ".join(f"{error if whole else f'{type(error).__name__}: {error}'}".split())
        if not (Path(job.work) / ERROR).exists():  # of several processes, what failed first is what went wrong
            refused = isinstance(error, NoSignal)
            said = {"message": message, "bad_input": bad_input, "told": whole, "refused": refused}
            _write(Path(job.work) / ERROR, said)
        return 2 if bad_input else 1
    if ranks.first():
        _write(Path(job.work) / RESULT, result.model_dump(mode="json"))
        (Path(job.work) / ATTEMPTS).unlink(missing_ok=True)
    return 0


def _share_out(job: Job, path: str, stages: Mapping[str, Runs]) -> int:
    """Start the job's processes and wait for all of them; returns the exit code."""
    if job.execution.accelerate:
        code = _accelerate(job, path)
    else:
        meeting = Path(job.work, MEETING)
        meeting.mkdir()
        code = forked_ranks.run(job.execution.processes, str(meeting), lambda: _attempt_of_rank(job, stages))
    if code and (Path(job.work) / ERROR).exists():
        return 2 if json.loads((Path(job.work) / ERROR).read_text(encoding="utf-8"))["bad_input"] else 1
    if code and stopping.asked(job):
        return stopping.STOPPED
    return code


def _accelerate(job: Job, path: str) -> int:
    """The job's processes as an accelerate config file says; returns the exit code."""
    launch = [sys.executable, "-P", "-m", "accelerate.commands.launch", "--config_file", str(job.execution.accelerate)]
    how = ["--num_processes", str(job.execution.processes), "--no_python"]
    rank = [sys.executable, "-P", "-m", "stages", "--rank", path]
    env = {"GLOO_SOCKET_IFNAME": "lo", **os.environ}
    if job.execution.threads:
        env["OMP_NUM_THREADS"] = str(job.execution.threads)
    me = os.getpid()
    return subprocess.call(
        [*launch, *how, *rank],
        env=env,
        close_fds=False,  # they inherit the directory's lock
        preexec_fn=lambda: signals.deaf_child(me),
    )


def _run(job: Job, stage: Runs) -> Result:
    """The stage itself, in the execution that the job asks for."""
    if (world := ranks.world()) != job.execution.processes:
        raise BadInput(
            f"{job.name}: the job is for {job.execution.processes} processes, but the launcher started {world}"
        )
    if stage.torch:
        _set_up(job)
    start = time.monotonic()
    result = stage.run(job)
    logged = seconds_so_far(Path(job.out, METRICS))
    seconds = max(_seconds_before(Path(job.work)) + time.monotonic() - start, logged)
    seen = {"processes": world, "seconds": round(seconds, 3)}
    return result.model_copy(update={"seen": seen | (_machinery(job) if stage.torch else {})})


def _set_up(job: Job) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    threads = job.execution.threads or (1 if ranks.meet_here() else None)
    if threads:
        torch.set_num_threads(threads)
    ranks.meet(on_gpu=torch.cuda.is_available() and job.execution.device != "cpu")


def _machinery(job: Job) -> dict[str, Any]:
    """What the stage ran on."""
    import torch

    on_gpu = torch.cuda.is_available() and job.execution.device != "cpu"
    return {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _take(lock: IO[str]) -> bool:
    """Hold the directory's lock until this process and all its children are gone; False when another job keeps it."""
    if not locks.lock_within(lock, PATIENCE):
        return False
    locks.write_holder(lock)
    os.set_inheritable(lock.fileno(), True)
    return True


def _count_attempt(job: Job) -> None:
    """Add what the attempt before this one took, which may have been killed: until its last log or checkpoint."""
    file = Path(job.work, ATTEMPTS)
    before = _attempts(file)
    written = [*Path(job.out).rglob("*.jsonl"), *Path(job.work).glob(f"checkpoint-*/{checkpoints.COMPLETE}")]
    last = max([before["started"], *(path.stat().st_mtime for path in written)])
    took = last - before["started"] if before["started"] else 0.0
    _write(file, {"seconds": before["seconds"] + took, "started": time.time()})


def _seconds_before(work: Path) -> float:
    """How long the attempts before this one took."""
    return _attempts(work / ATTEMPTS)["seconds"]


def _attempts(file: Path) -> dict[str, float]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"seconds": 0.0, "started": 0.0}


def _empty(job: Job) -> None:
    """What an earlier attempt left would be published with it; only what says that it is whole is taken up again."""
    _count_attempt(job)
    shutil.rmtree(job.out, ignore_errors=True)
    for name in (RESULT, ERROR, WORDS, stopping.FILE):
        Path(job.work, name).unlink(missing_ok=True)
    shutil.rmtree(Path(job.work, MEETING), ignore_errors=True)
    checkpoints.sweep(Path(job.work))
    Path(job.out).mkdir(parents=True)


def _write(path: Path, content: dict[str, Any]) -> None:
    replace(path, json.dumps(content, indent=1).encode())
