"""The serving worker: imports torch and trl once, then forks a clean process for each local job.

    launcher --stdin--> server --fork, setsid, PDEATHSIG--> job --> whatever it starts

Orders come as JSON lines {"job", "log"}; answers go back as {"ready"}, {"pid"}, {"pid", "status"}. The launcher's
death, however it dies, is the end of stdin: the server kills everything below it and exits. The server's death kills
the job. The server starts no thread and touches no GPU, so a fork of it is clean. Signals that ask it to end do
nothing: the job hears its own."""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

from stages.runtime import signals, worker
from stages.runtime.process import adopt_orphans, die_with_parent, forked, kill_tree, outlive_parent

PRELOAD = (
    "trl.trainer.sft_trainer",
    "trl.trainer.grpo_trainer",
    "stages.trl.sft_loss",
    "stages.trl.prefill",
    "stages.data.rollouts",
)
STDIN = 0


def serve(launcher: int, stages: Mapping[str, worker.Runs], preload: bool = True) -> None:
    """Answer orders until stdin ends. `launcher` is the pid of the process that holds the other end; `stages` says
    what runs each kind."""
    signals.ignore()
    die_with_parent(launcher)  # while it imports, it does not listen
    adopt_orphans()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    if preload:
        load_for_forks()
    gc.collect()
    gc.freeze()  # the garbage collector of a job leaves these pages shared
    outlive_parent()  # to kill what is below it
    try:
        with suppress(BrokenPipeError):  # the launcher is gone
            _answer_orders(answers, stages)
    finally:
        kill_tree(os.getpid())


def load_for_forks() -> None:
    """Import what jobs need. transformers also compiles a thousand patterns at the first load of a model; done here,
    that half second is spent once, and not by every job."""
    for name in PRELOAD:
        importlib.import_module(name)
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")


def _answer_orders(answers: IO[str], stages: Mapping[str, worker.Runs]) -> None:
    """One job after another, until stdin ends."""
    print(json.dumps({"ready": os.getpid()}), file=answers)
    while line := _read_line():
        pid = _fork(json.loads(line), answers.fileno(), stages)
        print(json.dumps({"pid": pid}), file=answers)
        if not _wait(pid):
            return
        _, status = os.waitpid(pid, 0)
        kill_tree(os.getpid())
        _reap()
        print(json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(status)}), file=answers)


def _read_line() -> bytes:
    """One line, unbuffered, so that `select` sees what is really there."""
    line = b""
    while (char := os.read(STDIN, 1)) not in (b"", b"\n"):
        line += char
    return line


def _fork(order: dict[str, Any], answers: int, stages: Mapping[str, worker.Runs]) -> int:
    """Start the job; returns its pid."""
    server = os.getpid()

    def life() -> int:
        os.setsid()
        die_with_parent(server)
        signals.as_usual()  # until it knows what it has to save
        os.close(answers)  # or the launcher would wait for its end as long as anything of the job lives
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), STDIN)
        return worker.main(order["job"], stages)

    with signals.held():
        return forked(life)


def _wait(pid: int) -> bool:
    """Until the job ends, or the launcher is gone (it says nothing while a job runs); True when the job ended."""
    ended = os.pidfd_open(pid)
    select.select([ended, STDIN], [], [])
    over = bool(select.select([ended], [], [], 0)[0])
    os.close(ended)
    return over


def _reap() -> None:
    """Take the status of every orphan that was killed."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
