"""The manifest of an artifact: its files, outputs and inputs.

A manifest may come from an untrusted writer, so `parse` checks every value in it. A path stays inside the artifact and
names the same file on every file system. A digest is 64 hex digits. Text holds no control characters. An output is
among the files. Pydantic checks single values by regular expressions, without calling Python, so reading thousands of
manifests takes a fraction of a second.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from pipeline.registry.keys import key_of
from stages.config import Frozen
from stages.errors import BadInput, printable
from stages.job import MANIFEST, Format
from stages.runtime.disk import HashedFile

SAFE_SUFFIXES = (".safetensors", ".json", ".jsonl", ".parquet", ".txt", ".md", ".jinja", ".model")
"""Suffixes that an artifact's files may have. Pickle is never allowed."""

_INVISIBLE = r"\p{Cc}\p{Cf}\p{Zl}\p{Zp}"
"""Control and formatting characters and line ends, which make one name look like another."""
_ANY, _NO_DOT = rf"[^/\\{_INVISIBLE}]", rf"[^/\\.{_INVISIBLE}]"
_PART = rf"(?:{_NO_DOT}{_ANY}*|\.{_NO_DOT}{_ANY}*|\.\.{_ANY}+)"
"""A name in a path: not empty, not `.` and not `..`, without slashes of either kind."""
_INSIDE = rf"(?:{_PART}/)*{_PART}"
_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}-[0-9a-f]{8}"

PATH = rf"^(?:\.|{_INSIDE})$"
FILE = rf"^(?:{_PART}/)*{_ANY}+(?:{'|'.join(map(re.escape, SAFE_SUFFIXES))})$"
DIGEST, ID, DRAFT_ID = r"^[0-9a-f]{64}$", rf"^{_ID}$", rf"^(?:{_ID})?$"
_DATE = r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
MOMENT = rf"^(?:{_DATE}T{_TIME}\+00:00)?$"
TEXT = rf"^[^{_INVISIBLE}]*$"
REASONS = {
    PATH: "is no path that stays inside the artifact",
    FILE: "is no path inside the artifact, or none of the kinds of file that artifacts hold "
    f"({', '.join(SAFE_SUFFIXES)})",
    DIGEST: "is no SHA-256 in hex",
    ID: "is no id of an artifact, such as rl1-1a2b3c4d",
    DRAFT_ID: "is no id of an artifact, such as rl1-1a2b3c4d",
    MOMENT: "is no time in UTC, such as 2026-11-22T12:00:00+00:00",
    TEXT: "has control characters in it",
}
"""Pattern -> the message about a value that does not match it."""
NOT_JSON = (b"NaN", b"Infinity")
"""Python's JSON parsers read these words as numbers; the JSON standard does not have them."""

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
    """An input, as it was read."""

    id: Id | None
    """The artifact; None for a base model that is not one."""
    output: Text
    key: Text
    """The artifact's key, or the base model's."""
    name: Text
    """The stage that made it, or where the base model is from."""
    digest: Digest | None = None
    """Digest of the artifact's files as they were read (`Artifact.digest`); None for a base model or a file of rows."""


class Artifact(Frozen):
    """A finished step. It never changes."""

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
    """All settings of the stage, execution included."""
    identity: dict[str, Any]
    """The payload that was hashed into the key."""
    metrics: dict[Text, float]
    provenance: dict[str, Any]
    """Run, host, versions, and the execution that the worker measured."""

    @model_validator(mode="after")
    def _holds_together(self) -> Artifact:
        paths = [file.path for file in self.files]
        refuse_clashes(paths)
        if not self.id:
            return self
        if self.id[:-9] != self.stage:
            raise ValueError(f"its id says stage {self.id[:-9]}, and itself {self.stage}")
        for output, path in self.outputs.items():
            if path != "." and not _holds(paths, path):
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


def _holds(paths: Sequence[str], path: str) -> bool:
    """Whether a path is one of these files, or a directory above one."""
    return path in paths or any(file.startswith(f"{path}/") for file in paths)


def parse(artifact_id: str, content: bytes) -> Artifact:
    """The manifest in the directory of an artifact. Raises BadInput, one line with the id in it, for an invalid one."""
    try:
        artifact = Artifact.model_validate_json(content)
        _refuse_nan(content)
    except ValidationError as error:
        problem = _first_problem(error)
    except ValueError as error:
        problem = str(error)
    else:
        if artifact.id == artifact_id:
            return artifact
        problem = f"it is that of {artifact.id or 'nothing that was published'}"
    shown = printable(artifact_id)
    raise BadInput(
        f"{shown}/{MANIFEST} is no manifest of this artifact: {problem}; do not use it, or run switchback verify "
        f"{shown} so that it can be made again"
    )


def _refuse_nan(content: bytes) -> None:
    """Raise ValueError for NaN or Infinity in `config`, `identity` or `provenance`, whose values pydantic does not
    check. The search in the bytes only saves the second parser where neither word occurs, even in a text."""
    if any(word in content for word in NOT_JSON):
        json.loads(content, parse_constant=_refuse_constant)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def is_id(text: str) -> bool:
    """Whether it could be the id of an artifact."""
    return re.fullmatch(_ID, text) is not None


def check_path(path: str) -> str | None:
    """The problem with a file's path in an artifact; None for a valid path."""
    try:
        TypeAdapter(FilePath).validate_python(path)
    except ValidationError as error:
        return _reason(error.errors(include_url=False)[0])
    return "is the registry's own" if path.casefold() == MANIFEST else None


def refuse_clashes(paths: Sequence[str]) -> None:
    """Raise ValueError when two paths name one file on a file system that ignores case or accents, when a path is
    another's directory, or when one is the manifest's."""
    folded = [_folded(path) for path in paths]
    if len({MANIFEST, *folded}) <= len(folded):
        twice = next(path for i, path in enumerate(folded) if path == MANIFEST or path in folded[:i])
        raise ValueError(
            f"files: {printable(twice)} is there twice, or takes the manifest's name (case and accents do not count)"
        )
    nested = [path for path in paths if "/" in path]
    if nested:
        _refuse_clashing_directories(nested, {MANIFEST, *folded})


def _folded(path: str) -> str:
    """The path as a file system sees it that ignores case and accents' encoding."""
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _refuse_clashing_directories(paths: Sequence[str], files: set[str]) -> None:
    """Raise ValueError when a directory of `paths` is one of `files`, or is written in two ways."""
    directories = dict[str, str]()
    for path in paths:
        parents, written = _folded(path).split("/")[:-1], path.split("/")
        for depth in range(1, len(parents) + 1):
            directory, name = "/".join(parents[:depth]), "/".join(written[:depth])
            if directory in files or directories.setdefault(directory, name) != name:
                raise ValueError(
                    f"files: directory {printable(name)} clashes with another name (case and accents do not count)"
                )


def _first_problem(error: ValidationError) -> str:
    """The first invalid field, and its problem."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{printable(where)} {_reason(first)}" if where else _reason(first)


def _reason(error: Any) -> str:
    pattern = error.get("ctx", {}).get("pattern")
    return REASONS.get(pattern) or error["msg"].removeprefix("Value error, ")


def now() -> str:
    """UTC to the microsecond, so that sorting by it is sorting by time."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
