"""Aliases: names that move from artifact to artifact, and remember each move.

    refs/<alias>/<n>.json        {artifact | null, prev, actor, reason, evidence, at}; append-only, the highest counts

Entry n+1 is put where none may be, so of two movers who saw entry n one is told that it lost. Who moves an alias pins
the artifact, reads the log of its key again, puts the entry and lets go: so an alias never points at what a clean-up
beside it takes away (`gc`).
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
from pipeline.registry.registry import Registry
from pipeline.registry.stores.store import read_as
from stages.config import Frozen
from stages.errors import BadInput

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
ARTIFACT_ID = re.compile(r".+-[0-9a-f]{8}")
"""What an alias must not look like."""


class Move(Frozen):
    """One entry of an alias's log."""

    artifact: str | None
    """Where the alias points from here on; None: it was taken away."""
    prev: int
    """The number of the entry that the mover saw as the newest; 0 for none."""
    actor: str
    """user@host."""
    reason: str
    evidence: dict[str, Any] = Field(default_factory=dict)
    """What was measured (`pipeline.results.promote`); empty for a move without a comparison."""
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
    """Point an alias at an artifact. `expect`: the number that the alias must still have; off: wherever it is.

    Raises BadInput when it has another number, for a name that is none, and for an artifact that is void or gone.
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
    """Take an alias away; its history stays. Raises BadInput when there is none."""
    seen = current(registry, alias)
    if seen is None:
        raise BadInput(f"there is no alias {alias} in {registry.url}; switchback alias ls shows what there is")
    return _move(registry, alias, None, seen.number, reason, {})


def newest(registry: Registry, alias: str) -> Move | None:
    """The last entry of an alias's log, which may be that it was taken away; None when it never was."""
    number = registry.store.last(_log(alias))
    return _entry(registry, alias, number) if number else None


def current(registry: Registry, alias: str) -> Move | None:
    """The entry that says where an alias points; None when it points nowhere."""
    found = newest(registry, alias) if _is_name(alias) else None
    return found if found and found.artifact else None


def history(registry: Registry, alias: str) -> list[Move]:
    """Every move, oldest first. Raises BadInput for an alias that never was."""
    _refuse_name(alias)
    numbers = range(1, registry.store.last(_log(alias)) + 1)
    if not numbers:
        raise BadInput(f"there is no alias {alias} in {registry.url}; switchback alias ls shows what there is")
    return [_entry(registry, alias, number) for number in numbers]


def aliases(registry: Registry) -> dict[str, Move]:
    """Every alias that points somewhere."""
    found = ((alias, current(registry, alias)) for alias in registry.store.names("refs"))
    return {alias: move for alias, move in found if move}


def look_up(registry: Registry, name: str) -> Artifact | None:
    """An artifact by id or alias; None when there is none."""
    if not ARTIFACT_ID.fullmatch(name) and (move := current(registry, name)) and move.artifact:
        return registry.open(move.artifact)
    return registry.get(name)


def resolve(registry: Registry, name: str) -> Artifact:
    """An artifact by id or alias. Raises BadInput when there is none."""
    if found := look_up(registry, name):
        return found
    refuse_stage(registry, name)
    return registry.open(name)


def refuse_stage(registry: Registry, name: str) -> None:
    """Raise BadInput, with the id that was probably meant, for a name that only a stage has: which of its artifacts is
    meant, nobody can tell."""
    if of_stage := [one for one in registry.artifacts() if one.stage == name]:
        newest = max(of_stage, key=lambda one: one.created)
        raise BadInput(f"{name} is a stage; give one of its artifacts, of which {newest.id} is the newest")


def actor() -> str:
    """Who does something: user@host."""
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
            raise BadInput(_elsewhere(registry, alias, expect))
        move = Move(artifact=artifact, prev=seen, actor=actor(), reason=reason, evidence=evidence, at=now())
        if registry.store.append_at(_log(alias), move.number, move.model_dump(mode="json")):
            return move


def _elsewhere(registry: Registry, alias: str, expect: int) -> str:
    found = newest(registry, alias)
    if found is None:
        return f"{alias} was expected at {expect}, but it has never been set; leave --expect out, or give 0"
    where = f"at {found.number}, {found.artifact}," if found.artifact else f"at {found.number}, pointing nowhere,"
    return (
        f"{alias} was expected at {expect}, but is {where} moved by {found.actor} on {found.at}; look at it and give "
        f"--expect {found.number}"
    )


def _entry(registry: Registry, alias: str, number: int) -> Move:
    name = f"{_log(alias)}/{number:06d}.json"
    if (move := read_as(registry.store, name, Move)) and move.number == number:
        return move
    raise BadInput(f"{registry.url}/{name} is not entry {number} of its log; it was not written by switchback")


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
