"""How text is rendered at every step: declared once in the recipe, inherited from policy to policy, and never changed
in silence.

recipe + what the base policy was trained with -> the base's Format -> each stage's: its policy's, with what its own
`format` sets put over it. A recipe that contradicts its base policy, or a stage whose data were made with another
Format, is refused; a stage that says so on purpose is not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import prompts
from stages.config import FormatSettings
from stages.errors import BadInput
from stages.job import COMPARED, MANIFEST, Format, different


def of_base(settings: FormatSettings, carried: Format | None) -> Format:
    """The recipe's Format. `carried` is what the base policy was trained with; None for a model that switchback did
    not make.

    Raises BadInput where the recipe contradicts it.
    """
    if carried is None:
        plain = settings.model_copy(update={"prompt": settings.prompt or "plain"})
        return over(Format(prompt="", prompt_digest="", system_prompt="", user_template="", response_prefix=""), plain)
    declared = over(carried, settings)
    for name in different(carried, declared):
        raise BadInput(
            f"format: {_field(name)} is {_short(declared, name)}, but the base policy was trained with "
            f"{_short(carried, name)}; remove it, or change it on purpose with a stage's own format"
        )
    return carried


def of_stage(name: str, settings: FormatSettings | None, policy: Format, data: tuple[str, Format] | None) -> Format:
    """A stage's Format: its policy's, with what it sets itself. `data` is (the stage that made its rows, the Format it
    made them with).

    Raises BadInput where the rows were made with another Format and the stage does not say which one it means, field
    by field."""
    settings = settings or FormatSettings()
    format = over(policy, settings)
    for field in different(format, data[1]) if data else ():
        assert data is not None
        if getattr(settings, _field(field)) is None:
            raise BadInput(
                f"stages.{name}: its policy has {field} {_short(policy, field)}, but its data ({data[0]}) was made with"
                f" {_short(data[1], field)}; set stages.{name}.format.{_field(field)} to say which one the new "
                f"policy has"
            )
    return format


def carried_by(directory: Path) -> Format | None:
    """What a published policy, or a copy of one, was trained with; None for any other model. Raises BadInput for a
    manifest that cannot be read."""
    if not (path := directory / MANIFEST).is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["format"]
        return Format.model_validate(found) if found else None
    except (ValueError, KeyError, ValidationError) as error:
        raise BadInput(
            f"{path} does not say how its policy was trained ({type(error).__name__}); publish it again"
        ) from None


def read_template(path: str) -> str:
    """A chat template's file. Raises BadInput when there is none, or no text in it."""
    if not Path(path).is_file():
        raise BadInput(f"format.chat_template: {path} is not there (paths count from {Path.cwd()})")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"format.chat_template: {path} is not text") from None


def identity(format: Format) -> dict[str, Any]:
    """What of a Format is part of a key."""
    content = {name: getattr(format, name) for name in COMPARED}
    template = content["chat_template"]
    return {**content, "chat_template": hashlib.sha256(template.encode()).hexdigest() if template else None}


def over(format: Format, settings: FormatSettings) -> Format:
    """`format` with what is set put over it. Raises ValueError for a prompt that cannot be loaded."""
    changed: dict[str, Any] = {}
    if settings.prompt is not None:
        prompt = prompts.load(settings.prompt)
        changed |= {"prompt": prompt.name, "prompt_digest": prompt.digest}
        changed |= {"system_prompt": prompt.system_prompt, "user_template": prompt.user_template}
    if settings.response_prefix is not None:
        changed |= {"response_prefix": settings.response_prefix, "per_row": None}
    if settings.per_row is not None:
        changed |= {"response_prefix": "", "per_row": settings.per_row}
    if settings.chat_template is not None:
        changed |= {"chat_template": read_template(settings.chat_template), "training_template": None}
    return format.model_copy(update=changed)


def rule(format: Format, prompt: str | None) -> str | None:
    """How one sees that a completion follows the Format's prompt; None where its file does not say, or is not here.
    `prompt` is its name or path."""
    try:
        found = prompts.load(prompt or format.prompt)
    except ValueError:
        return None
    return found.follow if found.digest == format.prompt_digest else None


def _short(format: Format, name: str) -> str:
    text = repr(getattr(format, name))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _field(name: str) -> str:
    """What of `format` in a recipe sets this."""
    return "prompt" if name in ("system_prompt", "user_template") else name
