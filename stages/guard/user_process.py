"""The process in which user code runs: `python -m stages --guarded STAGE_PID REQUESTS REPLIES`, started by
`stages.guard.pool` alone.

    stage --PDEATHSIG--> supervisor --fork, PDEATHSIG--> worker --> processes of user code

User code sees the supervisor as its parent: killing it kills the worker and not the stage. The supervisor adopts
orphans, and ends with the worker's exit code. The worker answers each line of JSON with one, in order. The first
request makes it import the user's code. A process that user code forked and that returns here ends.

A signal that asks a whole tree to end (SIGTERM, SIGINT, SIGHUP) ends neither supervisor nor worker, but it does end
processes of user code. So a call that was hit is made again, and the stage hears of it, which then replaces a worker
whose import left processes running.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.errors import CallFailed, CodeRefused
from stages.runtime import signals
from stages.runtime.process import adopt_orphans, die_with_parent

TARGETS = {"file": "stages.problems.custom.python_file_worker", "rewards": "stages.problems.custom.rewards_worker"}
"""What can be loaded -> the module whose `load(spec)` returns (what it says of itself, {call: function of a
payload})."""
AGAIN = "again"
"""The failure of a call that is made again, since a signal came."""
HITS = 3
"""Signals in one call after which it is taken to send them itself, and ends its process."""
Calls = dict[str, Callable[[Any], Any]]


def settled(value: Any) -> Any:
    """The value itself, or what an async function comes to."""
    return asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value


async def _awaited(value: Any) -> Any:
    return await value


def keep(stage: int, requests: int, replies: int) -> None:
    """Run the supervisor, which starts the worker and ends with it."""
    signals.ignore()
    die_with_parent(stage)
    adopt_orphans()
    with suppress(OSError):  # the kernel kills user code first where memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    supervisor = os.getpid()
    worker = os.fork()
    if not worker:
        die_with_parent(supervisor)
        _work(requests, replies)
    os.close(requests)
    os.close(replies)
    while True:
        pid, status = os.wait()
        if pid == worker:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _work(requests: int, replies: int) -> None:
    """Answer until the requests end; never returns."""
    calls, rest, hits = Calls(), b"", list[int]()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signals.ignore(hits.append)
    signals.at_fork(signals.as_usual)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    for data in iter(lambda: os.read(requests, 2**16), b""):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            _write(replies, _undisturbed(json.loads(line), calls, hits, replies))
    os._exit(0)


def _undisturbed(request: dict[str, Any], calls: Calls, hits: list[int], replies: int) -> dict[str, Any]:
    """The answer of a call in which no signal came. `hits` gets the signals of this process, and those between two
    calls count too."""
    me, again = os.getpid(), {"id": request["id"], "value": None, "failure": AGAIN, "message": ""}
    for _ in range(HITS):
        if hits and calls:
            _write(replies, again)
        hits.clear()
        reply = _answer(request, calls)
        if os.getpid() != me:
            os._exit(0)
        if not hits:
            return reply
        if request["call"] in TARGETS:  # half an import cannot be made again
            _write(replies, again)
            break
    os._exit(128 + hits[0])


def _write(fd: int, reply: dict[str, Any]) -> None:
    data = json.dumps(reply).encode() + b"\n"
    while data:
        data = data[os.write(fd, data) :]


def _answer(request: dict[str, Any], calls: Calls) -> dict[str, Any]:
    value, failure, message = None, None, ""
    try:
        if request["call"] in calls:
            value = calls[request["call"]](request["with"])
        else:
            value, loaded = importlib.import_module(TARGETS[request["call"]]).load(request["with"])
            calls.update(loaded)
            gc.freeze()
        json.dumps(value, allow_nan=False)
    except CallFailed as error:
        failure, message = error.kind, str(error)
    except CodeRefused as error:
        failure, message = "refused", str(error)
    except BaseException as error:  # sys.exit() of user code too
        failure, message = "exception", describe_error(error)
    if failure is not None:
        value = None
    return {"id": request["id"], "value": value, "failure": failure, "message": message}


def describe_error(error: BaseException, file: str | None = None) -> str:
    """`file:line: Type: message` of an error, with the last place in user code (`file`: the last place in it)."""
    ours = str(Path(__file__).parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    if file:
        theirs = [frame for frame in frames if frame.filename == file]
    else:
        theirs = [frame for frame in frames if not frame.filename.startswith(ours)]
    where = f"{Path(theirs[-1].filename).name}:{theirs[-1].lineno}: " if theirs else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())[:500]}"
