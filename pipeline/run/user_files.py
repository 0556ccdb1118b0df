"""A step reads what was planned: small files of the user as copies, all others unchanged from launch to publication.

files/<8 digits of a folder's digest>/<path in that folder>    in the step's work directory

A file that differs from its digest in the plan ends the step in one line, and nothing is published."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import StageFailed
from pipeline.plan.base import CONFIG
from pipeline.plan.digest_cache import digest_once
from pipeline.plan.steps import Step
from pipeline.plan.user_files import UserFile, paths_opened
from pipeline.registry import Artifact
from pipeline.registry.keys import digest_model
from stages.errors import BadInput
from stages.job import HUB
from stages.problems.catalog import DatasetProblem, FileProblem, settings_of
from stages.runtime.workdir import FILES, Copies

COMMIT = "commit"
"""What provenance calls the commit of a base model on the hub."""
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


def commit_of(source: str) -> str | None:
    """The commit that a model on the hub was last fetched at; None for any other model, and for one that is not on
    this machine."""
    if not source.startswith(HUB):
        return None
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = source.removeprefix(HUB).partition("@")
    found = try_to_load_from_cache(repo, CONFIG, revision=revision or None)
    return Path(found).parent.name if isinstance(found, str) else None


def checked_commit(step: Step, made: Mapping[str, Artifact], at_start: str | None = None) -> str | None:
    """The commit of the model on the hub that the step reads; None for any other model.

    Raises StageFailed where an earlier step of the run, one of `made`, read another commit of it, or the step itself
    when it started.
    """
    policy = step.inputs["policy"]
    commit = commit_of(policy.source)
    read = {
        name: artifact.provenance.get(COMMIT)
        for name, artifact in made.items()
        if "policy" in artifact.inputs and artifact.inputs["policy"].key == policy.key
    }
    for name, other in {**read, f"{step.name} at its start": at_start}.items():
        if commit and other not in (None, commit):
            raise StageFailed(
                f"{step.name}: {policy.source} has moved on the hub (found commit {commit}, expected {other}, which "
                f"{name} read). Fix: set model.revision to one of the two"
            )
    return commit


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
