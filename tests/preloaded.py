"""The `switchback` command in a process that has imported torch and trl already: python -m tests.preloaded

The command, its serving worker and its jobs are the same tree of processes that a user has; what differs is that the
first two are forked from here, where a user's are started by an exec and import for ten seconds. What a process does
at its start, and what an environment does to a library while it is imported, has to be asked of a process of its own
(`tests.conftest.run_alone`)."""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.launch.serving_worker import FORKED
from stages.runtime import environment
from stages.runtime.process import die_with_parent, forked

COMMAND = (
    "torch",
    "transformers",
    "pipeline.cli",
    "pipeline.run.run",
    "obstore.store",
    "stages.guard.pool",
    "stages.problems.catalog",
)
"""What a command and the jobs that need no TRL import, beside what a serving worker does."""
AT_RUN_TIME = ("SWITCHBACK_", "PREFECT_", "AWS_", "NO_PROXY", "no_proxy", "TMPDIR", "PYTEST_", "TORCHINDUCTOR_")
"""How the names begin of the variables that are read when they are needed, and not while a library is imported."""
OF_PYTHON = "PYTHON"
"""How the names begin of the variables that an interpreter reads at its start."""


class Preloaded:
    """The process, from pytest's side. It imports in the environment of a serving worker, so no library has read what
    a worker does not see."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = dict(env)
        self._process: subprocess.Popen[str] | None = None

    def can(self, env: Mapping[str, str]) -> bool:
        """Whether nothing in this environment had to be there before the imports."""
        return not self.too_late_for(env)

    def too_late_for(self, env: Mapping[str, str]) -> set[str]:
        """Variables of an environment that a library may have read at its import, and that were otherwise then."""
        differ = {name for name in self._env.keys() | env.keys() if self._env.get(name) != env.get(name)}
        seen = {name for name in differ if environment.passes(name) or name.startswith(OF_PYTHON)}
        return {name for name in seen if not name.startswith(AT_RUN_TIME)}

    def run(
        self, arguments: list[str], cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """A command to its end. Raises TimeoutExpired, and then nothing of it lives on."""
        if self._process is None:
            command = [sys.executable, "-m", "tests.preloaded", str(os.getpid())]
            self._process = subprocess.Popen(
                command,
                cwd=Path(__file__).parent.parent,
                env={**environment.cleaned(self._env).variables, **FORKED},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            order = {"arguments": arguments, "cwd": str(cwd), "env": dict(env), "out": out.name, "err": err.name}
            print(json.dumps(order), file=self._process.stdin, flush=True)
            if not select.select([self._process.stdout], [], [], timeout)[0]:
                self.close()
                raise subprocess.TimeoutExpired(arguments, timeout, out.read(), err.read())
            status = json.loads(self._process.stdout.readline())
            return subprocess.CompletedProcess(arguments, status, out.read(), err.read())

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def main(parent: int) -> None:
    """Fork a process for each order on stdin, and answer with its exit status."""
    die_with_parent(parent)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer, and nothing here is a terminal
    from pipeline.launch import serving_worker
    from stages.runtime.server import load_for_forks

    load_for_forks()
    for name in COMMAND:
        importlib.import_module(name)
    importlib.import_module("pipeline.cli").app()  # it imports every command
    serving_worker.subprocess = SimpleNamespace(Popen=ForkedWorker, PIPE=subprocess.PIPE)
    gc.collect()
    gc.freeze()
    with os.fdopen(os.dup(0)) as orders:
        for line in orders:
            status = os.waitstatus_to_exitcode(os.waitpid(_forked(lambda line=line: command(json.loads(line))), 0)[1])
            print(json.dumps(status), file=answers)


def command(order: dict[str, Any]) -> None:
    """Be the command that was ordered."""
    die_with_parent(os.getppid())
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(3, 256)
    os.chdir(order["cwd"])
    begin(["switchback", *order["arguments"]], order["env"])
    from pipeline.cli import main

    main()


def begin(arguments: list[str], env: Mapping[str, str]) -> None:
    """Forget what a fork inherits and an exec does not."""
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    gc.set_threshold(700, 10, 10)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv, sys.path[0] = arguments, str(Path(sys.executable).parent)


class ForkedWorker:
    """A serving worker as `subprocess.Popen` starts it, but that it has imported already."""

    def __init__(
        self,
        command: list[str],
        stdin: int,
        stdout: int,
        stderr: Any,
        env: Mapping[str, str],
        start_new_session: bool,
        **_: Any,
    ) -> None:
        assert (stdin, stdout, start_new_session) == (subprocess.PIPE, subprocess.PIPE, True)
        orders, ours = os.pipe()
        theirs, answers = os.pipe()

        def serve() -> None:
            os.setsid()
            for fd, number in ((orders, 0), (answers, 1), (stderr.fileno(), 2)):
                os.dup2(fd, number)
            os.closerange(3, 256)
            begin(command, env)
            from stages.__main__ import main

            sys.exit(main(command[command.index("stages") + 1 :]))

        self.pid = _forked(serve)
        os.close(orders)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(ours, "wb"), os.fdopen(theirs, "rb", buffering=0)
        self.returncode: int | None = None

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


def _forked(life: Callable[[], None]) -> int:
    """The pid of a child that lives so, and ends as a Python program does."""
    return forked(lambda: _exit_code(life))


def _exit_code(life: Callable[[], None]) -> int:
    try:
        life()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


if __name__ == "__main__":
    main(int(sys.argv[1]))
