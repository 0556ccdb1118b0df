"""Export: an artifact becomes a plain directory that needs no switchback.

    policy: the model for `from_pretrained`, adapter/, README.md     data, control: its directory, README.md

The manifest stays in the registry, since it names hosts and runs, and so do metrics, loss maps and rollouts. The card
holds the facts that a reader needs. A policy keeps its serving template, which ends in the prefix, and its training
template. So a stage that starts from the export with another prefix is refused.

Every byte is hashed while it is copied into a hidden directory. The directory gets its name last: DIR is complete, or
missing.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pipeline.errors import Failed
from pipeline.export import card
from pipeline.registry import Artifact, File, Registry
from pipeline.registry.aliases import resolve
from stages.errors import BadInput
from stages.job import MANIFEST
from stages.rejection import CONTROL
from stages.runtime.disk import sync, sync_tree
from stages.runtime.metrics import FILE as METRICS
from stages.tokens.loss_map import FILE as LOSS_MAP

CARD = "README.md"
OURS = (MANIFEST, METRICS, LOSS_MAP, CARD)
"""Files in a policy's directory that are not part of the model."""
EXPORTED = ("policy", "data", CONTROL)
"""Outputs that can be exported. An artifact has one of the first two; the control is exported only by its name."""
BESIDE = ("adapter",)
"""Outputs that are exported with a policy; its other outputs are not."""
BLOCK = 2**20


class Exported(NamedTuple):
    """A finished export."""

    directory: Path
    files: tuple[Path, ...]
    """Relative to the directory; the card is one of them."""
    size: int
    """Bytes of all files."""


def named(registry: Registry, name: str) -> tuple[Artifact, str]:
    """The artifact and the output that `ID` or `ID:output` names; ID may be an alias. Raises BadInput where there is
    none."""
    id_or_alias, colon, output = name.partition(":")
    artifact = resolve(registry, id_or_alias)
    return artifact, output_of(artifact, output if colon else None)


def export(registry: Registry, artifact: Artifact, directory: Path, output: str | None = None) -> Exported:
    """Write an output of an artifact, or its policy or data, to a new or empty directory. A failed export leaves
    nothing behind. A killed one leaves a hidden `.<name>.<hex>.partial` next to the directory.

    Raises BadInput when the directory cannot be used, when the artifact is void, and when it has no such output. Raises
    Failed when a file does not have the published bytes.
    """
    output = output_of(artifact, output)
    if not registry.usable(artifact):
        raise BadInput(f"{artifact.id} is void: the registry no longer vouches for it; run its recipe to make it again")
    with _writing(registry, directory) as partial:
        (partial / CARD).write_text(card.card(registry, artifact, output), encoding="utf-8")
        source = registry.path(artifact)
        for inner, file in sorted(files_of(artifact, output).items()):
            _copy(artifact, source / file.path, partial / inner, file)
    return _listed(directory.resolve())


def output_of(artifact: Artifact, requested: str | None = None) -> str:
    """The output to export: the requested one, else policy, or data. Raises BadInput for an artifact without it."""
    available = [output for output in EXPORTED if output in artifact.outputs]
    if not available:
        raise BadInput(
            f"{artifact.id} is of kind {artifact.kind} and holds neither a policy nor data; switchback ls shows what "
            "there is"
        )
    if requested is None:
        return available[0]
    if requested not in available:
        choices = " or ".join(f"{artifact.id}:{output}" for output in available)
        raise BadInput(f"{artifact.id}:{requested} cannot be exported; expected {choices}")
    return requested


def called(artifact: Artifact, output: str) -> str:
    """The artifact's id, followed by the output unless that is the artifact's first one."""
    return artifact.id if output == output_of(artifact) else f"{artifact.id}:{output}"


def files_of(artifact: Artifact, output: str) -> dict[str, File]:
    """Path in the exported directory -> the artifact's file."""
    root = PurePosixPath(artifact.outputs[output])
    others = [PurePosixPath(path) for name, path in artifact.outputs.items() if name not in (output, *BESIDE)]
    files: dict[str, File] = {}
    for file in artifact.files:
        path = PurePosixPath(file.path)
        if not path.is_relative_to(root) or any(path.is_relative_to(other) for other in others):
            continue
        inner = str(path.relative_to(root))
        if inner not in OURS:
            files[inner] = file
    return files


@contextmanager
def _writing(registry: Registry, directory: Path) -> Iterator[Path]:
    """A hidden directory that becomes `directory` when the block ends well, and is removed otherwise."""
    try:
        target = _free(registry, directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir()
        try:
            yield partial
            sync_tree(partial)
            partial.rename(target)  # over an empty directory, too; never over one with something in it
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync(target.parent)
    except OSError as error:
        where, what = error.filename or directory, error.strerror or error
        raise BadInput(
            f"export: {where}: {what}; nothing was exported. Fix: make the directory writable, or choose another."
        ) from None


def _free(registry: Registry, directory: Path) -> Path:
    target = directory.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(f"export: {directory} is there and not an empty directory; name one that is not there")
    if target == Path.cwd():
        raise BadInput(f"export: {directory} is the working directory; name one that is not there")
    if "://" not in registry.url and target.is_relative_to(Path(registry.url).resolve()):
        raise BadInput(f"export: {directory} lies in the registry {registry.url}; choose a directory outside")
    return target


def _copy(artifact: Artifact, source: Path, target: Path, file: File) -> None:
    """Copy a file. Raises Failed unless the copy has the published bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        reading = source.open("rb")
    except FileNotFoundError:
        raise _damaged(artifact, file, "is gone") from None
    with reading, target.open("xb") as writing:
        for block in iter(lambda: reading.read(BLOCK), b""):
            digest.update(block)
            writing.write(block)
    if digest.hexdigest() != file.sha256:
        raise _damaged(artifact, file, "its bytes are not those that were published")


def _damaged(artifact: Artifact, file: File, problem: str) -> Failed:
    return Failed(
        f"{artifact.id}/{file.path}: {problem}; nothing was exported. switchback verify {artifact.id} lets it be made "
        "again"
    )


def _listed(directory: Path) -> Exported:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return Exported(
        directory, tuple(path.relative_to(directory) for path in files), sum(path.stat().st_size for path in files)
    )
