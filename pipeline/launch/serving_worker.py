"""The launcher's end of the serving worker (`stages.runtime.server`).

Orders go out as JSON lines over its stdin, answers come back over its stdout. When this process ends, its end of stdin
closes, and the worker kills every job."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import StageFailed
from stages.runtime import environment, signals
from stages.runtime.process import adopt_orphans, kill_marked, kill_tree

WORKER = [sys.executable, "-P", "-m", "stages"]
"""The worker's command; -P, because no module of the working directory is ours."""


TICK = 0.5
"""Seconds between two looks at the clock; of what one takes longer, this process was stopped."""
IMPORT_PATIENCE, FORK_PATIENCE = 600.0, 60.0
"""Seconds the worker may take to import torch and trl, and to fork a job."""


MARK = "SWITCHBACK_LAUNCHER"
"""Environment variable that every process of a launcher carries."""


FORKED = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""What a worker that forks needs: libraries that are imported ask torch for a GPU, and an answer of the CUDA driver
would leave every fork without one. NVML answers without it."""


class ServingWorker:
    """The other end of `stages.runtime.server`, in a clean environment (`stages.runtime.environment`)."""

    dropped: tuple[str, ...]
    """Names of the variables that its jobs do not see."""

    def __init__(self, threads: int | None, preload: bool) -> None:
        adopt_orphans()
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        variables, self.dropped = environment.cleaned(os.environ)
        env = {**variables, name: value, **FORKED}
        if threads:
            env["OMP_NUM_THREADS"] = str(threads)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        with signals.held():
            self._process = subprocess.Popen(
                [*WORKER, "--serve" if preload else "--serve-bare", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=env,
                start_new_session=True,  # Ctrl-C on the terminal is the launcher's to handle
            )
        self._buffer = b""
        self._ready = False
        self.job: int | None = None  # pid of the one that runs

    def start(self, job: Path, log: Path) -> None:
        """Order a job; returns once it has been forked."""
        if not self._ready:
            self._wanted_answer(IMPORT_PATIENCE)
            self._ready = True
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"job": str(job), "log": str(log)}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None
        self.job = self._wanted_answer(FORK_PATIENCE)["pid"]

    def status(self, seconds: float) -> int | None:
        """The job's exit status (negative: the signal that killed it); None when it is still running after
        `seconds`."""
        answer = self._answer(seconds)
        if answer is None:
            return None
        self.job = None
        return answer["status"]

    def stop(self, seconds: float) -> int | None:
        """Ask the job to stop (SIGTERM); returns its exit status once it has ended, None after `seconds`."""
        if not self.job:
            return None
        with suppress(ProcessLookupError):
            os.kill(self.job, signal.SIGTERM)
        return self.status(seconds)

    def kill(self) -> None:
        """Kill the job, all it started, and the worker."""
        kill_tree(self._process.pid)
        self._process.kill()
        kill_marked(self._mark)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """The next line the worker says; None when it says none in time. Time in which this process was stopped does
        not count. Raises StageFailed when the worker is gone."""
        assert self._process.stdout is not None
        left = seconds
        while b"\n" not in self._buffer:
            began, wait = time.monotonic(), min(TICK, left)
            if select.select([self._process.stdout], [], [], wait)[0]:
                if not (read := os.read(self._process.stdout.fileno(), 4096)):
                    raise self._gone()
                self._buffer += read
            elif left <= wait:
                return None
            left = max(0.0, left - min(wait, time.monotonic() - began))
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _wanted_answer(self, seconds: float) -> dict[str, Any]:
        if answer := self._answer(seconds):
            return answer
        raise StageFailed(f"the serving worker did not answer within {seconds:g} s")

    def _gone(self) -> StageFailed:
        return StageFailed(f"the serving worker is gone (exit {self._process.wait()}): {self._last_error()}")

    def _last_error(self) -> str:
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return said[-1] if said else "it said nothing; the kernel may have killed it because memory ran out"
