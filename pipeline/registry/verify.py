"""Whether artifacts are still what was published, and who is hit where one is not.

Every file there, of its size and digest, no other, no link, tensors as their headers say; the manifest the one that its
key's log vouches for; the key that of what was hashed; each input the one that was read. Files are hashed side by side:
hashing frees the interpreter, so threads use all cores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pipeline.errors import Damaged, Unreadable
from pipeline.registry import safetensors_header
from pipeline.registry.aliases import aliases
from pipeline.registry.artifact import Artifact, File, Source
from pipeline.registry.files import TENSORS
from pipeline.registry.keys import key_of
from pipeline.registry.registry import Registry
from stages.config import Frozen
from stages.errors import BadInput, printable
from stages.job import MANIFEST

REASON = "failed verification"


class Reach(Frozen):
    """What a damaged artifact reaches."""

    artifacts: tuple[str, ...] = ()
    """Everything made from it, and from that."""
    aliases: tuple[str, ...] = ()
    """Those that point at it, or at any of these."""


class Verified(NamedTuple):
    """What was found about one artifact."""

    id: str
    problems: list[str]
    """A line a file; empty when it is whole."""
    reaches: Reach


def verify(registry: Registry, artifact: Artifact) -> list[str]:
    """What is wrong with one artifact, a line a file; empty when nothing is."""
    return verify_all(registry, [artifact])[artifact.id]


def as_read(registry: Registry, artifact: Artifact) -> list[str]:
    """What is wrong with an artifact as a stage on this machine would read it; what comes from elsewhere is fetched for
    that, and judged on the way."""
    try:
        registry.path(artifact)
    except Damaged as error:
        return [str(error)]
    return [] if registry.store.verifies else verify(registry, artifact)


def verify_all(registry: Registry, artifacts: Sequence[Artifact]) -> dict[str, list[str]]:
    """Id -> what is wrong, a line a file. Where the manifest itself was changed, nothing can be said about the
    files."""
    lying = {artifact.id for artifact in artifacts if _manifest_changed(registry, artifact)}
    honest = [artifact for artifact in artifacts if artifact.id not in lying]
    there = {artifact.id: registry.store.files(f"artifacts/{artifact.id}") for artifact in honest}
    jobs = [(artifact.id, file) for artifact in honest for file in artifact.files]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda job: _wrong(registry, job[0], job[1], there[job[0]].get(job[1].path)), jobs)
        wrong = {id: [f"{id}/{MANIFEST}: its bytes are not those that were published"] for id in lying}
        wrong |= {artifact.id: [] for artifact in honest}
        for (id, file), said in zip(jobs, found, strict=True):
            wrong[id] += [f"{id}/{file.path}: {said}"] if said else []
    for artifact in honest:
        wrong[artifact.id] += [f"{artifact.id}/{MANIFEST}: {said}" for said in _of_manifest(registry, artifact)]
        wrong[artifact.id] += _strays(artifact, there[artifact.id])
    return wrong


def verify_ids(registry: Registry, ids: Sequence[str] | None = None) -> list[Verified]:
    """Verify artifacts by id, or everything that is there; whoever is damaged is void afterwards. Raises BadInput for
    an id that is not there."""
    if ids is None:
        whole, wrong = _opened(registry.store.names("artifacts"), registry.read)
    else:
        whole, wrong = _opened(ids, registry.get)
    wrong |= verify_all(registry, whole)
    for missing in (id for id in ids or () if id not in wrong):
        registry.open(missing)
    for id in (bad := [id for id, lines in wrong.items() if lines]):
        condemn(registry, id)
    reached = reach(registry, bad) if bad else {}
    return [Verified(id, wrong[id], reached.get(id, Reach())) for id in sorted(wrong)]


def condemn(registry: Registry, id: str) -> None:
    """Let whatever key an artifact is recorded for be made again. The artifact itself is not asked which one that is,
    since its manifest may lie."""
    for key in registry.store.names("keys"):
        if registry.current(key) == id:
            registry.store.append(f"keys/{key}", {"void": id, "reason": REASON})


def reach(registry: Registry, ids: Sequence[str]) -> dict[str, Reach]:
    """Id -> what was made from it, and which aliases point there. One pass over the manifests."""
    children: dict[str, set[str]] = {}
    for artifact in registry.artifacts():
        for source in artifact.inputs.values():
            children.setdefault(source.id or "", set()).add(artifact.id)
    pointing = {alias: move.artifact for alias, move in aliases(registry).items()}
    found: dict[str, Reach] = {}
    for id in ids:
        below = _below(id, children)
        named = sorted(alias for alias, target in pointing.items() if target in {id, *below})
        found[id] = Reach(artifacts=tuple(sorted(below)), aliases=tuple(named))
    return found


def _below(id: str, children: dict[str, set[str]]) -> set[str]:
    below: set[str] = set()
    waiting = [id]
    while waiting:
        new = children.get(waiting.pop(), set()) - below
        below |= new
        waiting += new
    return below - {id}


def _opened(
    names: Sequence[str], read: Callable[[str], Artifact | None]
) -> tuple[list[Artifact], dict[str, list[str]]]:
    """(those with a manifest, what is wrong with those whose manifest is not one); what has no manifest is no
    artifact."""
    whole: list[Artifact] = []
    broken: dict[str, list[str]] = {}
    for name in names:
        try:
            found = read(name)
        except Unreadable:
            raise
        except BadInput as error:
            broken[name] = [str(error)]
        else:
            whole += [found] if found else []
    return whole, broken


def _wrong(registry: Registry, id: str, file: File, size: int | None) -> str | None:
    """What is wrong with one file; `size` is what it has now."""
    if size != file.size:
        return "is gone" if size is None else _is_other(size, file)
    try:
        return _inside(registry, f"artifacts/{id}/{file.path}", file)
    except Damaged:
        return "is gone"  # since its size was read
    except FileNotFoundError:
        return "is gone"
    except OSError as error:
        raise Unreadable(
            f"{registry.url}: {id}/{file.path} cannot be read ({error.strerror}); nothing was judged, so mend that and "
            "try again"
        ) from None


def _is_other(size: int, file: File) -> str:
    return "is a link, or no plain file" if size < 0 else f"has {size} bytes, {file.size} were published"


def _inside(registry: Registry, name: str, file: File) -> str | None:
    """What is wrong with the bytes of one file."""
    if registry.store.digest(name) != file.sha256:
        return "its bytes are not those that were published"
    is_tensors = file.path.endswith(TENSORS)
    return (
        safetensors_header.problem(lambda length: registry.store.start(name, length), file.size) if is_tensors else None
    )


def _strays(artifact: Artifact, there: Mapping[str, int]) -> Iterator[str]:
    """What lies beside the published files."""
    for path in sorted(there.keys() - {MANIFEST, *(file.path for file in artifact.files)}):
        wrong = "is a link, or no plain file" if there[path] < 0 else "was not published"
        yield f"{artifact.id}/{printable(path)}: {wrong}"


def _of_manifest(registry: Registry, artifact: Artifact) -> Iterator[str]:
    """What is wrong with what an artifact says of itself."""
    try:
        json.loads(registry.store.read(_manifest(artifact)) or b"", object_pairs_hook=safetensors_header.once)
        if key_of(artifact.identity) != artifact.key:
            yield "its key is not that of its identity"
    except ValueError as error:
        yield f"it does not say one thing alone: {printable(str(error))}"
    for role, source in artifact.inputs.items():
        found = _get(registry, source.id) if source.id else None
        if found and not _manifest_changed(registry, found) and not was_read(source, found):
            yield f"its input {role} is not what was read: {found.id} has other files now"


def was_read(source: Source, found: Artifact) -> bool:
    """Whether an artifact is the one that an input was, byte by byte."""
    return found.key == source.key and source.digest in (None, found.digest)


def _manifest_changed(registry: Registry, artifact: Artifact) -> bool:
    """Whether a manifest is not the one that its key's log has the digest of. Where no digest was recorded, nothing can
    be said."""
    recorded = [entry["manifest"] for entry in registry.entries_about(artifact) if "manifest" in entry]
    return bool(recorded) and recorded[-1] != registry.store.digest(_manifest(artifact))


def _manifest(artifact: Artifact) -> str:
    return f"artifacts/{artifact.id}/{MANIFEST}"


def _get(registry: Registry, id: str) -> Artifact | None:
    """An input, where it can be read; one that cannot has problems of its own."""
    try:
        return registry.get(id)
    except BadInput:
        return None
