"""What a user may set, and which part of it decides the result.

Every field of every Config is marked. *Identity* fields say what is computed and are hashed into the step's key;
*execution* fields say how (names, places, processes) and are not: changing one re-runs nothing. `resolved` fields are
identity too, but are hashed as what they stand for, which the plan works out: an input's key, a range of rows, a
Format."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    model_validator,
)

FromList = Strict(False)
"""Lets a tuple be written as the list it is in YAML and JSON."""
WORD, LIST, MAPPING = Tag("[word]"), Tag("[list]"), Tag("[mapping]")
"""Marks of what a setting may be, where that is one of two: it is judged as what was given, so that one thing is said
about it and not one for each. The brackets keep a mark out of the field's path in errors."""


def _shape(value: Any) -> str:
    if isinstance(value, (dict, BaseModel)):
        return MAPPING.tag
    return LIST.tag if isinstance(value, (list, tuple)) else WORD.tag


WordOrMapping = Discriminator(lambda value: MAPPING.tag if _shape(value) == MAPPING.tag else WORD.tag)
WordOrList = Discriminator(lambda value: LIST.tag if _shape(value) == LIST.tag else WORD.tag)
PART, IF_SET = "part", "hashed_if_set"
"""Keys of a field's marks in its JSON schema, so that `switchback schema` shows them."""


class Frozen(BaseModel):
    """Immutable, and strict about names: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Config(Frozen):
    """A group of settings, every one of them marked identity, resolved or execution. Strict about types: "3" is no
    number, and true is not 1."""

    model_config = ConfigDict(strict=True)

    LATER: ClassVar[tuple[str, ...]] = ()
    """Fields of a later version. An empty one, as recipes of earlier versions hold it, is dropped."""

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, data: Any) -> Any:
        """Name the nearest known field where a name is not known."""
        if not isinstance(data, dict):
            return data
        for name in cls.LATER:
            if not _says_nothing(data.get(name)):
                raise ValueError(f"{name} comes in a later version of switchback; remove it to run this recipe")
        known = list(cls.model_fields)
        data = {name: value for name, value in data.items() if name not in cls.LATER}
        for name in data:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
                hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(known)}"
                raise ValueError(f"unknown key {name!r}; {hint}")
        return data


def _says_nothing(value: Any) -> bool:
    """Whether a field of a later version is left at its off value: null, or a mapping of nulls."""
    return value is None or (isinstance(value, dict) and all(inner is None for inner in value.values()))


def identity(default: Any = ..., **constraints: Any) -> Any:
    """A field that decides the result; hashed as written."""
    return Field(default, json_schema_extra={PART: "identity"}, **constraints)


def identity_if_set(default: Any, **constraints: Any) -> Any:
    """A field that decides the result, and came after recipes without it had been run: hashed as written, but not at
    its default, so that those keep their keys."""
    return Field(default, json_schema_extra={PART: "identity", IF_SET: True}, **constraints)


def resolved(default: Any = ..., **constraints: Any) -> Any:
    """A field that decides the result; hashed as what it stands for."""
    return Field(default, json_schema_extra={PART: "resolved"}, **constraints)


def execution(default: Any = ..., **constraints: Any) -> Any:
    """A field that says how, not what; recorded and never hashed."""
    return Field(default, json_schema_extra={PART: "execution"}, **constraints)


def part_of(config: type[BaseModel], name: str) -> str | None:
    """The mark of a field; None when it has none, which a test refuses."""
    extra = config.model_fields[name].json_schema_extra
    return str(extra[PART]) if isinstance(extra, dict) and PART in extra else None


def identity_values(config: BaseModel) -> dict[str, Any]:
    """The identity fields as JSON values, those of nested Configs included."""
    return {
        name: _plain(getattr(config, name))
        for name in type(config).model_fields
        if part_of(type(config), name) == "identity" and not _at_its_silent_default(config, name)
    }


def _at_its_silent_default(config: BaseModel, name: str) -> bool:
    """Whether an `identity_if_set` field is not set."""
    field = type(config).model_fields[name]
    extra = field.json_schema_extra
    return isinstance(extra, dict) and IF_SET in extra and getattr(config, name) == field.default


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return identity_values(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(value: Any) -> Any:
    """Turn 90s, 10m or 1.5h into seconds; anything else is left as it is."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value.strip()) if isinstance(value, str) else None
    if match is None:
        return value
    return float(match[1]) * UNITS[match[2]]


def _duration(value: Any) -> Any:
    found = seconds(value)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise ValueError(f"found {value!r:.60}, expected seconds, or a duration such as 90s, 10m or 2h")
    return found


Seconds = Annotated[float, BeforeValidator(_duration)]
"""A duration: a number of seconds, or a number with s, m, h or d."""

VARIABLE = re.compile(r"\$\{|^\$\w")
"""A shell's variable, which would become the name of a directory."""


def expanded(path: str) -> str:
    """A path as a user writes it, with `~` expanded. Raises ValueError for a variable, and for a home that is not
    there."""
    if "\0" in path:
        raise ValueError(f"a path holds no NUL (found {path!r:.200}). Fix: remove it")
    if VARIABLE.search(path):
        raise ValueError(f"variables are not expanded (found {path!r:.200}, expected a path). Fix: write the path out")
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"there is no such home (found {path!r:.200}, expected a path). Fix: write it out") from None


UserPath = Annotated[str, AfterValidator(expanded)]
"""A path, or a name where either is possible."""


class FormatSettings(Config):
    """How text is rendered, declared once for SFT, RL, sampling, evaluation and serving. A stage inherits what it does
    not set from its policy."""

    prompt: UserPath | None = resolved(None)
    """Name of a file in prompts/, or the path of an .md file; identified by its content. Off: inherited; `plain` where
    there is nothing to inherit."""
    response_prefix: str | None = resolved(None)
    """What every completion starts with. "" is a prefix too: none. Off: inherited; "" where there is nothing to
    inherit."""
    per_row: str | None = resolved(None)
    """Column that gives each row a prefix of its own, in place of response_prefix. Off: one prefix for all."""
    chat_template: UserPath | None = resolved(None)
    """A jinja file to render with, in place of the policy's own chat template; identified by its content. Off: the
    policy's."""

    @model_validator(mode="after")
    def _one_kind_of_prefix(self) -> FormatSettings:
        if self.per_row and self.response_prefix is not None:
            raise ValueError("per_row gives each row a prefix of its own, so response_prefix has no use; remove one")
        return self


RESERVED_NAMES = ("base", "policy", "demonstrations", "evaluate")


class StageConfig(Config):
    """What every stage of a recipe has."""

    LATER: ClassVar[tuple[str, ...]] = ("gate",)

    name: str = execution(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")
    """What the stage is called; other stages refer to it, and its artifacts start with it. Renaming it re-runs
    nothing."""
    policy: str = resolved()
    """The policy to start from: `base`, or the name of an earlier stage that makes one."""
    replicate: int = resolved(0, ge=0, lt=100_000)
    """Makes the same thing again with another seed; `--fresh` raises it."""
    deadline: Seconds | None = execution(None, gt=0)
    """Seconds (or "90m", "2h") after which the stage is killed and fails. Off: none, or the recipe's."""
    format: FormatSettings | None = resolved(None)
    """Dress text in another way than the policy was trained with, from here on. Off: as its policy."""
