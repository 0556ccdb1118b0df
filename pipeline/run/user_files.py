"""A step reads what was planned: small files of the user as copies, all others unchanged from launch to publication.

files/<8 digits of a folder's digest>/<path in that folder>    in the step's work directory

A file that differs from its digest in the plan ends the step in one line, and nothing is published."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.plan.digest_cache import digest_once
from pipeline.plan.steps import Step
from pipeline.plan.user_files import UserFile, paths_opened
from pipeline.registry.keys import digest_model
from stages.errors import BadInput
from stages.job import HUB
from stages.problems.catalog import DatasetProblem, FileProblem, settings_of
from stages.runtime.workdir import FILES, Copies

LARGEST_COPY = 64 * 2**20
"""Bytes; a larger file is read where it lies, and looked at again before publication."""


@contextmanager
def as_planned(step: Step, work: Path, drop_checkpoints: Callable[[str], None]) -> Iterator[Copies]:
    """The step's files are as they were planned, at the start and at the end of the block. Yields its copies.

    Raises BadInput for a change. One that happened inside the block also drops the checkpoints; they may hold what was
    trained on the other bytes.
    """
    copies = _copies(step, work)
    if change := _change(step, copies):
        raise change
    try:
        yield copies
    finally:
        change = _change(step, copies)
        if change:
            drop_checkpoints(str(change))
    if change:
        raise change


def _copies(step: Step, work: Path) -> dict[str, str]:
    """Copy the step's small files. Raises BadInput for one that has changed."""
    shutil.rmtree(work / FILES, ignore_errors=True)
    copies: dict[str, str] = {}
    for file in step.files:
        if file.copied and _size(step, file) <= LARGEST_COPY:
            copy = work / FILES / hashlib.sha256(file.folder.encode()).hexdigest()[:8] / file.name
            copies[str(file.path)] = str(copy)
            _copy(step, file, copy)
    return copies


def _copy(step: Step, file: UserFile, copy: Path) -> None:
    content = file.path.read_bytes()
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise _changed(step, str(file.path))
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(content)


def _size(step: Step, file: UserFile) -> int:
    try:
        return file.path.stat().st_size
    except OSError:
        raise _changed(step, str(file.path)) from None


def _change(step: Step, copies: Copies) -> BadInput | None:
    """The complaint about a file without a copy, or a base model, that is not what was planned."""
    for file in step.files:
        if str(file.path) not in copies and _digest(file.path) != file.sha256:
            return _changed(step, str(file.path))
    if added_or_gone := sorted(_listed(step) ^ {file.path for file in step.files if not file.copied}):
        return _changed(step, str(added_or_gone[0]))
    base = step.inputs["policy"]
    if base.step is None and base.artifact is None and not base.source.startswith(HUB):
        try:
            found = digest_model(Path(base.source), digest_once)
        except (OSError, BadInput):
            found = None
        if found != base.key:
            return _changed(step, base.source)
    return None


def _listed(step: Step) -> set[Path]:
    """The files that there are now of `problem.files`, where the step reads the problem."""
    opens = any(not file.copied for file in step.files)
    problem = step.problem or (step.evaluated.problem if step.evaluated and opens else None)
    settings = settings_of(problem) if problem else None
    return set(paths_opened(settings)) if isinstance(settings, (FileProblem, DatasetProblem)) else set()


def _digest(path: Path) -> str | None:
    try:
        return digest_once(path)
    except OSError:
        return None


def _changed(step: Step, path: str) -> BadInput:
    return BadInput(
        f"{step.name}: {path} was changed after the run was planned, so nothing is published. Fix: run the recipe "
        "again, which plans with the new content, or put the old content back"
    )
