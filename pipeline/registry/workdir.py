"""Work in progress: its directory, and the lock that lets one run at a time make a step.

SWITCHBACK_WORK, else work/ in the registry
<first 12 digits of the key>/    one step's directory (`stages.runtime.workdir`)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.registry.registry import Registry
from stages.runtime import locks
from stages.runtime.workdir import RUN_LOCK

WORK = "SWITCHBACK_WORK"
"""Environment variable with another directory for work in progress."""
TICK = 0.5
"""Seconds between two calls of `on_tick` while this run waits for another."""
HOLDER_PATIENCE = 1.0
"""Seconds to wait for the pid of the lock's holder."""


@contextmanager
def alone(work: Path, on_wait: Callable[[str], None], on_tick: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Be the only run on this machine that makes this step, from the look into the registry to its publication.

    While another run makes it, `on_wait` is called once with that run's pid, and `on_tick` repeatedly. The kernel frees
    the lock when its holder ends, however it ends.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / RUN_LOCK).open("a+") as lock:
        if not locks.try_lock(lock):
            on_wait(locks.holder(lock, HOLDER_PATIENCE))
            while not locks.lock_within(lock, TICK):
                on_tick()
        locks.write_holder(lock)
        try:
            yield
        finally:
            locks.erase_holder(lock)  # so that no run names a holder that has ended


def work_root(registry: Registry) -> Path:
    """The directory of work in progress: SWITCHBACK_WORK, else `work/` in the registry."""
    return Path(os.environ.get(WORK) or registry.store.work).absolute()
