"""The worker's running commentary: one JSON line a step in `metrics.jsonl`, which the launcher draws progress from and an artifact keeps.

Every line has step, total and seconds since the start; training adds TRL's own metric names.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to one file for the life of a job."""

    def __init__(self, out: Path) -> None:
        self._file = (out / FILE).open("a", buffering=1)
        self._start = time.monotonic()

    def write(self, step: int, total: int, values: dict[str, float] | None = None) -> None:
        """One line. Values that JSON has no number for (nan, inf) become null."""
        finite = {k: v if math.isfinite(v) else None for k, v in (values or {}).items()}
        seconds = round(time.monotonic() - self._start, 3)
        self._file.write(json.dumps({"step": step, "total": total, "seconds": seconds, **finite}) + "\n")


def last(path: Path, wanted: str) -> float | None:
    """The last value of a metric in a file of lines; None when it was never written."""
    values = [line[wanted] for line in map(json.loads, path.read_text().splitlines()) if line.get(wanted) is not None]
    return values[-1] if values else None
