"""A base model on the Hugging Face hub: it is there before the first step, and every step reads the same commit.

model.hub, or a step's source hf://org/name@revision -> the commit in this machine's cache, or one line. Imports no
huggingface_hub where the model is from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import StageFailed
from pipeline.plan.base import CONFIG
from pipeline.plan.steps import Step
from pipeline.recipe.recipe import Model
from pipeline.registry import Artifact
from stages.errors import BadInput
from stages.job import HUB

COMMIT = "commit"
"""What provenance calls the commit of a base model on the hub."""
PATIENCE = 4.0
"""Seconds that the hub may take to answer whether it has a model."""


def refuse_unreachable(model: Model) -> None:
    """Raise BadInput for a model on the hub that is neither in this machine's cache nor given out by the hub."""
    if not model.hub:
        return
    if _cached_commit(model.hub, model.revision):
        return
    from huggingface_hub import HfApi, constants

    where = f"model.hub: {model.hub}{f'@{model.revision}' if model.revision else ''}"
    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"{where} is not in this machine's cache, and HF_HUB_OFFLINE is set. Fix: unset it")
    try:
        HfApi().model_info(model.hub, revision=model.revision, timeout=PATIENCE)
    except Exception as error:  # a refusal of the hub, of a proxy or of the network, each of another library
        raise BadInput(
            f"{where} is not in this machine's cache, and {constants.ENDPOINT} does not give it out (found "
            f"{type(error).__name__}, expected an answer within {PATIENCE:g} s). Fix: check the name, HF_TOKEN and the "
            f"network, or give model.path"
        ) from None


def commit_of(source: str) -> str | None:
    """The commit that a model on the hub was last fetched at; None for any other model, and for one that is not on
    this machine."""
    if not source.startswith(HUB):
        return None
    repo, _, revision = source.removeprefix(HUB).partition("@")
    return _cached_commit(repo, revision or None)


def _cached_commit(repo: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, CONFIG, revision=revision)
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
