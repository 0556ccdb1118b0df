"""Limits of templates that somebody else wrote: how long they compute, how much memory they take and how much they
write.

a function that renders -> its text; BadInput for a limit, TemplateError for whatever else a template raises

jinja2 cannot be stopped from inside, so there are two limits. A process tries each template once in a child that the
kernel limits (`refuse_endless`), which ends a single call into C, too. Every rendering has a timer (`rendered`), for
templates that are slow on some rows only. Both count time in which the thread computes, so a machine that was paused or
is busy changes nothing. Python hears the timer between two calls only, so the kernel ends the process (SIGPROF) where
one call computes twice as long. What is rendered is never changed."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from jinja2 import TemplateError

from stages.errors import BadInput
from stages.runtime.process import die_with_parent, forked

SECONDS = 30.0
"""CPU time of one rendering."""
ENDED_AFTER = 2.0
"""Times SECONDS: CPU time, of all threads of the process, after which the kernel ends it."""
MEMORY = 2**30
"""Bytes that the first rendering may take."""
LONGEST = 2**24
"""Characters that a rendering may have."""
AGAIN = 1.0
"""Seconds until a timer rings again, where something caught what it raised."""
WITHOUT_MEMORY, TOO_LONG = 3, 4
"""Exit codes of the child."""
_tried = set[str]()


def refuse_endless(what: str, template: str, render: Callable[[], str], seconds: float = SECONDS) -> None:
    """Raise BadInput for a template that does not end within its limits, the first time that this process meets it.
    Anything else that it raises is left to the rendering. `what` names the template in the message."""
    if template in _tried:
        return
    status = _status_of_child(render, seconds)
    if status == WITHOUT_MEMORY:
        raise BadInput(f"{what} needs more than {MEMORY // 2**20} MiB for one text. Fix: use another template")
    if status == TOO_LONG:
        raise BadInput(_too_long(what))
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        raise BadInput(_endless(what, seconds))
    if status < 0:
        raise BadInput(f"{what} ends the process that renders it ({signal.Signals(-status).name}). Fix: use another")
    _tried.add(template)


def rendered(what: str, render: Callable[[], str], seconds: float = SECONDS) -> str:
    """What a template makes. Raises BadInput for one that does not end or writes too much, and TemplateError for
    whatever else goes wrong in it."""
    try:
        with timed(what, seconds):
            text = render()
    except (TemplateError, BadInput):
        raise
    except Exception as error:  # arithmetic, types, recursion, memory: a template can raise anything
        raise TemplateError(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}") from None
    if len(text) > LONGEST:
        raise BadInput(_too_long(what))
    return text


def _endless(what: str, seconds: float) -> str:
    return f"{what} did not end within {seconds:g} s. Fix: use another template"


def _too_long(what: str) -> str:
    return f"{what} writes more than {LONGEST} characters for one text. Fix: use another template"


@contextmanager
def timed(what: str, seconds: float = SECONDS) -> Iterator[None]:
    """A BadInput once this thread has computed so long. Python hears signals in its main thread only; any other has no
    timer. Within one call into C nothing is raised, and SIGPROF ends the process after ENDED_AFTER times as long,
    unless somebody else handles that signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    start = time.thread_time()

    def ring(number: int, frame: FrameType | None) -> None:
        left = seconds - (time.thread_time() - start)
        signal.setitimer(signal.ITIMER_REAL, left if left > 0 else AGAIN)
        if left <= 0:
            raise BadInput(_endless(what, seconds))

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    ours = signal.getsignal(signal.SIGPROF) == signal.SIG_DFL
    if ours:
        signal.setitimer(signal.ITIMER_PROF, ENDED_AFTER * seconds)
    try:
        yield
    finally:
        if ours:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def _status_of_child(render: Callable[[], str], seconds: float) -> int:
    """How a child ends that renders: an exit code, or a signal as a negative number."""
    parent = os.getpid()

    def life() -> int:
        die_with_parent(parent)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends its child
        _limit(seconds)
        try:
            return TOO_LONG if len(render()) > LONGEST else 0
        except MemoryError:
            return WITHOUT_MEMORY
        except Exception:
            return 0

    pid = forked(life)
    try:
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return os.waitstatus_to_exitcode(status)


def _limit(seconds: float) -> None:
    """The kernel's limits on this process: no core file, CPU time, address space."""
    whole = max(1, round(seconds))
    mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    for kind, soft in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, whole),
        (resource.RLIMIT_AS, mapped + MEMORY),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
