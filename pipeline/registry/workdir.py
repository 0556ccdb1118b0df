"""Work in progress: where it lies, and the lock by which one run at a time makes a step.

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
"""Environment variable that moves work in progress to another disk."""


TICK = 0.5
"""Seconds between two calls of `on_tick` while another run is waited for."""


HOLDER_PATIENCE = 1.0
"""Seconds in which the holder of a lock has written its pid."""


@contextmanager
def alone(work: Path, on_wait: Callable[[str], None], on_tick: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Be the only run on this machine that makes this step, from the look into the registry to its publication.

    Where another run is at it, `on_wait` hears that run's pid, once, and `on_tick` is called again and again. The
    kernel frees the lock whatever ends its holder.
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
    """Where work in progress lies: SWITCHBACK_WORK, else `work/` in the registry."""
    return Path(os.environ.get(WORK) or registry.store.work).absolute()
