"""What the registry vouches for: an artifact, its files and where it comes from.

A manifest may have been written by anybody, so everything in it is checked when it is read (`parse`): a path stays
inside the artifact and names the same file on every file system, a digest is one, text cannot move a terminal's cursor,
an output is among the files. Rules of single values are regular expressions that pydantic runs without Python, so that
thousands of manifests are read in a fraction of a second.
"""

from __future__ import annotations

import json
import re
import unicodedata
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from pipeline.registry.keys import key_of
from stages.config import Frozen
from stages.errors import BadInput, printable
from stages.job import MANIFEST, Format
from stages.runtime.disk import HashedFile

SAFE_SUFFIXES = (".safetensors", ".json", ".jsonl", ".parquet", ".txt", ".md", ".jinja", ".model")
"""Kinds of file an artifact may hold. No pickle, ever."""

_INVISIBLE = r"\p{Cc}\p{Cf}\p{Zl}\p{Zp}"
"""Control and formatting characters and ends of lines: what makes a name look like another one."""
_ANY, _NO_DOT = rf"[^/\\{_INVISIBLE}]", rf"[^/\\.{_INVISIBLE}]"
_PART = rf"(?:{_NO_DOT}{_ANY}*|\.{_NO_DOT}{_ANY}*|\.\.{_ANY}+)"
"""A name in a path: not empty, not `.` and not `..`, without slashes of either kind."""
_INSIDE = rf"(?:{_PART}/)*{_PART}"
_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}-[0-9a-f]{8}"

PATH = rf"^(?:\.|{_INSIDE})$"
FILE = rf"^(?:{_PART}/)*{_ANY}+(?:{'|'.join(map(re.escape, SAFE_SUFFIXES))})$"
DIGEST, ID, DRAFT_ID = r"^[0-9a-f]{64}$", rf"^{_ID}$", rf"^(?:{_ID})?$"
MOMENT = r"^(?:[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?\+00:00)?$"
TEXT = rf"^[^{_INVISIBLE}]*$"
SAID = {
    PATH: "is no path that stays inside the artifact",
    FILE: f"is no path inside the artifact, or none of the kinds of file that artifacts hold ({', '.join(SAFE_SUFFIXES)})",
    DIGEST: "is no SHA-256 in hex",
    ID: "is no id of an artifact, such as rl1-1a2b3c4d",
    DRAFT_ID: "is no id of an artifact, such as rl1-1a2b3c4d",
    MOMENT: "is no time in UTC, such as 2026-11-22T12:00:00+00:00",
    TEXT: "has control characters in it",
}
"""Pattern -> what is said of a value that does not match it."""

InsidePath = Annotated[str, StringConstraints(pattern=PATH, max_length=1024)]
FilePath = Annotated[str, StringConstraints(pattern=FILE, max_length=1024)]
Digest = Annotated[str, StringConstraints(pattern=DIGEST)]
Id = Annotated[str, StringConstraints(pattern=ID)]
Moment = Annotated[str, StringConstraints(pattern=MOMENT)]
Text = Annotated[str, StringConstraints(pattern=TEXT, max_length=4096)]


class File(HashedFile):
    """One file of an artifact."""

    path: FilePath
    """Relative to the artifact."""
    size: int = Field(ge=0, lt=2**63, strict=True)
    """Bytes."""
    sha256: Digest


class Source(Frozen):
    """What an input was."""

    id: Id | None
    """The artifact; None for a base model that is not one."""
    output: Text
    key: Text
    """The artifact's key, or the base model's."""
    name: Text
    """The stage that made it, or where the base model is from."""
    digest: Digest | None = None
    """Of the artifact's files as they were read (`Artifact.digest`); None for what is no artifact."""


