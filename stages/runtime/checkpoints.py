"""Resume checkpoints: what of a stage's training survives its process. Files only; what is in them is the trainer's
(`stages.trl.resume`).

    work/checkpoint-<step>/   model, optimiser, random state, logs up to that step, and complete.json
    work/set-aside/           checkpoints that cannot be used, until the stage is published

Trainers write checkpoints in place. A checkpoint is whole only when its own record says so: complete.json, written
last, names every file with size and digest, what was asked and in which execution. The newest whole one is used.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, ValidationError

from stages.config import Frozen
from stages.runtime import chunks
from stages.runtime.disk import HashedFile, digest_files, replace, share_tree, sync_tree
from stages.runtime.workdir import FILES, MEETING

COMPLETE = "complete.json"
LOGS = "logs"
"""Directory of the stage's logs inside a checkpoint."""
SET_ASIDE = "set-aside"
TEMPORARY = (chunks.DIRECTORY, SET_ASIDE, FILES, MEETING)
"""Other directories in `work` until a stage is published."""


def _inside(path: str) -> str:
    """A path that stays in the checkpoint: its record may come from a mirror."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{path!r} leaves the checkpoint")
    return path


class Entry(HashedFile):
    """One file of a checkpoint."""

    path: Annotated[str, AfterValidator(_inside)]


class Record(Frozen):
    """complete.json: that a checkpoint is whole, and what it belongs to."""

    step: int
    """Optimiser steps that were done."""
    asked: str
    """Digest of the job but for its places (`asked`)."""
    execution: dict[str, Any]
    """Further settings that the bits depend on: processes, micro-batch, device."""
    files: tuple[Entry, ...]


class Belongs(NamedTuple):
    """The job and the execution that a usable checkpoint must have."""

    asked: str
    execution: dict[str, Any]


class Found(NamedTuple):
    """The checkpoint from which a stage resumes, and the messages about the search for it."""

    checkpoint: Path | None
    """None: at its start."""
    words: list[str]


def directory(work: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return work / f"checkpoint-{step}"


def seal(checkpoint: Path, step: int, belongs: Belongs) -> None:
    """Say that a checkpoint is whole. The disk has all of it when this returns."""
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    files = tuple(
        Entry(path=path.relative_to(checkpoint).as_posix(), size=path.stat().st_size, sha256=digest)
        for path, digest in zip(paths, digest_files(paths), strict=True)
    )
    record = Record(step=step, asked=belongs.asked, execution=belongs.execution, files=files)
    share_tree(checkpoint, checkpoint.parent)  # safetensors gives a file to its user alone
    sync_tree(checkpoint)
    replace(checkpoint / COMPLETE, record.model_dump_json(indent=1).encode())


def newest(work: Path, belongs: Belongs) -> Found:
    """The newest checkpoint that a job can go on from. Those that are newer and cannot be used are set aside, and
    named."""
    words: list[str] = []
    for checkpoint in reversed(_all(work)):
        problem = what_is_wrong(checkpoint, belongs)
        if not problem:
            return Found(checkpoint, words)
        _set_aside(checkpoint)
        words.append(f"set aside {checkpoint.name}: {problem}")
    if words:
        words.append("starts from its beginning")
    return Found(None, words)


def what_is_wrong(checkpoint: Path, belongs: Belongs) -> str:
    """Why a checkpoint cannot be used; "" when it can."""
    try:
        record = Record.model_validate_json((checkpoint / COMPLETE).read_bytes())
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValidationError):
        return f"its {COMPLETE} cannot be read"
    if record.asked != belongs.asked:
        return "it was made from another job, such as other inputs"
    if record.execution != belongs.execution:
        return _other(record.execution, belongs.execution)
    return next(_damage(checkpoint, record), "")


def _other(then: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in then | now if then.get(name) != now.get(name)]
    return "it was made with " + ", ".join(f"{name} {then.get(name)}, not {now.get(name)}" for name in names)


def _damage(checkpoint: Path, record: Record) -> Iterator[str]:
    other = [file for file in record.files if _size(checkpoint / file.path) != file.size]
    if not other:
        digests = digest_files([checkpoint / file.path for file in record.files])
        other = [file for file, digest in zip(record.files, digests, strict=True) if digest != file.sha256]
    yield from (f"{file.path} is not what was saved" for file in other)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def whole(work: Path) -> list[Path]:
    """Every checkpoint that was finished, by step."""
    return [checkpoint for checkpoint in _all(work) if (checkpoint / COMPLETE).exists()]


def keep(work: Path, last: int) -> None:
    """Remove all whole checkpoints but the newest ones."""
    found = whole(work)
    for checkpoint in found[: max(0, len(found) - last)]:
        _remove(checkpoint)


def clear(work: Path) -> None:
    """Remove what is of no use once the stage has been published: all checkpoints, optimiser states with them."""
    for checkpoint in _all(work):
        _remove(checkpoint)
    for name in TEMPORARY:
        _remove(work / name)


def sweep(work: Path) -> None:
    """Finish removals that were cut short."""
    for left in work.glob(".removed-*"):
        shutil.rmtree(left, ignore_errors=True)


def _all(work: Path) -> list[Path]:
    """Every checkpoint, whole or not, by step."""
    found = [path for path in work.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _remove(path: Path) -> None:
    """Under another name first, so that what is left of it is never taken for a torn checkpoint."""
    gone = path.with_name(f".removed-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):  # another process removes it, too
        path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _set_aside(checkpoint: Path) -> None:
    place = checkpoint.parent / SET_ASIDE / checkpoint.name
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(exist_ok=True)
    checkpoint.rename(place)


def save_logs(out: Path, checkpoint: Path) -> None:
    """Put what has been logged so far into a checkpoint."""
    for log in out.rglob("*.jsonl"):
        place = checkpoint / LOGS / log.relative_to(out)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, place)


def restore_logs(checkpoint: Path, out: Path) -> None:
    """Cut the logs back to a checkpoint's step."""
    if (checkpoint / LOGS).is_dir():
        shutil.copytree(checkpoint / LOGS, out, dirs_exist_ok=True)
