"""The seconds of a stage are those of all its attempts, however the earlier ones ended."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from stages.job import Execution, Job, Result
from stages.runtime import worker
from stages.runtime.metrics import FILE, MetricsLog
from stages.runtime.workdir import ATTEMPTS, RESULT


@dataclass(frozen=True)
class Logs:
    """A kind that logs a step, and fails where its config says so."""

    torch: bool = False
    saves: bool = True

    def run(self, job: Job) -> Result:
        MetricsLog(Path(job.out)).write(1, 2)
        if job.config["fails"]:
            raise RuntimeError("killed")
        return Result(outputs={}, metrics={})


def attempt(work: Path, kind: Logs | None = None, fails: bool = False) -> dict:
    """What the artifact would say of it; {} where it failed."""
    job = Job(
        kind="logs",
        name="logs",
        config={"fails": fails},
        inputs={},
        work=str(work),
        out=str(work / "out"),
        problem=None,
        rows=None,
        format=None,
        seed=0,
        dtype="float32",
        execution=Execution(),
    )
    work.mkdir(exist_ok=True)
    worker._empty(job)
    assert worker.attempt(job, {"logs": kind or Logs()}) == fails
    return {} if fails else json.loads((work / RESULT).read_text())["seen"]


def took(work: Path, seconds: float) -> None:
    """As if the attempt that failed had begun so long before its last line of the log."""
    known = json.loads((work / ATTEMPTS).read_text())
    last = known["started"] + seconds
    os.utime(work / "out" / FILE, (last, last))


def test_attempts_that_failed_or_were_killed_count(tmp_path):
    work = tmp_path / "work"
    assert attempt(work)["seconds"] < 100
    for _ in range(2):
        attempt(work, fails=True)
        took(work, 1000.0)
    assert attempt(work)["seconds"] == pytest.approx(2000, abs=100)
    assert attempt(work)["seconds"] < 100, "a stage that is made again, after its artifact was voided, begins anew"


def test_a_log_that_came_with_a_checkpoint_from_another_machine_counts(tmp_path):
    @dataclass(frozen=True)
    class Resumed(Logs):
        def run(self, job: Job) -> Result:
            Path(job.out, FILE).write_text('{"step": 1, "total": 2, "seconds": 1000.0}\n')
            return super().run(job)

    assert attempt(tmp_path / "work", Resumed())["seconds"] >= 1000
