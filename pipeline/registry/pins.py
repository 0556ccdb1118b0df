"""Pins: they protect an artifact from clean-up for an owner.

    pins/<id>/<owner>.json       {owner, reason, at}

A pin is written before the log of the artifact's key is read (`Registry.hold`), and removed by its owner. A user's pin
counts for ever, a run's as long as the run lives (`runs.alive`), and any other owner's for `LIFE`. The next clean-up
removes a pin that does not count any more.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from pydantic import AwareDatetime

from pipeline.registry.artifact import Artifact
from pipeline.registry.registry import Registry, passed_over
from pipeline.registry.runs import alive
from pipeline.registry.stores.store import read_as
from stages.config import Frozen
from stages.errors import BadInput

USER = "user"
"""The owner of pins that a person sets."""
LIFE = timedelta(hours=24)
"""Lifetime of a pin whose owner is neither a user nor a run, such as a command that sets an alias."""


class Pin(Frozen):
    """An owner that needs an artifact."""

    owner: str
    """`user`, a run, or a command in the middle of its work."""
    reason: str
    at: AwareDatetime


def pins(registry: Registry, strict: bool = True) -> list[tuple[str, Pin]]:
    """(id of an artifact, pin) for all pins. Raises Unreadable for one that this user may not read; without `strict`, a
    warning names it."""
    store = registry.store
    found: list[tuple[str, Pin]] = []
    for artifact_id in store.names("pins"):
        with passed_over(not strict):
            for name in store.names(f"pins/{artifact_id}"):
                pin = read_as(store, f"pins/{artifact_id}/{name}", Pin)
                if pin is not None:  # else it was released meanwhile
                    found.append((artifact_id, pin))
    return found


def counts(registry: Registry, pin: Pin, moment: datetime) -> bool:
    """Whether a pin still protects its artifact."""
    if pin.owner == USER:
        return True
    lives = alive(registry, pin.owner, moment)
    if lives is None:
        return pin.at > moment - LIFE
    return lives


def keep(registry: Registry, artifact: Artifact, reason: str) -> None:
    """Pin an artifact for the user. Raises BadInput for one that is pinned already, void or gone."""
    if is_kept(registry, artifact.id):
        raise BadInput(f"{artifact.id} is pinned already; switchback unpin {artifact.id} lets it go")
    registry.pin(artifact.id, USER, reason)
    if not registry.usable(artifact):
        registry.release(artifact.id, USER)
        raise BadInput(f"{artifact.id} is void or gone, so it cannot be kept; run its recipe to make it again")


def let_go(registry: Registry, artifact_id: str) -> None:
    """Remove the user's pin. Raises BadInput when there is none."""
    if not is_kept(registry, artifact_id):
        raise BadInput(f"{artifact_id} is not pinned by a user; switchback pins shows what is")
    registry.release(artifact_id, USER)


def is_kept(registry: Registry, artifact_id: str) -> bool:
    """Whether a user has pinned an artifact."""
    return registry.store.read(f"pins/{artifact_id}/{USER}.json") is not None
