"""Leftovers: resume checkpoints of published stages, and files of killed writers."""

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
"""Age from which a file of a killed writer is removed."""
RESUMABLE = ("checkpoint-[0-9]*", ".removed-*", *TEMPORARY)
"""Names of the files that a job resumes from, as `stages.runtime.checkpoints` writes them."""


class Removal(Frozen):
    """One thing to be removed."""

    what: Literal["checkpoint", "artifact", "remains", "pin"]
    name: str
    """An artifact's id, a checkpoint's path, a name in the registry."""
    why: str
    bytes: int | None
    """Bytes it frees; None where the store cannot tell."""


def resumable(registry: Registry, work: Path) -> Iterator[tuple[Path, list[Removal]]]:
    """(directory of a job, its resume checkpoints) for each job whose stage is published. The directory is locked while
    the caller handles it."""
    keys = registry.store.names("keys")
    for job in sorted({path.parent for pattern in RESUMABLE for path in work.glob(f"*/{pattern}")}):
        job_keys = [key for key in keys if len(job.name) == KEY_DIGITS and key.startswith(job.name)]
        with _unused(job) as unused:
            if unused and any(registry.find(key) for key in job_keys):
                yield job, [_resumable(path) for pattern in RESUMABLE for path in sorted(job.glob(pattern))]


@contextmanager
def _unused(job: Path) -> Iterator[bool]:
    """Whether no job and no run uses a directory; none can start there while this block lasts."""
    with ExitStack() as stack:
        files = [
            stack.enter_context((job / name).open(encoding="utf-8"))
            for name in (LOCK, RUN_LOCK)
            if (job / name).exists()
        ]
        yield all(map(locks.try_lock, files))


def _resumable(path: Path) -> Removal:
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    return Removal(what="checkpoint", name=str(path), why="its stage is published", bytes=size)


def rubbish(registry: Registry, moment: datetime) -> Iterator[Removal]:
    """Directories without a manifest, files of killed writers, and pins of owners that are gone."""
    store = registry.store
    for name in store.abandoned("artifacts", MANIFEST):
        yield Removal(
            what="remains", name=name, why="it has no manifest, and no process writes it", bytes=store.weight(name)
        )
    for name in store.leftovers(moment - STALE):
        yield Removal(what="remains", name=name, why="its writer was killed", bytes=store.weight(name))
    for artifact_id, pin in pins(registry):
        if not counts(registry, pin, moment):
            yield Removal(what="pin", name=f"pins/{artifact_id}/{pin.owner}.json", why="its owner is gone", bytes=0)


def remove(registry: Registry, removal: Removal) -> None:
    """Remove one of the `rubbish`."""
    if removal.name.startswith("artifacts/"):
        registry.store.remove_tree(removal.name, MANIFEST)
    else:
        registry.store.remove(removal.name)
