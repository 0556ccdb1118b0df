"""Many processes publish the same keys and move the same aliases, while clean-ups without any grace loop beside them.

`storm(place)` takes any registry's place: a directory, or the URL of an object store whose credentials are in the
environment."""

from __future__ import annotations

import multiprocessing
import random
import tempfile
from datetime import timedelta
from multiprocessing.synchronize import Event
from pathlib import Path

from pipeline.registry import Registry, runs
from pipeline.registry.aliases import aliases, set_to
from pipeline.registry.cleanup.gc import clean
from stages.errors import BadInput
from tests.artifacts import draft, make, wrong, wrong_alias

ALIASES = ("prod", "canary", "best")
NO_WORK = Path("/nonexistent")


def storm(place: str, processes: int = 8, publishes: int = 100, keys: int = 40, cleaners: int = 2) -> dict[str, int]:
    """Run it; returns how much happened. Raises AssertionError for an alias that lost its artifact at any time, and
    for a log with a gap."""
    context = multiprocessing.get_context("spawn")
    over, said = context.Event(), context.SimpleQueue()
    Registry(place).initialise()
    cleaning = [context.Process(target=_clean, args=(place, over, said)) for _ in range(cleaners)]
    makers = [context.Process(target=_publish, args=(place, seed, publishes, keys)) for seed in range(processes)]
    for process in (*cleaning, *makers):
        process.start()
    for process in makers:
        process.join()
    over.set()
    told = [said.get() for _ in cleaning]
    for process in cleaning:
        process.join()
    assert [process.exitcode for process in (*cleaning, *makers)] == [0] * (processes + cleaners)
    registry = Registry(place)
    assert [lost for lost, _ in told if lost] == [] and wrong(registry) == []
    moves = sum(registry.store.last(f"refs/{alias}") for alias in aliases(registry))
    return {"moves": moves, "cleaned": sum(cleaned for _, cleaned in told), "aliases": len(aliases(registry))}


def _publish(place: str, seed: int, publishes: int, keys: int) -> None:
    """One maker: a run of its own, which holds what it uses for as long as it does."""
    registry, draw = Registry(place), random.Random(seed)
    run = runs.start(registry, "storm", "", {"steps": []})
    with tempfile.TemporaryDirectory(dir=_beside(place)) as work:
        for i in range(publishes):
            name = draw.randrange(keys)
            parent = make(registry, Path(work, f"parent-{i}"), draft(str(name % 5)), run)
            made = make(registry, Path(work, f"out-{i}"), draft(str(name), parent=parent), run)
            if draw.random() < 0.2:
                _point(registry, draw.choice(ALIASES), made.id)
            for artifact in (made, parent):
                registry.release(artifact.id, run)
            if draw.random() < 0.1:  # what nobody holds any more: it may be gone, or about to go
                _point(registry, draw.choice(ALIASES), made.id)
    runs.record(registry, run, "done")


def _point(registry: Registry, alias: str, id: str) -> None:
    """Move an alias, where the artifact is still there."""
    if artifact := registry.get(id):
        try:
            set_to(registry, alias, artifact)
        except BadInput as error:
            assert "void or gone" in str(error)


def _clean(place: str, over: Event, said: multiprocessing.SimpleQueue) -> None:  # type: ignore[type-arg]
    """Clean up until it is over; tell what aliases lost, and how many artifacts went."""
    registry, lost, cleaned = Registry(place), [], 0
    while not over.is_set():
        found = clean(registry, NO_WORK, timedelta(0))
        cleaned += sum(removal.what == "artifact" for removal in found.removals)
        lost += [line for alias in ALIASES if (line := wrong_alias(registry, alias, meanwhile=True))]
    said.put((lost, cleaned))


def _beside(place: str) -> str | None:
    """Work lies on the registry's own file system where it has one, so that publishing is a rename."""
    return None if "://" in place else str(Path(place).parent)
