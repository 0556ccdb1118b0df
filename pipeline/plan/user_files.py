"""The user's files that a step reads: which there are, and the digests with which it was planned.

Problem, rewards, their local modules, rows, `problem.files` -> UserFiles, and what of them is in the step's key. A plan
asks for each digest once, so the key and the UserFile of a file always agree. `pipeline.run.user_files` holds a step to
them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.recipe.recipe import DatasetProblem, FileProblem, ProblemSettings
from stages.config import Frozen
from stages.errors import BadInput
from stages.problems.custom.local_modules import local_modules

Digest = Callable[[Path], str]
"""The SHA-256 of a file's bytes."""


class UserFile(Frozen):
    """A file outside the registry, as it was planned."""

    folder: str
    """Absolute path of the folder that it was found in."""
    name: str
    """Path from there."""
    sha256: str
    copied: bool = True
    """The step reads a copy. False: user code opens the file itself, by a name of its own."""

    @property
    def path(self) -> Path:
        """Its absolute path, without `..`."""
        return Path(os.path.normpath(Path(self.folder, self.name)))


def of_rows(path: str, digest: Digest) -> UserFile:
    """A file of rows."""
    return _file(Path(path), digest)


def of_problem(problem: ProblemSettings, digest: Digest) -> tuple[UserFile, ...]:
    """Every file that a problem is made of; none for a built-in one. Raises BadInput for one that cannot be read."""
    if not isinstance(problem, (FileProblem, DatasetProblem)):
        return ()
    found = [_file(path, digest) for path in _data(problem)]
    for code in _code(problem):
        found += [_file(code, digest), *_modules(code, digest)]
    return (*found, *opened(problem, digest))


def modules_identity(file: str, digest: Digest) -> dict[str, Any]:
    """What the key holds of the local modules of a file of code; nothing where it has none."""
    found = {name: _digested(path, digest) for name, path in _local(Path(file)).items()}
    return {"modules": found} if found else {}


def opened_identity(problem: FileProblem | DatasetProblem, digest: Digest) -> dict[str, Any]:
    """What the key holds of `problem.files`: names and bytes; nothing where there are none."""
    found = [[file.name, file.sha256] for file in opened(problem, digest)]
    return {"files": found} if found else {}


def opened(problem: FileProblem | DatasetProblem, digest: Digest) -> Iterator[UserFile]:
    """The files of `problem.files`, in its order, named by their path from the problem's folder."""
    folder = next((path.absolute().parent for path in (*_data(problem), *_code(problem))), Path.cwd())
    for path in paths_opened(problem):
        sha256 = _digested(path, digest)
        yield UserFile(folder=str(folder), name=os.path.relpath(path, folder), sha256=sha256, copied=False)


def paths_opened(problem: FileProblem | DatasetProblem) -> Iterator[Path]:
    """The files of `problem.files`, without `..`; a folder stands for all files below it, links to folders followed."""
    for given in map(os.path.normpath, problem.opened):
        yield from sorted(_below(Path(given), set())) if Path(given).is_dir() else [Path(given)]


def _below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Files below a folder. One that a link leads to twice is looked at once."""
    if folder.resolve() in seen or folder.name == "__pycache__":
        return
    seen.add(folder.resolve())
    for path in folder.iterdir():
        if path.is_dir():
            yield from _below(path, seen)
        elif path.is_file():
            yield path


def _data(problem: FileProblem | DatasetProblem) -> Iterator[Path]:
    if isinstance(problem, DatasetProblem) and problem.is_file:
        yield Path(problem.dataset)


def _code(problem: FileProblem | DatasetProblem) -> list[Path]:
    """Python files that are imported, each once."""
    if isinstance(problem, FileProblem):
        return [Path(problem.file)]
    return [Path(file) for file in dict.fromkeys(reward.file for reward in problem.components) if file]


def _modules(code: Path, digest: Digest) -> Iterator[UserFile]:
    folder = code.absolute().parent
    for path in _local(code).values():
        yield UserFile(folder=str(folder), name=str(path.relative_to(folder)), sha256=_digested(path, digest))


def _local(code: Path) -> dict[str, Path]:
    try:
        return local_modules(code.absolute())
    except OSError as error:
        raise BadInput(f"{code}: cannot be read ({error.strerror or error})") from None


def _file(path: Path, digest: Digest) -> UserFile:
    path = path.absolute()
    return UserFile(folder=str(path.parent), name=path.name, sha256=_digested(path, digest))


def _digested(path: Path, digest: Digest) -> str:
    try:
        return digest(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from None
