"""One way out of the registry: an artifact becomes a plain directory that needs no switchback.

    policy: what `from_pretrained` loads, the adapter in adapter/, README.md     data, control: its directory, README.md

What is of the registry stays there: the manifest (it names hosts and runs; the card says what a reader needs of it),
logs of metrics, loss maps, rollouts. A policy still shows what it was trained with: its serving template ends in the
prefix, beside the training template, and a stage that starts from an export with another prefix is refused.

Every byte is hashed while it is copied, into a hidden directory that gets its name when all is right: DIR is whole, or
not there.
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
"""Files beside a policy that are not the model."""
EXPORTED = ("policy", "data", CONTROL)
"""Outputs that can leave. One of the first two is what an artifact is for; the control of its data is asked for by
name."""
BESIDE = ("adapter",)
"""Outputs that go with a policy; each of its other outputs is an artifact's own."""
BLOCK = 2**20


class Exported(NamedTuple):
    """What was written."""

    directory: Path
    files: tuple[Path, ...]
    """Relative to the directory; the card is one of them."""
    size: int
    """Bytes of all files."""


def named(registry: Registry, name: str) -> tuple[Artifact, str]:
    """The artifact and the output that `ID` or `ID:output` names; an alias does as well. Raises BadInput where there is
    none."""
    id, colon, output = name.partition(":")
    artifact = resolve(registry, id)
    return artifact, output_of(artifact, output if colon else None)


def export(registry: Registry, artifact: Artifact, directory: Path, output: str | None = None) -> Exported:
    """Write an output of an artifact, or its policy or data, to a directory that is not there, or empty. Nothing is
    left behind when it fails; killed outright, it leaves a hidden `.<name>.<hex>.partial` beside it.

    Raises BadInput when the directory cannot be had, the artifact does not hold it, or is void; Failed when a file is
    not what was published.
    """
    output = output_of(artifact, output)
    if not registry.usable(artifact):
        raise BadInput(f"{artifact.id} is void: the registry no longer vouches for it; run its recipe to make it again")
    with _writing(registry, directory) as partial:
        (partial / CARD).write_text(card.card(registry, artifact, output))
        source = registry.path(artifact)
        for inner, file in sorted(files_of(artifact, output).items()):
            _copy(artifact, source / file.path, partial / inner, file)
    return _listed(directory.resolve())


def output_of(artifact: Artifact, asked: str | None = None) -> str:
    """Which output is exported: the one that is asked for, else policy, or data. Raises BadInput for an artifact that
    does not have it."""
    there = [output for output in EXPORTED if output in artifact.outputs]
    if not there:
        raise BadInput(
            f"{artifact.id} is of kind {artifact.kind} and holds neither a policy nor data; switchback ls shows what "
            "there is"
        )
    if asked is not None and asked not in there:
        raise BadInput(
            f"{artifact.id}:{asked} cannot be exported; expected {artifact.id}:{f' or {artifact.id}:'.join(there)}"
        )
    return there[0] if asked is None else asked


def called(artifact: Artifact, output: str) -> str:
    """The artifact's id; with the output where that is not the one that it is for."""
    return artifact.id if output == output_of(artifact) else f"{artifact.id}:{output}"


def files_of(artifact: Artifact, output: str) -> dict[str, File]:
    """Path in the exported directory -> the artifact's file."""
    root = PurePosixPath(artifact.outputs[output])
    others = [PurePosixPath(path) for name, path in artifact.outputs.items() if name not in (output, *BESIDE)]
    return {
        inner: file
        for file in artifact.files
        if (path := PurePosixPath(file.path)).is_relative_to(root)
        if (inner := str(path.relative_to(root))) not in OURS
        if not any(path.is_relative_to(other) for other in others)
    }


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
            f"export: {where}: {what}; nothing was exported, so mend that or choose another directory"
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
    """Raises Failed unless what was copied is what was published."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        reading = source.open("rb")
    except FileNotFoundError:
        raise _damaged(artifact, file, "is gone") from None
    with reading, target.open("xb") as writing:
        while block := reading.read(BLOCK):
            digest.update(block)
            writing.write(block)
    if digest.hexdigest() != file.sha256:
        raise _damaged(artifact, file, "its bytes are not those that were published")


def _damaged(artifact: Artifact, file: File, what: str) -> Failed:
    return Failed(
        f"{artifact.id}/{file.path}: {what}; nothing was exported. switchback verify {artifact.id} lets it be made "
        "again"
    )


def _listed(directory: Path) -> Exported:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return Exported(
        directory, tuple(path.relative_to(directory) for path in files), sum(path.stat().st_size for path in files)
    )
