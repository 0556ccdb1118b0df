"""What is left behind: resume checkpoints of published stages, and what killed writers left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from pipeline.registry.pins import counts, pins
from pipeline.registry.registry import Registry
from stages.config import Frozen
from stages.job import MANIFEST
from stages.runtime import locks
from stages.runtime.checkpoints import TEMPORARY
from stages.runtime.workdir import KEY_DIGITS, LOCK, RUN_LOCK

STALE = timedelta(hours=24)
"""How old what a killed writer left has to be."""
RESUMABLE = ("checkpoint-[0-9]*", ".removed-*", *TEMPORARY)
"""What a job resumes from, as `stages.runtime.checkpoints` names it."""


class Removal(Frozen):
    """One thing that goes."""

    what: Literal["checkpoint", "artifact", "remains", "pin"]
    name: str
    """An artifact's id, a checkpoint's path, a name in the registry."""
    why: str
    bytes: int | None
    """What it frees; None where the store cannot tell."""


def resumable(registry: Registry, work: Path) -> Iterator[tuple[Path, list[Removal]]]:
    """(directory of a job, what in it nobody will resume from), where a job's stage is published; no job works there as
    long as this is at it."""
    keys = registry.store.names("keys")
    for job in sorted({path.parent for pattern in RESUMABLE for path in work.glob(f"*/{pattern}")}):
        of_job = [key for key in keys if len(job.name) == KEY_DIGITS and key.startswith(job.name)]
        with _unused(job) as unused:
            if unused and any(registry.find(key) for key in of_job):
                yield job, [_resumable(path) for pattern in RESUMABLE for path in sorted(job.glob(pattern))]


@contextmanager
def _unused(job: Path) -> Iterator[bool]:
    """Whether neither a job nor a run works in a directory; none can start there while this block lasts."""
    with ExitStack() as stack:
        files = [stack.enter_context((job / name).open()) for name in (LOCK, RUN_LOCK) if (job / name).exists()]
        yield all(map(locks.try_lock, files))


def _resumable(path: Path) -> Removal:
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    return Removal(what="checkpoint", name=str(path), why="its stage is published", bytes=size)


def rubbish(registry: Registry, moment: datetime) -> Iterator[Removal]:
    """What no log and no artifact speaks of any more."""
    store = registry.store
    for name in store.abandoned("artifacts", MANIFEST):
        yield Removal(
            what="remains", name=name, why="it has no manifest, and nobody writes it", bytes=store.weight(name)
        )
    for name in store.leftovers(moment - STALE):
        yield Removal(what="remains", name=name, why="its writer was killed", bytes=store.weight(name))
    for id, pin in pins(registry):
        if not counts(registry, pin, moment):
            yield Removal(what="pin", name=f"pins/{id}/{pin.owner}.json", why="its owner is gone", bytes=0)


def remove(registry: Registry, removal: Removal) -> None:
    """Take one piece of rubbish away."""
    if removal.name.startswith("artifacts/"):
        registry.store.remove_tree(removal.name, MANIFEST)
    else:
        registry.store.remove(removal.name)
