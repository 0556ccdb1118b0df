"""Keys of steps, and the fields in which two keys differ.

A key is the SHA-256 of the canonical JSON of everything that decides the result. The encoding raises on a value that it
could not write the same way twice. The artifact stores the hashed payload, so a plan can name the field that changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from stages.errors import BadInput
from stages.runtime.disk import digest_file

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*.jinja")
"""Files of a model's directory that `from_pretrained` may read; a README or a script is not part of the model."""

DIGEST = re.compile(r"\b[0-9a-f]{64}\b")

Payload = dict[str, Any]


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces. Raises TypeError on anything but str, int, finite float, bool, None, list,
    tuple and str-keyed dict."""
    _must_be_stable(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def key_of(payload: Payload) -> str:
    """64 hex digits."""
    return hashlib.sha256(canonical(payload).encode()).hexdigest()


def abbreviated(text: str) -> str:
    """The text with every digest cut to 8 digits, for display."""
    return DIGEST.sub(lambda match: match[0][:8], text)


def digest_model(directory: Path, digest: Callable[[Path], str] = digest_file) -> str:
    """SHA-256 of the names and bytes of a model's files, those that an index of shards names included. `digest` gives
    the SHA-256 of a file's bytes. Raises BadInput for an index that leads out of the directory, or to no file."""
    files = {path for pattern in MODEL_FILES for path in directory.glob(pattern) if path.is_file()}
    for index in directory.glob("*.index.json"):
        files |= set(_shards(index))
    return key_of({str(path.relative_to(directory)): digest(path) for path in sorted(files)})


def _shards(index: Path) -> Iterator[Path]:
    """The files that an index of shards names."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index}: found no weight_map ({type(error).__name__}). Fix: save the model again") from None
    for name in sorted(map(str, names)):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise BadInput(f"{index}: found the shard {name!r}, expected one below {index.parent}. Fix: move it there")
        if not (index.parent / path).is_file():
            raise BadInput(f"{index}: the shard {name!r} is not there. Fix: copy it, or save the model again")
        yield index.parent / path


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (before, after), for every field that differs; None for a missing field. Items of a list of
    groups, such as rewards, are compared by position."""
    old = dict(_flat(_without_equal(before, after)))
    new = dict(_flat(_without_equal(after, before)))
    names = [*old, *(name for name in new if name not in old)]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _without_equal(payload: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a payload that another does not have with an equal value."""
    return {name: value for name, value in payload.items() if name not in other or other[name] != value}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (list, tuple)) and value and all(isinstance(inner, dict) for inner in value):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{path}.{i}")
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def _must_be_stable(value: Any) -> None:
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise TypeError(f"cannot hash a dict with keys other than strings: {list(value)[:3]}")
        for inner in value.values():
            _must_be_stable(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _must_be_stable(inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"cannot hash {value}")
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise TypeError(f"cannot hash a {type(value).__name__}: {value!r}")
