"""What pydantic has to say of settings -> one line in our words: where, what was found, what was expected. Positions
become the names of stages."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from stages.config import Config
from stages.kinds import recipe_kinds
from stages.problems.catalog import PROBLEMS

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def nearest(name: str, known: Sequence[str]) -> str:
    """What to add to an error about an unknown name: the one that was meant, else what there is."""
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"; did you mean {close[0]}?"
    return f"; there is {', '.join(known) or 'none'}"


def complaint(error: ValidationError, data: Any) -> str:
    """The first of them in one line, and how many more there are. `data` is what was validated."""
    errors = error.errors(include_url=False)
    errors = [
        one for one in errors if one["type"] != "too_short"
    ] or errors  # a stage that is wrong is not counted as one
    first = errors[0]
    where = _where(first["loc"], data)
    found = first.get("input")
    message = _expected(first)
    if first["type"] == "union_tag_invalid" and first["loc"][:1] == ("problem",):
        name = str(found["name"]) if isinstance(found, dict) else str(found)
        where, message = "problem.name", f"found {name!r}{nearest(name, list(PROBLEMS))}"
    elif first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kind = found.get("kind") if isinstance(found, dict) else found
        where, message = f"{where}.kind", f"found {kind!r}{nearest(str(kind), recipe_kinds())}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return " ".join(f"{f'{where}: ' if where else ''}{message}{more}".split())


WANTED = {
    "tuple_type": "a list",
    "dict_type": "a mapping of names to values",
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "model_attributes_type": "a mapping",
    "too_short": "at least {min_length}",
    "too_long": "at most {max_length}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}
"""Pydantic's name of a complaint -> what was expected, in our words, with the numbers that it names."""


def _expected(error: ErrorDetails) -> str:
    """What was found and what was expected, without pydantic's words for it."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return "is missing"
    if kind in ("value_error", "problem"):
        return error["msg"].removeprefix("Value error, ")
    found, message = _short(error["input"]), error["msg"]
    if kind == "model_type":
        return f"found {found}, expected settings, such as {_example(context['class_name'])}"
    if kind in WANTED:
        return f"found {found}, expected {WANTED[kind].format(**context)}"
    if message.startswith("Input should be "):
        return f"found {found}, expected {message.removeprefix('Input should be ')}"
    return f"found {found}, but {message[0].lower()}{message[1:]}"


def _example(name: str) -> str:
    """The fields that a group of settings needs, or its first where it needs none."""
    fields = next(group for group in _groups(Config) if group.__name__ == name).model_fields
    needed = [field for field, info in fields.items() if info.is_required()]
    return "{" + ", ".join(f"{field}: ..." for field in needed or list(fields)[:1]) + "}"


def _groups(group: type[Config]) -> Iterator[type[Config]]:
    for below in group.__subclasses__():
        yield below
        yield from _groups(below)


def _where(loc: tuple[int | str, ...], data: Any) -> str:
    """("stages", 1, "grpo", "kl") -> "stages.rl1.kl": positions become names, and the kind pydantic adds goes."""
    parts: list[str] = []
    skip = False
    for part in loc:
        if skip:
            skip = False
        elif isinstance(part, int) and parts == ["stages"]:
            stage = data["stages"][part]
            parts.append(str(stage.get("name", part)) if isinstance(stage, dict) else str(part))
            skip = True
        elif isinstance(part, str) and "[" in part:
            continue  # a member of a union, in pydantic's words
        elif parts == ["problem"] and part in ("name", "file", "dataset", *PROBLEMS) and len(loc) > 2:
            continue
        else:
            parts.append(str(part))
    return ".".join(parts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
