"""Verification: whether artifacts still hold the published bytes, and what a damaged one affects.

An intact artifact has all its files with their sizes and digests, no other file and no link. Tensors match their
headers. The manifest has the digest that its key's log records, and its key is that of its identity. Every input still
has the bytes that were read. Files are hashed in threads, which use all cores because hashing releases the interpreter.
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
OTHER_BYTES = "its bytes are not those that were published"
NO_PLAIN_FILE = "is a link, or no plain file"


class Reach(Frozen):
    """The artifacts and aliases that a damaged artifact affects."""

    artifacts: tuple[str, ...] = ()
    """Its descendants."""
    aliases: tuple[str, ...] = ()
    """Aliases that point at it, or at a descendant."""


class Verified(NamedTuple):
    """The result for one artifact."""

    id: str
    problems: list[str]
    """A line per file; empty for an intact artifact."""
    reaches: Reach


def verify(registry: Registry, artifact: Artifact) -> list[str]:
    """The problems of one artifact, a line per file; empty when it is intact."""
    return verify_all(registry, [artifact])[artifact.id]


def as_read(registry: Registry, artifact: Artifact) -> list[str]:
    """The problems of an artifact as a stage on this machine would read it. An object store downloads and verifies it
    first."""
    try:
        registry.path(artifact)
    except Damaged as error:
        return [str(error)]
    return [] if registry.store.verifies else verify(registry, artifact)


def verify_all(registry: Registry, artifacts: Sequence[Artifact]) -> dict[str, list[str]]:
    """Id -> problems, a line per file. Files are not checked where the manifest itself was changed."""
    changed = {artifact.id for artifact in artifacts if _manifest_changed(registry, artifact)}
    intact = [artifact for artifact in artifacts if artifact.id not in changed]
    sizes = {artifact.id: registry.store.files(f"artifacts/{artifact.id}") for artifact in intact}
    problems = {artifact_id: [f"{artifact_id}/{MANIFEST}: {OTHER_BYTES}"] for artifact_id in changed}
    problems |= {artifact.id: [] for artifact in intact}
    for artifact_id, line in _file_problems(registry, intact, sizes):
        problems[artifact_id].append(line)
    for artifact in intact:
        manifest_problems = _manifest_problems(registry, artifact)
        problems[artifact.id] += [f"{artifact.id}/{MANIFEST}: {problem}" for problem in manifest_problems]
        problems[artifact.id] += _strays(artifact, sizes[artifact.id])
    return problems


def _file_problems(
    registry: Registry, artifacts: Sequence[Artifact], sizes: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[str, str]]:
    """(id, line) for each damaged file; all files are hashed in parallel. `sizes`: id -> path -> bytes now."""

    def check(job: tuple[str, File]) -> str | None:
        artifact_id, file = job
        return _file_problem(registry, artifact_id, file, sizes[artifact_id].get(file.path))

    jobs = [(artifact.id, file) for artifact in artifacts for file in artifact.files]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for (artifact_id, file), problem in zip(jobs, pool.map(check, jobs), strict=True):
            if problem is not None:
                yield artifact_id, f"{artifact_id}/{file.path}: {problem}"


def verify_ids(registry: Registry, ids: Sequence[str] | None = None) -> list[Verified]:
    """Verify artifacts by id, or all of them, and void the damaged ones. Raises BadInput for an unknown id."""
    if ids is None:
        artifacts, problems = _opened(registry.store.names("artifacts"), registry.read)
    else:
        artifacts, problems = _opened(ids, registry.get)
    problems |= verify_all(registry, artifacts)
    for artifact_id in ids or ():
        if artifact_id not in problems:
            registry.open(artifact_id)
    damaged = [artifact_id for artifact_id, lines in problems.items() if lines]
    for artifact_id in damaged:
        condemn(registry, artifact_id)
    reached = reach(registry, damaged) if damaged else {}
    return [Verified(name, problems[name], reached.get(name, Reach())) for name in sorted(problems)]


def condemn(registry: Registry, artifact_id: str) -> None:
    """Void an artifact in the log that records it, so that its step can be made again. All logs are searched, since the
    key in a damaged manifest may be wrong."""
    for key in registry.store.names("keys"):
        if registry.current(key) == artifact_id:
            registry.store.append(f"keys/{key}", {"void": artifact_id, "reason": REASON})


def reach(registry: Registry, ids: Sequence[str]) -> dict[str, Reach]:
    """Id -> its descendants, and the aliases that point at it or at them. One pass over the manifests."""
    children: dict[str, set[str]] = {}
    for artifact in registry.artifacts():
        for source in artifact.inputs.values():
            children.setdefault(source.id or "", set()).add(artifact.id)
    targets = {alias: move.artifact for alias, move in aliases(registry).items()}
    reached: dict[str, Reach] = {}
    for artifact_id in ids:
        descendants = _descendants(artifact_id, children)
        pointing = sorted(alias for alias, target in targets.items() if target in {artifact_id, *descendants})
        reached[artifact_id] = Reach(artifacts=tuple(sorted(descendants)), aliases=tuple(pointing))
    return reached


def _descendants(artifact_id: str, children: dict[str, set[str]]) -> set[str]:
    descendants: set[str] = set()
    waiting = [artifact_id]
    while waiting:
        new = children.get(waiting.pop(), set()) - descendants
        descendants |= new
        waiting += new
    return descendants - {artifact_id}


def _opened(
    names: Sequence[str], read: Callable[[str], Artifact | None]
) -> tuple[list[Artifact], dict[str, list[str]]]:
    """(artifacts with a valid manifest, problems of those with an invalid one); a directory without a manifest is
    neither."""
    artifacts: list[Artifact] = []
    broken: dict[str, list[str]] = {}
    for name in names:
        try:
            artifact = read(name)
        except Unreadable:
            raise
        except BadInput as error:
            broken[name] = [str(error)]
        else:
            if artifact is not None:
                artifacts.append(artifact)
    return artifacts, broken


def _file_problem(registry: Registry, artifact_id: str, file: File, size: int | None) -> str | None:
    """The problem with one file of `size` bytes now; None for an intact one."""
    if size is None:
        return "is gone"
    if size < 0:
        return NO_PLAIN_FILE
    if size != file.size:
        return f"has {size} bytes, {file.size} were published"
    try:
        return _content_problem(registry, f"artifacts/{artifact_id}/{file.path}", file)
    except Damaged:
        return "is gone"  # since its size was read
    except FileNotFoundError:
        return "is gone"
    except OSError as error:
        raise Unreadable(
            f"{registry.url}: {artifact_id}/{file.path} cannot be read ({error.strerror}), so nothing was verified. "
            "Fix: make it readable and try again."
        ) from None


def _content_problem(registry: Registry, name: str, file: File) -> str | None:
    """The problem with the bytes of one file; None for an intact one."""
    if registry.store.digest(name) != file.sha256:
        return OTHER_BYTES
    if not file.path.endswith(TENSORS):
        return None
    return safetensors_header.problem(lambda length: registry.store.start(name, length), file.size)


def _strays(artifact: Artifact, sizes: Mapping[str, int]) -> Iterator[str]:
    """A line for each file that was not published."""
    for path in sorted(sizes.keys() - {MANIFEST, *(file.path for file in artifact.files)}):
        problem = NO_PLAIN_FILE if sizes[path] < 0 else "was not published"
        yield f"{artifact.id}/{printable(path)}: {problem}"


def _manifest_problems(registry: Registry, artifact: Artifact) -> Iterator[str]:
    """The contradictions in a manifest: duplicate names, a wrong key, inputs that have changed since."""
    try:
        json.loads(registry.store.read(_manifest(artifact)) or b"", object_pairs_hook=safetensors_header.once)
        if key_of(artifact.identity) != artifact.key:
            yield "its key is not that of its identity"
    except ValueError as error:
        yield f"it does not say one thing alone: {printable(str(error))}"
    for role, source in artifact.inputs.items():
        read = _get(registry, source.id) if source.id else None
        if read and not _manifest_changed(registry, read) and not was_read(source, read):
            yield f"its input {role} is not what was read: {read.id} has other files now"


def was_read(source: Source, artifact: Artifact) -> bool:
    """Whether an artifact still has the bytes that were read as this input."""
    return artifact.key == source.key and source.digest in (None, artifact.digest)


def _manifest_changed(registry: Registry, artifact: Artifact) -> bool:
    """Whether a manifest's digest differs from the one in its key's log; False where none was recorded."""
    recorded = [entry["manifest"] for entry in registry.entries_about(artifact) if "manifest" in entry]
    return bool(recorded) and recorded[-1] != registry.store.digest(_manifest(artifact))


def _manifest(artifact: Artifact) -> str:
    return f"artifacts/{artifact.id}/{MANIFEST}"


def _get(registry: Registry, artifact_id: str) -> Artifact | None:
    """An input, or None where it cannot be read: it is verified on its own."""
    try:
        return registry.get(artifact_id)
    except BadInput:
        return None
