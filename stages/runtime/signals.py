"""Signals that come to a whole tree of processes at once, as systemd, Slurm and container engines send them.

One process of a tree decides what a signal means: the launcher, or the job where it has none. Every other process that
is ours stays, and dies with its parent (`stages.runtime.process`):

    held                  a program that is started in this block hears nothing until it says how to listen
    ignore                a process of ours: the signal ends nothing. A handler, since a program that is started later
                          would inherit SIG_IGN
    as_usual              a process that is its own: what Python does by itself
    deaf_child            a program of others: it never hears them
    obey_parent           a process of a pool: its parent alone ends it
    heard, postponed      the launcher, while it must not be cut short

A signal that stops a process (SIGSTOP, a frozen container) is not seen. `overslept` finds it by a wait that took too
long.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stages.runtime.process import die_with_parent

ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a process to end."""
ASKED_BY_MACHINES = (signal.SIGTERM, signal.SIGHUP)
"""Those that no person sends a second time to end at once, as Ctrl-C does."""


@contextmanager
def held() -> Iterator[None]:
    """Endings wait inside this block, here and in the processes that it starts: in those until they say how to
    listen."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore(hear: Callable[[int], object] = lambda number: None) -> None:
    """No ending ends this process from now on; `hear` gets each one's number. A program that it starts hears them as
    usual."""
    for number in ENDINGS:
        signal.signal(number, lambda number, frame: hear(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)


def as_usual() -> None:
    """Endings do what they do in any Python program."""
    for number in ENDINGS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)


def deaf_child(parent: int) -> None:
    """For `preexec_fn`, of a program that would end by itself: it hears no ending, and dies with its parent. What it
    starts inherits this."""
    die_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)


def obey_parent() -> None:
    """Only its parent's endings end this process, as a pool ends its workers; those of others end nothing."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)

    def listen() -> None:
        while signal.sigwaitinfo(ENDINGS).si_pid != parent:
            pass
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()


def at_fork(in_child: Callable[[], None]) -> None:
    """Run `in_child` in every process that is forked from here on. No ending that comes before it is lost or does
    anything else."""
    masks: list[Any] = []
    os.register_at_fork(
        before=lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop()),
        after_in_child=in_child,
    )


@contextmanager
def heard() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP end nothing inside this block, which gets those that came. Ctrl-C does what it did.

    Outside of the main thread, where no handler ever runs, nothing changes.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in ASKED_BY_MACHINES}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def postponed() -> Iterator[None]:
    """SIGTERM and SIGHUP that come inside this block do what they do after it. Ctrl-C does so at once."""
    with heard() as came:
        yield
    for number in came[:1]:
        signal.raise_signal(number)


def overslept(since: float, seconds: float) -> float:
    """How much longer than `seconds` a wait took that began at `since` (`time.monotonic`): time in which this process
    was stopped, or had no core. Never negative."""
    return max(0.0, time.monotonic() - since - seconds)
