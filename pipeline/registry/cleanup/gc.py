"""Garbage collection: remove every artifact that is not needed, and nothing else.

    tombstones/<id>.json         {artifact: its manifest, why, at}, so that lineage still explains a removed artifact

An artifact is needed when an alias, a user's pin or a live run's pin points at it, or when it is younger than the
grace. Its ancestors are needed too, and so are the evaluations of the policies among them. An artifact that is not
needed is removed in three steps. A clean-up that is killed between any two is finished by the next:

1. Write its tombstone, and append {void, reason: about to be cleaned} to its key's log.
2. Read the pins again, then the aliases, then the artifacts: one that step 1 did not void counts as needed now.
3. Append {artifact} again for a needed one. For any other, append {void, reason: cleaned}, remove the manifest, and
   then remove the files.

A reader pins an artifact and then reads the log (`Registry.hold`). If it pinned before step 2, clean-up sees the pin.
If it pinned later, it sees the void. An alias is set under a pin of its own, so pins are read before aliases. Of two
concurrent clean-ups, the first to append the next entry decides: the append is a compare-and-swap, so neither removes
an artifact that the other restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.registry.artifact import Artifact
from pipeline.registry.cleanup.leftovers import Removal, remove, resumable, rubbish
from pipeline.registry.cleanup.needed import needed
from pipeline.registry.registry import Registry
from pipeline.registry.tombstones import Tombstone, tombstone_name
from stages.config import Frozen
from stages.job import MANIFEST
from stages.runtime.checkpoints import clear, sweep

GRACE = timedelta(hours=24)
"""Age below which an artifact is kept without any other reason."""
UNNEEDED, UNFINISHED = "no alias, pin, live run or kept artifact needs it", "a clean-up was killed at it"
"""Reasons for a removal."""
DOUBTED, CLEANED = "about to be cleaned", "cleaned"
"""Reasons of the two void entries."""


class Survey(Frozen):
    """The removals of a clean-up, and its reasons for keeping the rest."""

    removals: tuple[Removal, ...]
    kept: dict[str, str]
    """Id of an artifact -> reason."""

    @property
    def frees(self) -> int:
        """Bytes, as far as they are known."""
        return sum(removal.bytes or 0 for removal in self.removals)


class _Condemned(NamedTuple):
    artifact: Artifact
    why: str
    number: int
    """The newest entry of its key's log when the artifact was void."""
    reason: str
    """The reason in the entry that voids it."""


def survey(registry: Registry, work: Path, grace: timedelta = GRACE, moment: datetime | None = None) -> Survey:
    """The removals that `clean` would make at a moment (off: now). Changes nothing."""
    moment = moment or datetime.now(UTC)
    artifacts, kept = needed(registry, moment, _young(moment - grace))
    unneeded = [
        Removal(what="artifact", name=artifact.id, why=UNNEEDED, bytes=artifact.size)
        for artifact in artifacts
        if artifact.id not in kept
    ]
    checkpoints = [removal for _, removals in resumable(registry, work) for removal in removals]
    return Survey(removals=(*checkpoints, *unneeded, *rubbish(registry, moment)), kept=kept)


def clean(registry: Registry, work: Path, grace: timedelta = GRACE, moment: datetime | None = None) -> Survey:
    """Remove the checkpoints of published stages, unneeded artifacts and leftovers; returns the removals. `work`: the
    directory of work in progress."""
    moment = moment or datetime.now(UTC)
    checkpoints = list(_clean_work(registry, work))
    artifacts, kept = _clean_artifacts(registry, grace, moment)
    left = list(rubbish(registry, moment))
    for removal in left:
        remove(registry, removal)
    return Survey(removals=(*checkpoints, *artifacts, *left), kept=kept)


def _clean_work(registry: Registry, work: Path) -> Iterator[Removal]:
    for job, removals in resumable(registry, work):
        clear(job)
        sweep(job)
        yield from removals


