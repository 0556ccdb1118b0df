"""Runs: one invocation each. A run has its recipe (recipe.yaml), its plan (plan.json) and a log of its events
(events/<n>.json).

The last event gives a run's state. A run without an end whose process is gone was interrupted.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.registry.artifact import now
from pipeline.registry.registry import Registry, passed_over
from pipeline.registry.stores.store import inside
from stages.config import Frozen
from stages.errors import BadInput, printable
from stages.runtime.process import started_at

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}"
"""Pattern of a run's id."""
FIRST = {"pid", "process", "host"}
"""Fields of a run's first event."""
ENDED = ("done", "failed", "stopped")
BEAT = 3600.0
"""Seconds between two heartbeats of a run."""
SILENT = 3
"""Heartbeats that a run on another machine may miss before it counts as interrupted."""
ALIVE = timedelta(hours=24)
"""How long after its last event a run that is not done keeps its pins; a failed run may be resumed until then."""
_beaten: dict[tuple[str, str], float] = {}
"""(registry, run) -> monotonic time of the last heartbeat that this process recorded."""


class Run(Frozen):
    """One invocation, as the registry remembers it."""

    run: str
    recipe: str
    """The recipe's name."""
    state: str
    """running, done, failed, stopped (by a signal) or interrupted (its process is gone)."""
    started: str
    resumes: str | None
    """The run that it resumes."""


def start(
    registry: Registry, recipe_name: str, recipe_yaml: str, plan: dict[str, Any], resumes: str | None = None
) -> str:
    """Record a new run, and the run that it resumes; returns its id."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    run = f"{recipe_name}-{stamp}-{secrets.token_hex(2)}"
    registry.initialise()
    registry.store.put_new(f"runs/{run}/plan.json", {"recipe": recipe_name, **plan})
    registry.store.put(f"runs/{run}/recipe.yaml", recipe_yaml.encode())
    pid = os.getpid()
    record(registry, run, "started", pid=pid, process=started_at(pid), host=socket.gethostname(), resumes=resumes)
    return run


def record(registry: Registry, run: str, event: str, **facts: Any) -> None:
    """Append an event: started, findings, said, step, heartbeat, done, failed or stopped."""
    registry.store.append(f"runs/{run}/events", {"event": event, "at": now(), **facts})


def beat(registry: Registry, run: str, every: float = BEAT) -> None:
    """Record a heartbeat of a run, at most one in `every` seconds; the first call only starts the clock. A call that
    records none costs next to no time."""
    before = _beaten.setdefault((registry.url, run), time.monotonic())
    if time.monotonic() - before >= every:
        # before recording, so that an unreachable registry is tried again only after `every` seconds
        _beaten[registry.url, run] = time.monotonic()
        record(registry, run, "heartbeat")


def alive(registry: Registry, run: str, moment: datetime) -> bool | None:
    """Whether a run's pins count at a moment: it is not done, and its last event is younger than ALIVE. None for an
    unknown run."""
    _, last = registry.store.newest(f"runs/{run}/events")
    if last is None:
        return None
    return last["event"] != "done" and datetime.fromisoformat(last["at"]) > moment - ALIVE


def events(registry: Registry, run: str) -> list[dict[str, Any]]:
    """Oldest first. Raises BadInput when there is no such run, or when its log is not one that switchback wrote."""
    log = registry.store.entries(f"runs/{run}/events") if re.fullmatch(NAME, run) else []
    if not log:
        raise BadInput(f"there is no run {printable(run)} in {registry.url}; switchback runs shows what there is")
    if not all(map(_is_event, log)) or not _is_first_event(log[0]):
        raise BadInput(f"runs/{run}/events holds what is no event of a run; remove the run from {registry.url}")
    return log


def _is_event(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("event"), str) and isinstance(entry.get("at"), str)


def _is_first_event(event: dict[str, Any]) -> bool:
    return isinstance(event.get("pid"), int) and event.keys() >= FIRST


def planned(registry: Registry, run: str) -> dict[str, Any]:
    """The run's plan.json."""
    events(registry, run)
    return registry.store.get(f"runs/{run}/plan.json")


def runs(registry: Registry) -> list[Run]:
    """All runs that this user may read, newest first; a warning names the others."""
    found: list[Run] = []
    for run in registry.store.names("runs"):
        with passed_over():
            if registry.store.names(f"runs/{run}/events"):
                found.append(_run(registry, run))
    return sorted(found, key=lambda run: run.started, reverse=True)


def recipe_of(registry: Registry, run: str) -> str:
    """The run's recipe.yaml. Raises BadInput when there is no such run."""
    content = registry.store.read(f"runs/{inside(run)}/recipe.yaml")
    if not content:
        raise BadInput(f"there is no run {run} in {registry.url}; switchback runs shows what there is")
    return content.decode()


def unfinished(
    registry: Registry, recipe_name: str, is_recipe: Callable[[str], bool], selection: dict[str, Any]
) -> str | None:
    """The newest run of a recipe's name, if it had the same recipe (`is_recipe` of its text) and selection, did not end
    and is not running. A run without a first event does not count: another process is starting it, or was killed
    while it did."""
    of_recipe = re.compile(rf"{re.escape(recipe_name)}-\d{{8}}-\d{{6}}-[0-9a-f]{{4}}")
    newest_first = sorted(filter(of_recipe.fullmatch, registry.store.names("runs")), reverse=True)
    with passed_over():
        newest = next((run for run in newest_first if registry.store.last(f"runs/{run}/events")), None)
        if newest is None or state(registry, newest) in ("done", "running"):
            return None
        if is_recipe(recipe_of(registry, newest)) and planned(registry, newest).get("selection") == selection:
            return newest
    return None


def state(registry: Registry, run: str) -> str:
    """The state of a run; see Run.state. Raises BadInput when there is no such run."""
    return _state(events(registry, run))


def _run(registry: Registry, run: str) -> Run:
    log = events(registry, run)
    recipe = planned(registry, run)["recipe"]
    return Run(run=run, recipe=recipe, state=_state(log), started=log[0]["at"], resumes=log[0].get("resumes"))


def _state(log: list[dict[str, Any]]) -> str:
    last, first = log[-1]["event"], log[0]
    if last in ENDED:
        return last
    if first["host"] == socket.gethostname():
        return "running" if started_at(first["pid"]) == first["process"] else "interrupted"
    silent = datetime.now(UTC) - datetime.fromisoformat(log[-1]["at"])
    return "interrupted" if silent > timedelta(seconds=SILENT * BEAT) else "running"
