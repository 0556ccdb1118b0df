"""The lineage of an artifact: a tree of its inputs, down to the base model and the data.

A tombstone still explains an artifact that was removed. A note marks an input that changed since it was read. An
artifact that is an input twice is followed once, so a cycle in the manifests ends too.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.registry.artifact import Artifact, Source
from pipeline.registry.keys import abbreviated, key_of
from pipeline.registry.registry import Registry
from pipeline.registry.tombstones import tombstone
from pipeline.registry.verify import was_read
from stages.config import Frozen
from stages.errors import BadInput

DEEPEST = 200
"""Longest chain of inputs that is followed."""
ENTITIES = {ord(letter): f"#{ord(letter)};" for letter in '"#&<>|`[]{};\\'}
"""Special characters of mermaid and HTML -> mermaid's entities."""


class Ancestor(Frozen):
    """One node of the tree."""

    role: str
    """Its role as an input of the artifact above it; "" at the top."""
    id: str | None
    """None for a base model, a file of rows or a problem."""
    name: str
    """The stage, or the place of a base model or a file."""
    kind: str
    """The artifact's kind; base, data or problem for another input; gone for a missing artifact without a tombstone."""
    key: str
    """The artifact's key; for a base model or a file of rows, the digest of its files or of its hub revision."""
    whole: bool
    """False for an artifact that is gone, removed or void, or that has changed since it was read."""
    note: str = ""
    """Why `whole` is false, or that its inputs are shown above."""
    inputs: tuple[Ancestor, ...] = ()


def lineage(registry: Registry, artifact: Artifact) -> Ancestor:
    """The tree of an artifact."""
    return _node(registry, artifact, "", _standing(registry, artifact), {artifact.id}, 0)


def mermaid(top: Ancestor) -> str:
    """The tree as a mermaid graph, from the base down; a broken line leads from an input whose `whole` is false."""
    names: dict[str, str] = {}
    lines: list[str] = []
    _draw(top, names, lines)
    nodes = [f'    {name}["{label}"]' for label, name in names.items()]
    return "\n".join(["graph TD", *nodes, *dict.fromkeys(lines)])


def _draw(node: Ancestor, names: dict[str, str], lines: list[str]) -> str:
    label = _escaped(f"{node.id or abbreviated(node.name)} ({node.kind}, {node.key[:12]})")
    name = names.setdefault(label, f"n{len(names)}")
    for inner in node.inputs:
        arrow = "-->" if inner.whole else "-.->"
        lines.append(f"    {_draw(inner, names, lines)} {arrow}|{_escaped(inner.role)}| {name}")
    return name


def _escaped(text: str) -> str:
    """The text with the special characters of mermaid and HTML as mermaid's entities."""
    return text.translate(ENTITIES)


def _node(registry: Registry, artifact: Artifact, role: str, note: str, seen: set[str], depth: int) -> Ancestor:
    """An artifact with its inputs; `seen` holds the ids that are already followed."""
    inputs = [_input(registry, source, role, seen, depth + 1) for role, source in artifact.inputs.items()]
    return Ancestor(
        role=role,
        id=artifact.id,
        name=artifact.stage,
        kind=artifact.kind,
        key=artifact.key,
        whole=not note,
        note=note,
        inputs=(*inputs, *_problem(artifact)),
    )


def _input(registry: Registry, source: Source, role: str, seen: set[str], depth: int) -> Ancestor:
    if source.id is None:
        kind = "data" if source.output == "rows" else "base"
        return Ancestor(role=role, id=None, name=source.name, kind=kind, key=source.key, whole=True)
    artifact, note = _artifact_of(registry, source, source.id)
    if artifact is None:
        return Ancestor(role=role, id=source.id, name=source.name, kind="gone", key=source.key, whole=False, note=note)
    if source.id not in seen and depth < DEEPEST:
        seen.add(source.id)
        return _node(registry, artifact, role, note, seen, depth)
    not_followed = "its inputs are shown above" if depth < DEEPEST else "its inputs are not followed"
    return Ancestor(
        role=role,
        id=artifact.id,
        name=artifact.stage,
        kind=artifact.kind,
        key=artifact.key,
        whole=not note,
        note=note or not_followed,
    )


def _artifact_of(registry: Registry, source: Source, artifact_id: str) -> tuple[Artifact | None, str]:
    """(the artifact or the tombstone of an input, the problem with it or "")."""
    try:
        artifact = registry.get(artifact_id)
    except BadInput:
        return None, "its manifest is not one"
    if artifact is None:
        cleaned = tombstone(registry, artifact_id)
        if cleaned is None:
            return None, "is gone"
        return cleaned.artifact, f"cleaned {cleaned.at:%Y-%m-%d}: {cleaned.why}"
    if artifact.key != source.key:
        return None, "is another artifact than the one that was read"
    if not was_read(source, artifact):
        return artifact, "has other files than those that were read"
    return artifact, _standing(registry, artifact)


def _standing(registry: Registry, artifact: Artifact) -> str:
    """The reason why an artifact is void; "" for a usable one."""
    entries = registry.entries_about(artifact)
    if not entries or not entries[-1].get("void"):
        return ""
    return f"void: {entries[-1].get('reason')}"


def _problem(artifact: Artifact) -> Iterator[Ancestor]:
    """The problem whose rows a step used: a built-in one by name and version, a custom one by its digest."""
    problem, rows = artifact.identity.get("problem"), artifact.identity.get("rows")
    if not isinstance(problem, dict):
        return
    words = [str(problem["name"])] if "name" in problem else []
    words += [f"{name} {value}" for name, value in problem.items() if isinstance(value, (str, int)) and name != "name"]
    described = " ".join(words)
    if isinstance(rows, dict):
        described = f"{rows.get('split')}[{rows.get('start')}:{rows.get('stop')}] of {described}"
    yield Ancestor(role="rows", id=None, name=described, kind="problem", key=key_of(problem), whole=True)
