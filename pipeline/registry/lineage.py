"""Where an artifact comes from: itself, then its inputs, down to the base model and the data.

What was cleaned is still explained, from its tombstone; what is no longer the one that was read is said. An artifact
that several read is followed where it is met first, and an artifact that claims to be its own ancestor is not followed
again.
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
"""Artifacts, one made from another, that are followed."""


class Ancestor(Frozen):
    """One node of the tree."""

    role: str
    """What it is to the artifact above it; "" at the top."""
    id: str | None
    """None for what is no artifact: a base model, a file of rows, a problem."""
    name: str
    """The stage, or where it is from."""
    kind: str
    """The artifact's; base, data or problem for what is none; gone for an artifact of which nothing is left."""
    key: str
    """The artifact's; for a base model or a file of rows the digest of its files, or of the hub's name and revision."""
    whole: bool
    """False for an artifact that is gone, cleaned or void, or that is no longer the one that was read."""
    note: str = ""
    """Why it is not whole; or that its inputs are shown above."""
    inputs: tuple[Ancestor, ...] = ()


def lineage(registry: Registry, artifact: Artifact) -> Ancestor:
    """The tree of an artifact."""
    return _node(registry, artifact, "", _standing(registry, artifact), {artifact.id}, 0)


def mermaid(top: Ancestor) -> str:
    """The tree as a graph for mermaid: from the base down; a broken line from what is not whole."""
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
    """Characters that mean something to mermaid or HTML, as mermaid's own entities."""
    return "".join(f"#{ord(letter)};" if letter in '"#&<>|`[]{};\\' else letter for letter in text)


def _node(registry: Registry, artifact: Artifact, role: str, note: str, seen: set[str], depth: int) -> Ancestor:
    """An artifact with its inputs; `seen` holds the ids that are followed somewhere already."""
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
    found, note = _found(registry, source, source.id)
    if found is None:
        return Ancestor(role=role, id=source.id, name=source.name, kind="gone", key=source.key, whole=False, note=note)
    if source.id not in seen and depth < DEEPEST:
        seen.add(source.id)
        return _node(registry, found, role, note, seen, depth)
    above = "its inputs are shown above" if depth < DEEPEST else "its inputs are not followed"
    return Ancestor(
        role=role, id=found.id, name=found.stage, kind=found.kind, key=found.key, whole=not note, note=note or above
    )


def _found(registry: Registry, source: Source, id: str) -> tuple[Artifact | None, str]:
    """(what is known of an input, what is wrong with it)."""
    try:
        found = registry.get(id)
    except BadInput:
        return None, "its manifest is not one"
    if found and found.key == source.key:
        return found, _standing(registry, found) if was_read(
            source, found
        ) else "has other files than those that were read"
    if found is None and (cleaned := tombstone(registry, id)):
        return cleaned.artifact, f"cleaned {cleaned.at:%Y-%m-%d}: {cleaned.why}"
    return None, "is another artifact than the one that was read" if found else "is gone"


def _standing(registry: Registry, artifact: Artifact) -> str:
    """Why an artifact is not to be used; "" where it may be."""
    about = registry.entries_about(artifact)
    return f"void: {about[-1].get('reason')}" if about and about[-1].get("void") else ""


def _problem(artifact: Artifact) -> Iterator[Ancestor]:
    """The problem whose rows a step used: its data by their digest, or a built-in one by name and version."""
    problem, rows = artifact.identity.get("problem"), artifact.identity.get("rows")
    if isinstance(problem, dict):
        facts = [
            f"{name} {value}" for name, value in problem.items() if isinstance(value, (str, int)) and name != "name"
        ]
        what = " ".join([*([str(problem["name"])] if "name" in problem else []), *facts])
        of = f"{rows.get('split')}[{rows.get('start')}:{rows.get('stop')}] of " if isinstance(rows, dict) else ""
        yield Ancestor(role="rows", id=None, name=f"{of}{what}", kind="problem", key=key_of(problem), whole=True)
