"""The base model of a recipe as an input: what identifies it, and what its small files say.

model: {path | hub | artifact} -> Base. Only JSON and the digests of files are read; nothing of a model on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.plan import tokenizers
from pipeline.plan.digest_cache import digest_once
from pipeline.plan.tokenizers import Tokenizer
from pipeline.recipe import formats
from pipeline.recipe.recipe import Recipe
from pipeline.registry import Registry
from pipeline.registry.aliases import resolve
from pipeline.registry.keys import Payload, digest_model, key_of
from stages.config import Frozen, identity_values
from stages.errors import BadInput
from stages.job import Format
from stages.policy import positions

CONFIG = "config.json"
"""Where a model says of what architecture it is."""


class InputRef(Frozen):
    """What a step reads: an output of an earlier step, the base model, or a file of rows."""

    step: str | None
    """Name of the step; None for a base model or a file of rows."""
    output: str
    key: str
    """The step's key, or what identifies the base model or the file."""
    source: str
    """Where a base model or a file is from; the step's name otherwise."""
    artifact: str | None = None
    """Id of a base model that is an artifact; None for any other."""


class Base(NamedTuple):
    """The recipe's model as an input."""

    ref: InputRef
    settings: dict[str, Any]
    """What of `model` is identity in addition to its bytes: dtype, lora."""
    format: Format | None
    """What the model was trained with, where switchback made it."""
    tokenizer: Tokenizer | None
    """What decides how its tokens are made; None where it cannot be read here, as on the hub."""
    own_positions: bool
    """Its architecture needs the own positions of rows that are padded on the left. False for a model on the hub,
    whose config.json is not here: a stage that needs them refuses it."""


def base_of(recipe: Recipe, registry: Registry) -> Base:
    """What identifies the base model, and where it is from."""
    model, settings = recipe.model, identity_values(recipe.model)
    if model.artifact:
        artifact = resolve(registry, model.artifact)
        if "policy" not in artifact.outputs:
            raise BadInput(f"model.artifact: {artifact.id} is of kind {artifact.kind} and holds no policy")
        place = registry.location(artifact, "policy")
        ref = InputRef(step=None, output="policy", key=artifact.key, source=place, artifact=artifact.id)
        own_positions = _needs_positions(registry.content(artifact, "policy", CONFIG), artifact.id)
        tokenizer = tokenizers.read(lambda name: registry.content(artifact, "policy", name))
        return Base(ref, settings, artifact.format, tokenizer, own_positions)
    if model.hub:
        revision = f"@{model.revision}" if model.revision else ""
        identity: Payload = {"hub": model.hub, "revision": model.revision}
        source = f"hf://{model.hub}{revision}"
        ref = InputRef(step=None, output="policy", key=key_of(identity), source=source)
        return Base(ref, settings, None, None, own_positions=False)
    path = Path(str(model.path)).absolute()
    ref = InputRef(step=None, output="policy", key=digest_model(path, digest_once), source=str(path))
    own_positions = _needs_positions((path / CONFIG).read_bytes(), str(path))
    return Base(ref, settings, formats.carried_by(path), tokenizers.of_directory(path), own_positions)


def _needs_positions(config: bytes | None, where: str) -> bool:
    """Whether the architecture of a config.json needs the own positions of padded rows. Raises BadInput where it is no
    JSON object."""
    try:
        found = json.loads(config) if config is not None else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadInput(f"model: the {CONFIG} of {where} is no JSON object. Fix: save the model again")
    return positions.needed(found)
