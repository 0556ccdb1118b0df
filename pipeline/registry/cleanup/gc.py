"""Clean-up: what nobody needs any more goes, and nothing that somebody needs.

    tombstones/<id>.json         {artifact: its whole manifest, why, at}, so that lineage still explains what was cleaned

Needed is what an alias, a user's pin or a live run's pin points at, what is younger than the grace, what those were
made from, and the evaluations of the policies among them. An artifact that is not needed goes in these steps, and a
clean-up that is killed between any two is finished by the next:

1. its tombstone is written, and {void, reason: about to be cleaned} is appended to its key's log;
2. pins are read again, then aliases, then what there is: all that was not condemned counts as needed now;
3. what is needed after all gets {artifact} back; of the rest, {void, reason: cleaned} is appended, the manifest is removed, and then the files.

Who wants an artifact pins it, then reads the log (`Registry.hold`). Did it pin before step 2, the pin is seen; did it
pin later, it sees the void. An alias is put while its mover's pin is there, so pins are read before aliases. Of two
clean-ups at once, whoever puts the entry after the one that both have seen decides: that is a compare-and-swap, so what
one gives back the other never removes.
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
from pipeline.registry.tombstones import Tombstone, _tombstone
from stages.config import Frozen
from stages.job import MANIFEST
from stages.runtime.checkpoints import clear, sweep

GRACE = timedelta(hours=24)
"""How young an artifact may be and stay without a reason."""
UNNEEDED, UNFINISHED = "no alias, pin, live run or kept artifact needs it", "a clean-up was killed at it"
"""Why artifacts go."""
DOUBTED, CLEANED = "about to be cleaned", "cleaned"
"""Reasons of the two void entries."""


class Survey(Frozen):
    """What a clean-up removes, and why it keeps what it keeps."""

    removals: tuple[Removal, ...]
    kept: dict[str, str]
    """Artifact -> why."""

    @property
    def frees(self) -> int:
        """Bytes, as far as they are known."""
        return sum(removal.bytes or 0 for removal in self.removals)


class _Condemned(NamedTuple):
    artifact: Artifact
    why: str
    number: int
    """Of the newest entry of its key's log, when the last word on the artifact was that it is void."""
    reason: str
    """Of that word."""


def survey(registry: Registry, work: Path, grace: timedelta = GRACE, moment: datetime | None = None) -> Survey:
    """What `clean` would remove at a moment (off: now). Nothing is changed."""
    moment = moment or datetime.now(UTC)
    artifacts, kept = needed(registry, moment, _young(moment - grace))
    doomed = [Removal(what="artifact", name=one.id, why=why, bytes=one.size) for one, why in _doomed(artifacts, kept)]
    checkpoints = [one for _, found in resumable(registry, work) for one in found]
    return Survey(removals=(*checkpoints, *doomed, *rubbish(registry, moment)), kept=kept)


def clean(registry: Registry, work: Path, grace: timedelta = GRACE, moment: datetime | None = None) -> Survey:
    """Remove what nobody needs, checkpoints of published stages first; returns what was removed. `work`: where work in
    progress lies."""
    moment = moment or datetime.now(UTC)
    checkpoints = list(_clean_work(registry, work))
    artifacts, kept = _clean_artifacts(registry, grace, moment)
    left = list(rubbish(registry, moment))
    for removal in left:
        remove(registry, removal)
    return Survey(removals=(*checkpoints, *artifacts, *left), kept=kept)


def _clean_work(registry: Registry, work: Path) -> Iterator[Removal]:
    for job, found in resumable(registry, work):
        clear(job)
        sweep(job)
        yield from found


def _clean_artifacts(registry: Registry, grace: timedelta, moment: datetime) -> tuple[list[Removal], dict[str, str]]:
    """(what went, what stayed and why)."""
    young = _young(moment - grace)
    artifacts, first = needed(registry, moment, young)
    unfinished = set(registry.store.names("tombstones"))
    why = {one.id: UNFINISHED for one in artifacts if f"{one.id}.json" in unfinished}
    why |= {one.id: said for one, said in _doomed(artifacts, first)}
    condemned = [_condemn(registry, one, why[one.id], moment) for one in artifacts if one.id in why]
    _, kept = needed(registry, moment, lambda one: young(one) if one.id in why else "published meanwhile")
    gone = [one for one in condemned if _is_over(registry, one, one.artifact.id in kept)]
    for one in gone:
        registry.store.put_new(_tombstone(one.artifact.id), _buried(one, moment))
        registry.store.remove_tree(f"artifacts/{one.artifact.id}", MANIFEST)
    removals = [Removal(what="artifact", name=one.artifact.id, why=one.why, bytes=one.artifact.size) for one in gone]
    return removals, {id: first.get(id, why) for id, why in kept.items()}


def _young(since: datetime) -> Callable[[Artifact], str | None]:
    return lambda one: "younger than the grace" if datetime.fromisoformat(one.created) > since else None


def _doomed(artifacts: list[Artifact], kept: dict[str, str]) -> Iterator[tuple[Artifact, str]]:
    for one in artifacts:
        if one.id not in kept:
            yield one, UNNEEDED


def _condemn(registry: Registry, artifact: Artifact, why: str, moment: datetime) -> _Condemned:
    """Say that an artifact is void, with its tombstone before that; one that is void already stays so."""
    log = f"keys/{artifact.key}"
    found = _Condemned(artifact, why, 0, DOUBTED)
    registry.store.put_new(_tombstone(artifact.id), _buried(found, moment))
    while True:
        last, said = _last_word(registry, artifact)
        if said and "void" in said:
            return found._replace(number=last, reason=str(said.get("reason")))
        if registry.store.append_at(log, last + 1, {"void": artifact.id, "reason": DOUBTED}):
            return found._replace(number=last + 1)


def _is_over(registry: Registry, one: _Condemned, needed: bool) -> bool:
    """Whether an artifact goes for good. One that is needed after all is given back, unless it was void for another
    reason: then it stays as it is."""
    id = one.artifact.id
    if one.reason == CLEANED:
        return True
    if not needed:
        return _decide(registry, one, {"void": id, "reason": CLEANED})
    if one.reason != DOUBTED or _decide(registry, one, {"artifact": id}):
        registry.store.remove(_tombstone(id))
    return False


def _decide(registry: Registry, one: _Condemned, entry: dict[str, Any]) -> bool:
    """Append the last word on an artifact; False when another clean-up has had it."""
    while True:
        last, said = _last_word(registry, one.artifact, after=one.number)
        if said:
            return False
        if registry.store.append_at(f"keys/{one.artifact.key}", last + 1, entry):
            return True


def _last_word(registry: Registry, artifact: Artifact, after: int = 0) -> tuple[int, dict[str, Any] | None]:
    """(number of a log's newest entry, its newest entry about an artifact behind `after`)."""
    log = f"keys/{artifact.key}"
    last = registry.store.last(log)
    for number in range(last, after, -1):
        entry = registry.store.get(f"{log}/{number:06d}.json")
        if artifact.id in (entry.get("artifact"), entry.get("void")):
            return last, entry
    return last, None


def _buried(one: _Condemned, moment: datetime) -> dict[str, Any]:
    return Tombstone(artifact=one.artifact, why=one.why, at=moment).model_dump(mode="json")
