"""Whether an artifact is still what was published: every file there, of its size and digest, no other, no link, and the key that of what was hashed."""

from __future__ import annotations

from pipeline.identity import digest_file, key_of
from pipeline.registry.artifact import Artifact
from pipeline.registry.registry import Registry
from stages.job import MANIFEST


def verify(registry: Registry, artifact: Artifact) -> list[str]:
    """What is wrong, a line a file; empty when nothing is."""
    directory = registry.path(artifact)
    wrong: list[str] = []
    for file in artifact.files:
        path = directory / file.path
        if path.is_symlink():
            wrong.append(f"{artifact.id}/{file.path}: is a link")
        elif not path.is_file():
            wrong.append(f"{artifact.id}/{file.path}: is gone")
        elif path.stat().st_size != file.size:
            wrong.append(f"{artifact.id}/{file.path}: has {path.stat().st_size} bytes, {file.size} were published")
        elif digest_file(path) != file.sha256:
            wrong.append(f"{artifact.id}/{file.path}: its bytes are not those that were published")
    if key_of(artifact.identity) != artifact.key:
        wrong.append(f"{artifact.id}/{MANIFEST}: its key is not that of its identity")
    known = {MANIFEST, *(file.path for file in artifact.files)}
    strays = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()} - known
    return wrong + [f"{artifact.id}/{stray}: was not published" for stray in sorted(strays)]
