"""Pins: who must not lose an artifact.

    pins/<id>/<owner>.json       {owner, reason, at}

A pin is put before the log of the artifact's key is read (`Registry.hold`), and taken away by its owner. What a dead
owner left does not count any more, and the next clean-up takes it away: a run's pins count as long as the run lives
(`runs.alive`), any other owner's for `LIFE`, a user's for ever.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from pydantic import AwareDatetime

from pipeline.registry.artifact import Artifact
from pipeline.registry.registry import Registry
from pipeline.registry.runs import alive
from pipeline.registry.stores.store import read_as
from stages.config import Frozen
from stages.errors import BadInput

USER = "user"
"""The owner of what people pin."""
LIFE = timedelta(hours=24)
"""How long a pin counts whose owner is neither a user nor a run: somebody who was about to set an alias."""


class Pin(Frozen):
    """Somebody needs an artifact."""

    owner: str
    """`user`, a run, or a command in the middle of its work."""
    reason: str
    at: AwareDatetime


def pins(registry: Registry) -> list[tuple[str, Pin]]:
    """(id of an artifact, pin) for all pins."""
    store = registry.store
    names = [f"pins/{id}/{name}" for id in store.names("pins") for name in store.names(f"pins/{id}")]
    found = ((name.split("/")[1], read_as(store, name, Pin)) for name in names)
    return [(id, pin) for id, pin in found if pin]  # one that went meanwhile was let go


def counts(registry: Registry, pin: Pin, moment: datetime) -> bool:
    """Whether a pin's owner is still there."""
    if pin.owner == USER:
        return True
    lives = alive(registry, pin.owner, moment)
    return pin.at > moment - LIFE if lives is None else lives


def keep(registry: Registry, artifact: Artifact, reason: str) -> None:
    """Pin an artifact for the user. Raises BadInput for one that is pinned already, void or gone."""
    if is_kept(registry, artifact.id):
        raise BadInput(f"{artifact.id} is pinned already; switchback unpin {artifact.id} lets it go")
    registry.pin(artifact.id, USER, reason)
    if not registry.usable(artifact):
        registry.release(artifact.id, USER)
        raise BadInput(f"{artifact.id} is void or gone, so it cannot be kept; run its recipe to make it again")


def let_go(registry: Registry, id: str) -> None:
    """Take the user's pin away. Raises BadInput when there is none."""
    if not is_kept(registry, id):
        raise BadInput(f"{id} is not pinned by a user; switchback pins shows what is")
    registry.release(id, USER)


def is_kept(registry: Registry, id: str) -> bool:
    """Whether a user has pinned an artifact."""
    return registry.store.read(f"pins/{id}/{USER}.json") is not None