def _clean_artifacts(registry: Registry, grace: timedelta, moment: datetime) -> tuple[list[Removal], dict[str, str]]:
    """(removals, id of a kept artifact -> reason)."""
    is_young = _young(moment - grace)
    artifacts, first = needed(registry, moment, is_young)
    why = _reasons_to_remove(registry, artifacts, first)
    condemned = [_condemn(registry, artifact, why[artifact.id], moment) for artifact in artifacts if artifact.id in why]

    def reason_to_keep(artifact: Artifact) -> str | None:
        return is_young(artifact) if artifact.id in why else "published meanwhile"

    _, kept = needed(registry, moment, reason_to_keep)
    removed = [entry for entry in condemned if _is_final(registry, entry, entry.artifact.id in kept)]
    for entry in removed:
        registry.store.put_new(tombstone_name(entry.artifact.id), _tombstone_of(entry, moment))
        registry.store.remove_tree(f"artifacts/{entry.artifact.id}", MANIFEST)
    removals = [
        Removal(what="artifact", name=entry.artifact.id, why=entry.why, bytes=entry.artifact.size) for entry in removed
    ]
    return removals, {artifact_id: first.get(artifact_id, reason) for artifact_id, reason in kept.items()}


def _young(since: datetime) -> Callable[[Artifact], str | None]:
    """A function that gives the reason to keep an artifact that is younger than the grace, and None for any other."""

    def reason(artifact: Artifact) -> str | None:
        return "younger than the grace" if datetime.fromisoformat(artifact.created) > since else None

    return reason


def _reasons_to_remove(registry: Registry, artifacts: list[Artifact], kept: dict[str, str]) -> dict[str, str]:
    """Id -> why the artifact is to be removed; a tombstone is of a clean-up that did not finish."""
    tombstones = set(registry.store.names("tombstones"))
    why = {artifact.id: UNFINISHED for artifact in artifacts if f"{artifact.id}.json" in tombstones}
    return why | {artifact.id: UNNEEDED for artifact in artifacts if artifact.id not in kept}


def _condemn(registry: Registry, artifact: Artifact, why: str, moment: datetime) -> _Condemned:
    """Write an artifact's tombstone, and void it unless it is void already."""
    log = f"keys/{artifact.key}"
    condemned = _Condemned(artifact, why, 0, DOUBTED)
    registry.store.put_new(tombstone_name(artifact.id), _tombstone_of(condemned, moment))
    while True:
        last, entry = _newest_entry(registry, artifact)
        if entry and "void" in entry:
            return condemned._replace(number=last, reason=str(entry.get("reason")))
        if registry.store.append_at(log, last + 1, {"void": artifact.id, "reason": DOUBTED}):
            return condemned._replace(number=last + 1)


def _is_final(registry: Registry, condemned: _Condemned, needed: bool) -> bool:
    """Whether an artifact is to be removed. One that is needed after all is restored, unless it was void for another
    reason: then it stays void."""
    artifact_id = condemned.artifact.id
    if condemned.reason == CLEANED:
        return True
    if not needed:
        return _decide(registry, condemned, {"void": artifact_id, "reason": CLEANED})
    if condemned.reason != DOUBTED or _decide(registry, condemned, {"artifact": artifact_id}):
        registry.store.remove(tombstone_name(artifact_id))
    return False


def _decide(registry: Registry, condemned: _Condemned, decision: dict[str, Any]) -> bool:
    """Append the deciding entry about an artifact; False when another clean-up has appended one."""
    while True:
        last, entry = _newest_entry(registry, condemned.artifact, after=condemned.number)
        if entry:
            return False
        if registry.store.append_at(f"keys/{condemned.artifact.key}", last + 1, decision):
            return True


def _newest_entry(registry: Registry, artifact: Artifact, after: int = 0) -> tuple[int, dict[str, Any] | None]:
    """(number of a log's newest entry, its newest entry about an artifact after number `after`)."""
    log = f"keys/{artifact.key}"
    last = registry.store.last(log)
    for number in range(last, after, -1):
        entry = registry.store.get(f"{log}/{number:06d}.json")
        if artifact.id in (entry.get("artifact"), entry.get("void")):
            return last, entry
    return last, None


def _tombstone_of(condemned: _Condemned, moment: datetime) -> dict[str, Any]:
    return Tombstone(artifact=condemned.artifact, why=condemned.why, at=moment).model_dump(mode="json")
