"""A user's problem file, in the worker process: what it must hold, and the calls that it answers.

`load` imports the file and looks at its functions; every complaint is one line with file and line. The stage's side is
`stages.problems.custom.python_file`.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from stages.errors import CallFailed, CodeRefused
from stages.guard.user_process import Calls, describe_error, settled
from stages.job import SPLITS, Split
from stages.problems.base import LARGEST_WEIGHT, folded, stream
from stages.problems.custom.row import OwnRow, own_row
from stages.problems.custom.user_modules import UserModules

NEEDED = {"rows": ("rng",), "rewards": ("row", "completion"), "score": ("row", "completion")}
OPTIONAL = {
    "passed": ("score",),
    "demonstration": ("row", "rng"),
    "baselines": ("row", "rng"),
    "well_formed": ("row", "completion"),
}
"""Function -> its arguments."""
LARGEST = 1e9
"""Of a reward, so that its square fits into float32, in which training sums."""
AGAIN = 100_000
"""Rows in a row that were there already, after which an endless `rows` counts as exhausted."""


def load(spec: dict[str, Any]) -> tuple[dict[str, Any], Calls]:
    """Import the file that the spec names. Raises CodeRefused."""
    modules = UserModules(spec["files"])
    module = import_file(modules, spec, spec["name"])
    weights = _weights(module, spec["name"])
    for name, takes in NEEDED.items():
        _look_at(module, spec["name"], name, takes, needed=True)
    for name, takes in OPTIONAL.items():
        _look_at(module, spec["name"], name, takes, needed=False)
    _is_no_async(module, spec["name"])
    about = {"weights": weights, "has": [name for name in OPTIONAL if hasattr(module, name)]}
    calls: Calls = {
        "rows": lambda asked: _rows(module, spec["name"], asked),
        "judge": lambda asked: _judge(module, list(weights), asked),
        "passed": lambda score: truth(settled(module.passed(score)), "passed"),
        "demonstration": lambda asked: _text(
            settled(module.demonstration(asked["row"], random.Random(asked["seed"]))), "demonstration"
        ),
        "baselines": lambda asked: _baselines(settled(module.baselines(asked["row"], random.Random(asked["seed"])))),
    }
    return about, {call: modules.watched(spec["name"], function) for call, function in calls.items()}


def import_file(modules: UserModules, place: Mapping[str, Any], name: str) -> ModuleType:
    """The module of a file, which may import other files of its folder. `place` has the user's `path`, and the `copy`
    that is read. Raises CodeRefused."""
    path, copy = place["path"], place["copy"]
    if not Path(copy).is_file():
        raise CodeRefused(f"{name} is not there")
    if not path.endswith(".py"):
        raise CodeRefused(f"{name}: expected a Python file, whose name ends in .py")
    module = modules.add(path, copy)
    try:
        module.__spec__.loader.exec_module(module)  # pyright: ignore[reportOptionalMemberAccess]
    except SyntaxError as error:
        raise CodeRefused(f"{name}:{error.lineno}: {type(error).__name__}: {error.msg}; fix it and run again") from None
    except Exception as error:
        raise CodeRefused(f"{name}: its import failed: {describe_error(error)}; fix it and run again") from None
    modules.refuse_unknown(name)
    return module


def function(module: ModuleType, name: str, wanted: str) -> Callable[..., Any]:
    """A function of the file. Raises CodeRefused, with the name that was probably meant."""
    value = getattr(module, wanted, None)
    if value is None:
        close = difflib.get_close_matches(wanted, [known for known in vars(module) if known[:1] != "_"], n=1)
        fix = f"write def {wanted}"
        if close:
            fix = f"did you mean {close[0]} ({name}:{_line(getattr(module, close[0]))})?"
        raise CodeRefused(f"{name} has no function {wanted}; {fix}")
    if not callable(value):
        raise CodeRefused(f"{name}: {wanted} is {type(value).__name__}, expected a function")
    return value


def _look_at(module: ModuleType, name: str, wanted: str, takes: tuple[str, ...], needed: bool) -> None:
    if not needed and not hasattr(module, wanted):
        return
    found = function(module, name, wanted)
    try:
        inspect.signature(found).bind(*takes)
    except TypeError:
        raise CodeRefused(
            f"{name}:{_line(found)}: {wanted}{inspect.signature(found)} cannot be called with ({', '.join(takes)}); "
            "give it these arguments"
        ) from None


def _is_no_async(module: ModuleType, name: str) -> None:
    if inspect.isasyncgenfunction(module.rows) or inspect.iscoroutinefunction(module.rows):
        raise CodeRefused(
            f"{name}:{_line(module.rows)}: rows is async, expected a plain function; write def rows(rng) with yield"
        )


def _line(found: Any) -> int | str:
    code = getattr(found, "__code__", None)
    return code.co_firstlineno if code else "?"


def _are_weights(weights: dict[Any, Any]) -> bool:
    return all(isinstance(key, str) and _is_number(value) for key, value in weights.items())


def _weights(module: ModuleType, name: str) -> dict[str, float]:
    weights = getattr(module, "REWARDS", None)
    if not isinstance(weights, dict) or not weights or not _are_weights(weights):
        raise CodeRefused(
            f"{name}: REWARDS is {weights!r:.80}, expected component: weight, such as REWARDS = {{'accuracy': 1.0}}"
        )
    for key, value in cast("dict[str, float]", weights).items():
        if not key.isprintable() or abs(value) > LARGEST_WEIGHT:
            raise CodeRefused(
                f"{name}: REWARDS has {key!r:.80}: {value!r:.80}, expected a name and a weight of at most "
                f"{LARGEST_WEIGHT:g}"
            )
    return {key: float(value) for key, value in cast("dict[str, float]", weights).items()}


def _rows(module: ModuleType, name: str, asked: dict[str, Any]) -> dict[str, Any]:
    """{"rows"} start..stop of a split, or {"counts", "prompts"} of all splits where there are fewer."""
    split, start, stop = cast(Split, asked["split"]), asked["start"], asked["stop"]
    found: list[dict[str, Any]] = []
    for i, row in enumerate(stream(lambda rng: _made(module, name, rng), split, asked["seed"])):
        if i >= start:
            found.append(dict(row.values))
        if len(found) == stop - start:
            return {"rows": found}
    rows = {row.id: row for row in _made(module, name, random.Random(split))}.values()
    splits = Counter(row.split for row in rows)
    return {"counts": {each: splits[each] for each in SPLITS}, "prompts": len({folded(row.prompt) for row in rows})}


def _made(module: ModuleType, name: str, rng: random.Random) -> Iterator[OwnRow]:
    """The rows that `rows` yields, until it is exhausted. Raises CallFailed for an invalid row."""
    seen: set[str] = set()
    again = 0
    rows = module.rows(rng)
    if not isinstance(rows, Iterable):
        raise CallFailed("no_row", f"rows returned {rows!r:.80}, expected dicts, one a row; yield them")
    for i, columns in enumerate(rows):
        row = checked_row(columns, f"{name}: row {i} of rows(rng)")
        again = again + 1 if row.id in seen else 0
        seen.add(row.id)
        if again == AGAIN:
            return
        yield row


def checked_row(columns: Any, where: str) -> OwnRow:
    """A row of plain values. Raises CallFailed."""
    if not isinstance(columns, dict) or not isinstance(columns.get("prompt"), str):
        raise CallFailed("no_row", f"{where}: found {columns!r:.80}, expected a dict with a text under 'prompt'")
    try:
        # encoded, so that half of a surrogate pair, which no tokenizer takes, is found here
        return own_row(json.loads(json.dumps(columns, allow_nan=False, ensure_ascii=False).encode()))
    except (TypeError, ValueError) as error:
        raise CallFailed("no_row", f"{where}: {error}; a row holds text, numbers, lists and dicts only") from None


def _judge(module: ModuleType, components: list[str], asked: dict[str, Any]) -> dict[str, Any]:
    row, completion = asked["row"], asked["completion"]
    rewards = settled(module.rewards(dict(row), completion))
    if not isinstance(rewards, dict):
        raise CallFailed("not_a_number", f"rewards returned {rewards!r:.80}, expected {{component: value}}")
    if set(rewards) != set(components):
        raise CallFailed(
            "wrong_length",
            f"rewards returned {sorted(map(str, rewards))}, expected the components of REWARDS, {components}",
        )
    score = reward(settled(module.score(dict(row), completion)), "score")
    if score is not None and not 0 <= score <= 1:
        raise CallFailed("out_of_range", f"score returned {score}, expected 0..1, or None where there is no score")
    well_formed, passed = True, score is not None and score >= 1
    if hasattr(module, "well_formed"):
        well_formed = settled(module.well_formed(dict(row), completion))
    if hasattr(module, "passed") and score is not None:
        passed = settled(module.passed(score))
    return {
        "passed": truth(passed, "passed"),
        "rewards": {name: reward(rewards[name], f"rewards: {name}") for name in components},
        "score": score,
        "well_formed": truth(well_formed, "well_formed"),
    }


def reward(value: Any, what: str) -> float | None:
    """A reward, or None where it does not apply. Raises CallFailed for anything else."""
    return None if value is None else number(value, what)


def number(value: Any, what: str) -> float:
    """A finite number. Raises CallFailed for anything else."""
    if not _is_number(value):
        raise CallFailed("not_a_number", f"{what} returned {value!r:.80}, expected a finite number")
    if abs(value) > LARGEST:
        raise CallFailed("out_of_range", f"{what} returned {value!r:.80}, expected at most {LARGEST:g}")
    return float(value)


def truth(value: Any, what: str) -> bool:
    """Yes or no, numpy's too. Raises CallFailed for anything else: "no" would mean yes."""
    plain = value
    if type(value).__module__ == "numpy" and getattr(value, "size", 0) == 1:
        plain = value.item()
    if not isinstance(plain, bool):
        raise CallFailed("not_a_bool", f"{what} returned {value!r:.80}, expected True or False")
    return plain


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _baselines(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise CallFailed("no_text", f"baselines returned {value!r:.80}, expected {{name: completion}}, gold the best")
    return {str(name): _text(text, f"baselines: {name}") for name, text in value.items()}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise CallFailed("no_text", f"{what} returned {value!r:.80}, expected text")
    return value
