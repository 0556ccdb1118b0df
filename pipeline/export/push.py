"""Another way out: an export, to a repository on the Hugging Face hub, as one commit.

    target + artifact -> repository (made private unless asked otherwise) -> export in a temporary directory -> one commit named after the artifact

The commit is all or nothing, and stands on the state that was looked at: what somebody else commits meanwhile is not
written over. Weights, settings and templates of an earlier push that are not in this one go with it, because
`from_pretrained` would read them; any other file stays.
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
"""Statuses that the user can mend."""
LOADED = (".safetensors", ".json", ".jinja", ".model", ".jsonl")
"""Kinds of file that `from_pretrained` and `load_dataset` read,"""
LOADED_NAMES = ("vocab.txt", "merges.txt")
LOADED_FROM = (".", "adapter", "additional_chat_templates")
"""and where they look."""


class Pushed(NamedTuple):
    """Where it is now."""

    url: str
    commit: str
    """SHA of the commit; the one before when nothing had changed."""
    private: bool


def repository(target: str) -> str:
    """`org/name` of hf://org/name. Raises BadInput for anything else."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if match := TARGET.fullmatch(target):
            validate_repo_id(match["repo"])
            return match["repo"]
    except HFValidationError:
        pass
    found = "a target with a user or a password in it" if "@" in target else repr(target)
    raise BadInput(f"push: found {found}, expected hf://org/name; a branch is given with --revision")


def push(
    registry: Registry,
    artifact: Artifact,
    target: str,
    public: bool = False,
    revision: str | None = None,
    output: str | None = None,
) -> Pushed:
    """Export an artifact, or one output of it, and commit it to the hub. `revision` is a branch, made when it is not
    there. The repository is made first, so one that is new stays behind, empty, when the artifact turns out to be
    damaged.

    Raises BadInput for a bad target, without a token, for a name or token that the hub refuses, and for a repository
    that is public while `public` was not said; Failed for a damaged artifact, and when the hub fails.
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
    """Of the usual places: HF_TOKEN, or the file that `hf auth login` writes."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise BadInput("push: HF_HUB_OFFLINE is set, so the hub cannot be reached; unset it")
    if token := get_token():
        return token
    raise BadInput("push: there is no token for the hub; run hf auth login, or set HF_TOKEN")


def _commit(api: HfApi, repo: str, kind: str, revision: str | None, directory: Path, message: str) -> str:
    """One commit on top of the state that was looked at; returns its SHA."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = api.repo_info(repo, repo_type=kind, revision=revision).sha
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    there = api.list_repo_files(repo, repo_type=kind, revision=head)
    operations: list[Any] = [CommitOperationAdd(inner, str(path)) for inner, path in sorted(paths.items())]
    operations += [CommitOperationDelete(path) for path in sorted(there) if path not in paths and _is_loaded(path)]
    return api.create_commit(
        repo, operations, commit_message=message, repo_type=kind, revision=revision, parent_commit=head
    ).oid


def _is_loaded(path: str) -> bool:
    """Whether a file in a repository would be taken for a part of the model or the data."""
    found = PurePosixPath(path)
    return str(found.parent) in LOADED_FROM and (found.suffix in LOADED or found.name in LOADED_NAMES)


@contextmanager
def _one_line(target: str, token: str) -> Iterator[None]:
    """What the hub or the way to it has to say, as one line without the token; no progress bars where nobody looks."""
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
        found = error.__cause__ if isinstance(error, RuntimeError) else error  # an upload wraps what stopped it
        if isinstance(found, HfHubHTTPError):
            raise _refusal(target, found, token) from None
        raise PushFailed(f"push: {target}: {_said(str(found or error), token)}; run the same command again") from None


def _refusal(target: str, error: HfHubHTTPError, token: str) -> BadInput | PushFailed:
    status = error.response.status_code
    told = f": {_said(error.server_message, token)}" if error.server_message else ""
    if status in REFUSED:
        return BadInput(f"push: {target}: {REFUSED[status]} ({status}{told})")
    why = "somebody else wrote to it meanwhile" if status in (409, 412) else "the hub could not take it"
    return PushFailed(f"push: {target}: {why} ({status}{told}); run the same command again")


def _said(text: str, token: str) -> str:
    return " ".join(text.replace(token, "***").split())
