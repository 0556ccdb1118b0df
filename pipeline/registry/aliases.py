"""Aliases: names that move from artifact to artifact, and remember each move.

    refs/<alias>/<n>.json        {artifact | null, prev, actor, reason, evidence, at}; append-only, the highest counts

A move writes entry n+1 only if there is none, so of two concurrent moves one fails. It also pins the artifact and reads
the log of its key before it writes the entry. So an alias never points at an artifact that a concurrent clean-up
removes (`cleanup.gc`).
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import uuid
from typing import Any

from pydantic import Field

from pipeline.registry.artifact import Artifact, now
from pipeline.registry.registry import Registry, passed_over
from pipeline.registry.stores.store import read_as
from stages.config import Frozen
from stages.errors import BadInput

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
ARTIFACT_ID = re.compile(r".+-[0-9a-f]{8}")
"""Form of an artifact's id, which an alias must not have."""


class Move(Frozen):
    """One entry of an alias's log."""

    artifact: str | None
    """The alias's new target; None: the alias was removed."""
    prev: int
    """The number of the newest entry before this one; 0 for none."""
    actor: str
    """user@host."""
    reason: str
    evidence: dict[str, Any] = Field(default_factory=dict)
    """The comparison behind the move (`pipeline.results.promote`); empty for a move without one."""
    at: str
    """UTC, ISO 8601."""

    @property
    def number(self) -> int:
        """The entry's own."""
        return self.prev + 1


def set_to(
    registry: Registry,
    alias: str,
    artifact: Artifact,
    expect: int | None = None,
    reason: str = "",
    evidence: dict[str, Any] | None = None,
) -> Move:
    """Point an alias at an artifact. `expect`: the number of the alias's newest entry; off: any number.

    Raises BadInput for another number than expected, for an invalid name, and for an artifact that is void or gone.
    """
    _refuse_name(alias)
    mover = f"alias-{uuid.uuid4().hex}"
    if not registry.hold(artifact, mover):
        raise BadInput(f"{artifact.id} is void or gone, so {alias} stays where it is; run its recipe to make it again")
    try:
        return _move(registry, alias, artifact.id, expect, reason, evidence or {})
    finally:
        registry.release(artifact.id, mover)


def remove(registry: Registry, alias: str, reason: str = "") -> Move:
    """Remove an alias and keep its history. Raises BadInput when there is none."""
    seen = current(registry, alias)
    if seen is None:
        raise BadInput(f"there is no alias {alias} in {registry.url}; switchback alias ls shows what there is")
    return _move(registry, alias, None, seen.number, reason, {})


def newest(registry: Registry, alias: str) -> Move | None:
    """The last entry of an alias's log, which may be its removal; None for an alias that was never set."""
    number = registry.store.last(_log(alias))
    return _entry(registry, alias, number) if number else None


def current(registry: Registry, alias: str) -> Move | None:
    """The move to the alias's target; None when it points nowhere."""
    move = newest(registry, alias) if _is_name(alias) else None
    if move is None or move.artifact is None:
        return None
    return move


def history(registry: Registry, alias: str) -> list[Move]:
    """Every move, oldest first. Raises BadInput for an alias that was never set."""
    _refuse_name(alias)
    numbers = range(1, registry.store.last(_log(alias)) + 1)
    if not numbers:
        raise BadInput(f"there is no alias {alias} in {registry.url}; switchback alias ls shows what there is")
    return [_entry(registry, alias, number) for number in numbers]


def aliases(registry: Registry, strict: bool = True) -> dict[str, Move]:
    """Every alias that points somewhere. Raises Unreadable for one that this user may not read; without `strict`, a
    warning names it."""
    found: dict[str, Move] = {}
    for alias in registry.store.names("refs"):
        with passed_over(not strict):
            if move := current(registry, alias):
                found[alias] = move
    return found


def look_up(registry: Registry, name: str) -> Artifact | None:
    """An artifact by id or alias; None when there is none."""
    move = current(registry, name)
    if move is not None and move.artifact is not None:
        return registry.open(move.artifact)
    return registry.get(name)


def resolve(registry: Registry, name: str) -> Artifact:
    """An artifact by id or alias. Raises BadInput when there is none."""
    artifact = look_up(registry, name)
    if artifact is not None:
        return artifact
    refuse_stage(registry, name)
    return registry.open(name)


def refuse_stage(registry: Registry, name: str) -> None:
    """Raise BadInput for the name of a stage, which may have several artifacts. The line suggests the newest one."""
    artifacts = registry.artifacts(name)
    if artifacts:
        raise BadInput(f"{name} is a stage; give one of its artifacts, of which {artifacts[-1].id} is the newest")


def actor() -> str:
    """The user of this process: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _move(
    registry: Registry, alias: str, artifact: str | None, expect: int | None, reason: str, evidence: dict[str, Any]
) -> Move:
    while True:
        seen = registry.store.last(_log(alias))
        if expect is not None and seen != expect:
            raise BadInput(_other_number(registry, alias, expect))
        move = Move(artifact=artifact, prev=seen, actor=actor(), reason=reason, evidence=evidence, at=now())
        if registry.store.append_at(_log(alias), move.number, move.model_dump(mode="json")):
            return move


def _other_number(registry: Registry, alias: str, expect: int) -> str:
    move = newest(registry, alias)
    if move is None:
        return f"{alias} was expected at {expect}, but it has never been set; leave --expect out, or give 0"
    target = move.artifact or "pointing nowhere"
    return (
        f"{alias} was expected at {expect}, but is at {move.number}, {target}, moved by {move.actor} on {move.at}; "
        f"look at it and give --expect {move.number}"
    )


def _entry(registry: Registry, alias: str, number: int) -> Move:
    name = f"{_log(alias)}/{number:06d}.json"
    move = read_as(registry.store, name, Move)
    if move is None or move.number != number:
        raise BadInput(f"{registry.url}/{name} is not entry {number} of its log; it was not written by switchback")
    return move


def _log(alias: str) -> str:
    return f"refs/{alias}"


def _is_name(alias: str) -> bool:
    return bool(NAME.fullmatch(alias)) and not ARTIFACT_ID.fullmatch(alias)


def _refuse_name(alias: str) -> None:
    if not _is_name(alias):
        raise BadInput(
            f"{alias!r} cannot name an alias; take a to z, 0 to 9, '.', '_' and '-', 64 at most, that do not look like "
            "the id of an artifact"
        )