class Artifact(Frozen):
    """A finished step. Nothing of it is ever changed."""

    id: Annotated[str, StringConstraints(pattern=DRAFT_ID)]
    """<stage>-<8 hex digits>; "" until it is published."""
    key: Digest
    kind: Text
    stage: Text
    created: Moment
    """UTC, ISO 8601."""
    outputs: dict[Text, InsidePath]
    """Name -> path relative to the artifact; a policy is "."."""
    files: tuple[File, ...]
    inputs: dict[Text, Source]
    format: Format | None
    config: dict[str, Any]
    """Everything the stage was told, execution included."""
    identity: dict[str, Any]
    """What was hashed into the key."""
    metrics: dict[Text, float]
    provenance: dict[str, Any]
    """Run, host, versions, execution as it was seen."""

    @model_validator(mode="after")
    def _holds_together(self) -> Artifact:
        lines = "\n".join(["", *(file.path for file in self.files), ""])  # no path has an end of line in it
        refuse_clashes(lines)
        if self.id and self.id[:-9] != self.stage:
            raise ValueError(f"its id says stage {self.id[:-9]}, and itself {self.stage}")
        for output, path in self.outputs.items() if self.id else ():
            if path != "." and f"\n{path}\n" not in lines and f"\n{path}/" not in lines:
                raise ValueError(f"output {output} lies at {path}, where no file is")
        return self

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 of the names and digests of all files."""
        return key_of({file.path: file.sha256 for file in self.files})


def parse(id: str, content: bytes) -> Artifact:
    """The manifest in the directory of artifact `id`. Raises BadInput, one line with the id in it, for anything that is
    not one."""
    try:
        artifact = Artifact.model_validate_json(content)
        if b"NaN" in content or b"Infinity" in content:  # most likely in text
            json.loads(content, parse_constant=_refuse_constant)
    except ValidationError as error:
        said = _said(error)
    except ValueError as error:
        said = str(error)
    else:
        if artifact.id == id:
            return artifact
        said = f"it is that of {artifact.id or 'nothing that was published'}"
    raise BadInput(
        f"{printable(id)}/{MANIFEST} is no manifest of this artifact: {said}; do not use it, or run switchback verify "
        f"{printable(id)} so that it can be made again"
    )


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def is_id(text: str) -> bool:
    """Whether it could be the id of an artifact."""
    return re.fullmatch(_ID, text) is not None


def check_path(path: str) -> str | None:
    """What is wrong with a file's path in an artifact; None when nothing is."""
    try:
        TypeAdapter(FilePath).validate_python(path)
    except ValidationError as error:
        return _reason(error.errors(include_url=False)[0])
    return "is the registry's own" if path.casefold() == MANIFEST else None


def refuse_clashes(lines: str) -> None:
    """Raise ValueError when two paths, a line each, are one on a file system that does not tell case or accents apart;
    when one is another's directory; or when one is the manifest's."""
    folded = lines.lower() if lines.isascii() else _folded(lines)
    paths = folded.split("\n")[1:-1]
    if len({MANIFEST, *paths}) <= len(paths):
        twice = next(path for i, path in enumerate(paths) if path == MANIFEST or path in paths[:i])
        raise ValueError(
            f"files: {printable(twice)} is there twice, or takes the manifest's name (case and accents do not count)"
        )
    if "/" in lines:
        _refuse_clashing_directories(lines.split("\n")[1:-1], paths)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _refuse_clashing_directories(paths: list[str], folded: list[str]) -> None:
    files, directories = {MANIFEST, *folded}, dict[str, str]()
    for path, one in zip(paths, folded, strict=True):
        parents, written = one.split("/")[:-1], path.split("/")
        for depth in range(1, len(parents) + 1):
            directory, name = "/".join(parents[:depth]), "/".join(written[:depth])
            if directory in files or directories.setdefault(directory, name) != name:
                raise ValueError(
                    f"files: directory {printable(name)} clashes with another name (case and accents do not count)"
                )


def _said(error: ValidationError) -> str:
    """Where and what, of the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{printable(where)} {_reason(first)}" if where else _reason(first)


def _reason(error: Any) -> str:
    pattern = error.get("ctx", {}).get("pattern")
    return SAID.get(pattern) or error["msg"].removeprefix("Value error, ")


def now() -> str:
    """UTC to the microsecond, so that sorting by it is sorting by time."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
