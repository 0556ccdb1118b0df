"""Work in progress: its directory, and the lock that lets one run at a time make a step.

SWITCHBACK_WORK, else work/ in the registry
<first 12 digits of the key>/    one step's directory (`stages.runtime.workdir`)
prefect/                         the home of a user's Prefect servers (`pipeline.flows.server`)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pipeline.registry.registry import Registry
from stages.errors import BadInput
from stages.runtime import locks
from stages.runtime.disk import make_directory, share, share_tree, shared
from stages.runtime.workdir import RUN_LOCK

WORK = "SWITCHBACK_WORK"
"""Environment variable with another directory for work in progress."""
TICK = 0.5
"""Seconds between two calls of `on_tick` while this run waits for another."""
HOLDER_PATIENCE = 1.0
"""Seconds to wait for the pid of the lock's holder."""


@contextmanager
def alone(
    registry: Registry, work: Path, on_wait: Callable[[str], None], on_tick: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Be the only run on this machine that makes this step, from the look into the registry to its publication.

    While another run makes it, `on_wait` is called once with that run's pid, and `on_tick` repeatedly. The kernel frees
    the lock when its holder ends, however it ends. Raises BadInput for a directory of another user that shares nothing.
    """
    root = _shared_as(registry, work.parent)
    make_directory(work, root)
    with _run_lock(work) as lock:
        share(work / RUN_LOCK, root)
        if not locks.try_lock(lock):
            on_wait(locks.holder(lock, HOLDER_PATIENCE))
            while not locks.lock_within(lock, TICK):
                on_tick()
        locks.write_holder(lock)
        try:
            with shared(work):
                yield
        finally:
            locks.erase_holder(lock)  # so that no run names a holder that has ended
            share_tree(work, root)  # another user may resume what this one began


def _run_lock(work: Path) -> IO[str]:
    try:
        return (work / RUN_LOCK).open("a+", encoding="utf-8")
    except PermissionError as error:
        raise BadInput(
            f"work: {work} is in use by another user (found {error.strerror}, expected a directory that can be "
            f"written). Fix: set {WORK} to a directory of your own, or share the registry (docs/registry.md)"
        ) from None


def work_root(registry: Registry) -> Path:
    """The directory of work in progress: SWITCHBACK_WORK, else `work/` in the registry."""
    return Path(os.environ.get(WORK) or registry.store.work).expanduser().absolute()


def prefect_home(registry: Registry) -> Path:
    """Where the Prefect servers of this user's runs keep their files: `prefect/` in the directory of work in progress,
    or `prefect-<uid>/` where that one is another user's. Makes the directory above it, as a team shares it."""
    work = work_root(registry)
    with suppress(OSError):  # a run that cannot make it says so when it makes a step
        make_directory(work, _shared_as(registry, work))
    home = work / "prefect"
    return home if _is_free_or_ours(home) else work / f"prefect-{os.geteuid()}"


def _is_free_or_ours(home: Path) -> bool:
    """Whether nothing is there, or a directory of this user; a link may lead anywhere."""
    if home.is_symlink():
        return False
    return not home.exists() or home.stat().st_uid == os.geteuid()


def _shared_as(registry: Registry, work: Path) -> Path:
    """The directory whose permissions work in progress takes: the registry's root, or `work` outside of it."""
    return Path(registry.url) if work.is_relative_to(registry.url) else work
