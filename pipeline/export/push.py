"""Push: an export to a repository on the Hugging Face hub, as one commit.

    target + artifact -> repository, private by default -> export in a temporary directory -> commit named after the
    artifact

The commit is atomic and has the inspected state as its parent, so it never overwrites a concurrent commit. It deletes
weights, settings and templates of an earlier push that this one lacks, because `from_pretrained` would read them. Any
other file stays.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import Failed, PushFailed
from pipeline.export import export
from pipeline.export.export import called, output_of
from pipeline.registry import Artifact, Registry
from stages.errors import BadInput
from stages.rejection import CONTROL

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

TARGET = re.compile(r"hf://(?P<repo>\w[\w.-]*/\w[\w.-]*)")
REPOSITORY = {"policy": "model", "data": "dataset", CONTROL: "dataset"}
"""Output -> kind of repository that it becomes."""
REFUSED = {
    401: "the hub does not know the token; run hf auth login, or set HF_TOKEN to one that may write",
    403: "the token may not write there; use one that may, or another name",
    404: "the hub does not have it, or not for this token; check the name and what the token may do",
}
"""Status -> advice, for errors that the user can fix."""
LOADED = (".safetensors", ".json", ".jinja", ".model", ".jsonl")
"""Suffixes of files that `from_pretrained` and `load_dataset` read."""
LOADED_NAMES = ("vocab.txt", "merges.txt")
"""Names of further files that they read."""
LOADED_FROM = (".", "adapter", "additional_chat_templates")
"""Directories in which they look."""


class Pushed(NamedTuple):
    """A finished push."""

    url: str
    commit: str
    """SHA of the commit; the previous one when nothing had changed."""
    private: bool


def repository(target: str) -> str:
    """`org/name` of hf://org/name. Raises BadInput for anything else."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    match = TARGET.fullmatch(target)
    try:
        if match is not None:
            validate_repo_id(match["repo"])
            return match["repo"]
    except HFValidationError:
        pass
    shown = "a target with a user or a password in it" if "@" in target else repr(target)
    raise BadInput(f"push: found {shown}, expected hf://org/name; a branch is given with --revision")


def push(
    registry: Registry,
    artifact: Artifact,
    target: str,
    public: bool = False,
    revision: str | None = None,
    output: str | None = None,
) -> Pushed:
    """Export an artifact, or one output of it, and commit it to the hub. `revision` is a branch, created if missing.
    The repository is created first, so a damaged artifact leaves an empty new repository behind.

    Raises BadInput for a bad target, a missing token, and a name or token that the hub refuses. Raises it also for a
    public repository without `public`. Raises Failed for a damaged artifact, and PushFailed when the hub fails.
    """
    repo, output = repository(target), output_of(artifact, output)
    token = _token()
    with _one_line(target, token), tempfile.TemporaryDirectory(prefix="switchback-push-") as temporary:
        from huggingface_hub import HfApi

        api, kind = HfApi(token=token), REPOSITORY[output]
        url = api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True)
        private = bool(api.repo_info(repo, repo_type=kind).private)
        if not private and not public:
            raise BadInput(f"push: {target} is there and public; say --public to push to it, or choose another name")
        if revision:
            api.create_branch(repo, repo_type=kind, branch=revision, exist_ok=True)
        done = export.export(registry, artifact, Path(temporary, "export"), output)
        commit = _commit(api, repo, kind, revision, done.directory, called(artifact, output))
    return Pushed(f"{url}/tree/{revision}" if revision else str(url), commit, private)


def _token() -> str:
    """The token in HF_TOKEN, or in the file that `hf auth login` writes."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise BadInput("push: HF_HUB_OFFLINE is set, so the hub cannot be reached; unset it")
    token = get_token()
    if not token:
        raise BadInput("push: there is no token for the hub; run hf auth login, or set HF_TOKEN")
    return token


def _commit(api: HfApi, repo: str, kind: str, revision: str | None, directory: Path, message: str) -> str:
    """Commit the directory on top of the repository's current state; returns the SHA."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = api.repo_info(repo, repo_type=kind, revision=revision).sha
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    previous = api.list_repo_files(repo, repo_type=kind, revision=head)
    stale = [path for path in sorted(previous) if path not in paths and _is_loaded(path)]
    operations: list[Any] = [CommitOperationAdd(inner, str(path)) for inner, path in sorted(paths.items())]
    operations += [CommitOperationDelete(path) for path in stale]
    return api.create_commit(
        repo, operations, commit_message=message, repo_type=kind, revision=revision, parent_commit=head
    ).oid


def _is_loaded(path: str) -> bool:
    """Whether `from_pretrained` or `load_dataset` would read a file of a repository."""
    file = PurePosixPath(path)
    return str(file.parent) in LOADED_FROM and (file.suffix in LOADED or file.name in LOADED_NAMES)


@contextmanager
def _one_line(target: str, token: str) -> Iterator[None]:
    """Raise errors of the hub and of the network as one line without the token. No progress bars outside a terminal."""
    from httpx2 import HTTPError  # what huggingface_hub speaks HTTP with
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except Failed:
        raise  # has said what to do
    except (HTTPError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # an upload wraps its error
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(target, cause, token) from None
        message = _without_token(str(cause or error), token)
        raise PushFailed(f"push: {target}: {message}; run the same command again") from None


def _refusal(target: str, error: HfHubHTTPError, token: str) -> BadInput | PushFailed:
    status = error.response.status_code
    details = str(status)
    if error.server_message:
        details = f"{status}: {_without_token(error.server_message, token)}"
    if status in REFUSED:
        return BadInput(f"push: {target}: {REFUSED[status]} ({details})")
    why = "somebody else wrote to it meanwhile" if status in (409, 412) else "the hub could not take it"
    return PushFailed(f"push: {target}: {why} ({details}); run the same command again")


def _without_token(text: str, token: str) -> str:
    """One line of text without the token."""
    return " ".join(text.replace(token, "***").split())
