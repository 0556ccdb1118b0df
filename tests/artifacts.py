"""Artifacts of a few bytes, made as a run makes them, and what must hold of any registry at any moment."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.registry import Artifact, Registry, Source
from pipeline.registry.aliases import aliases
from pipeline.registry.cleanup.gc import DOUBTED
from pipeline.registry.keys import key_of
from pipeline.registry.lineage import Ancestor, lineage
from pipeline.registry.verify import verify

BASE = Source(id=None, output="policy", key="base-key", name="/models/tiny")


def finished(directory: Path, content: str = "{}") -> Path:
    (directory / "data").mkdir(parents=True)
    (directory / "config.json").write_text(content)
    (directory / "data" / "rows.jsonl").write_text("{}\n")
    return directory


def draft(name: str, kind: str = "sft", parent: Artifact | None = None) -> Artifact:
    """What a stage would publish; its key is that of its name and its parent's key."""
    source = of(parent) if parent else BASE
    identity = {"kind": kind, "name": name, "policy": source.key}
    return Artifact(
        id="",
        key=key_of(identity),
        kind=kind,
        stage=f"s{name}",
        created="",
        outputs={"policy": "."},
        files=(),
        inputs={"policy": source},
        format=None,
        config={},
        identity=identity,
        metrics={},
        provenance={},
    )


def of(artifact: Artifact) -> Source:
    return Source(id=artifact.id, output="policy", key=artifact.key, name=artifact.stage, digest=artifact.digest)


def make(registry: Registry, out: Path, planned: Artifact, owner: str) -> Artifact:
    """As a step does: what is there is held, what a killed maker left is recovered, else it is made in `out` and
    published."""
    found = registry.find(planned.key)
    if found and registry.hold(found, owner):
        return found
    if found := registry.recover(planned.key, planned.stage, owner):
        return found
    shutil.rmtree(out, ignore_errors=True)
    return registry.publish(finished(out, planned.key), planned, owner).artifact


def wrong(registry: Registry) -> list[str]:
    """What must never be: an alias whose artifact is gone or damaged, or was made from one that is; a log with a gap;
    half an artifact in the list."""
    said = [line for alias in aliases(registry) if (line := wrong_alias(registry, alias))]
    said += [line for artifact in registry.artifacts() for line in verify(registry, artifact)]
    store = registry.store
    logs = [f"{top}/{name}" for top in ("keys", "refs") for name in store.names(top)]
    logs += [f"runs/{run}/events" for run in store.names("runs")]
    return said + [f"{log} has a gap" for log in logs if store.names(log) != dense(len(store.names(log)))]


def wrong_alias(registry: Registry, alias: str, meanwhile: bool = False) -> str | None:
    """Why an alias is broken; None when it is not, or has moved meanwhile. `meanwhile`: a clean-up is under way, which
    may doubt what an alias's artifact was made from before it sees the alias."""
    move = aliases(registry).get(alias)
    if move is None or not move.artifact:
        return None
    artifact = registry.get(move.artifact)
    said = "is gone" if artifact is None else "; ".join(verify(registry, artifact))
    if artifact and not said and not _whole(lineage(registry, artifact), meanwhile):
        said = "was made from what is gone"
    return f"{alias} -> {move.artifact} {said}" if said and aliases(registry).get(alias) == move else None


def dense(count: int) -> list[str]:
    return [f"{n:06d}.json" for n in range(1, count + 1)]


def _whole(ancestor: Ancestor, meanwhile: bool) -> bool:
    doubted = meanwhile and ancestor.note == f"void: {DOUBTED}"
    return (ancestor.whole or doubted) and all(_whole(inner, meanwhile) for inner in ancestor.inputs)
