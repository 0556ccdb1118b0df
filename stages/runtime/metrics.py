"""The worker's running commentary: one JSON line a step in `metrics.jsonl`, which the launcher draws progress from and
an artifact keeps.

Every line has step, total and seconds since the start; training adds TRL's own metric names.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path

from stages.job import Job
from stages.runtime import ranks
from stages.runtime.workdir import WORDS

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to one file for the life of a job. Of several processes, only the first one writes."""

    def __init__(self, out: Path) -> None:
        path = out / FILE if ranks.first() else Path(os.devnull)
        self._start = time.monotonic() - seconds_so_far(path)
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, step: int, total: int, values: dict[str, float] | None = None) -> None:
        """One line. Values that JSON has no number for (nan, inf) become null."""
        finite = {k: v if math.isfinite(v) else None for k, v in (values or {}).items()}
        seconds = round(time.monotonic() - self._start, 3)
        self._file.write(json.dumps({"step": step, "total": total, "seconds": seconds, **finite}) + "\n")


def seconds_so_far(path: Path) -> float:
    """What the last line of a log says; a stage that was resumed goes on from there."""
    if not path.is_file():
        return 0.0
    lines = path.read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])["seconds"] if lines else 0.0


def say(job: Job, text: str) -> None:
    """Tell the user something, now. A line in the stage's log too."""
    print(text, flush=True)
    with Path(job.work, WORDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": text}) + "\n")


def latest(out: Path, wanted: Iterable[str]) -> dict[str, float]:
    """The last value of each wanted metric in a job's log; empty in a process that writes no log."""
    if not ranks.first():
        return {}
    last: dict[str, float] = {}
    for line in map(json.loads, (out / FILE).read_text(encoding="utf-8").splitlines()):
        last |= {name: line[name] for name in wanted if line.get(name) is not None}
    return last
