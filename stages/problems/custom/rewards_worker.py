"""TRL-style rewards, in the worker process: functions of whole batches, by TRL's names or from a user's file.

They are called as GRPOTrainer calls them: `prompts`, `completions` (both as messages), `completion_ids`, every column
of the rows as a list, `trainer_state` (None here), `log_extra` and `log_metric` (which drop what they are given); the
answer column also comes as `solution`. The stage's side is `stages.problems.custom.dataset`.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable
from decimal import Decimal
from functools import wraps
from pathlib import Path
from typing import Any

from stages.errors import CallFailed, CodeRefused
from stages.guard.user_process import Calls, settled
from stages.problems.custom.python_file_worker import function, import_file, reward
from stages.problems.custom.settings import ALIASES, READ_BY_MATH_VERIFY, SHORT
from stages.problems.custom.user_modules import UserModules

Reward = Callable[..., Any]
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _drop(*_: Any, **__: Any) -> None:
    """Ignore a reward's own log entries; switchback logs every component itself."""


ASKED = ("prompts", "completions", "completion_ids")
TOLD = {"trainer_state": None, "log_extra": _drop, "log_metric": _drop}
GIVEN = (*ASKED, *TOLD)
"""Arguments of every reward, besides the columns."""


def load(spec: dict[str, Any]) -> tuple[dict[str, Any], Calls]:
    """Import what the spec's `rewards` name. Raises CodeRefused."""
    modules = UserModules(spec["files"])
    functions = {one["component"]: _load(one, modules) for one in spec["rewards"]}
    calls: Calls = {"judge": modules.watched(spec["name"], lambda asked: _judge(functions, asked))}
    return {"needs": {name: _needs(found) for name, found in functions.items()}}, calls


def _needs(found: Reward) -> list[str]:
    """The columns without which it cannot be called."""
    return [
        name
        for name, taken in inspect.signature(found).parameters.items()
        if taken.default is taken.empty and taken.kind in NAMED and name not in GIVEN
    ]


def _load(one: dict[str, Any], modules: UserModules) -> Reward:
    if one["path"] is None:
        return _of_trl(one["name"], one["arguments"])
    name = Path(one["path"]).name
    found = function(import_file(modules, one, name), name, one["component"])
    if not any(taken.kind is taken.VAR_KEYWORD for taken in inspect.signature(found).parameters.values()):
        raise CodeRefused(
            f"{name}: {one['component']}{inspect.signature(found)} takes no **kwargs, as every TRL reward must; add "
            "them"
        )
    return found


def as_text(value: Any) -> Any:
    """A reference answer as TRL's rewards take it, which is text: a number in plain digits, and a list or mapping as
    JSON. None stays None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return json.dumps(value, ensure_ascii=False)
    return format(Decimal(repr(value)), "f")


def _given_text(found: Reward) -> Reward:
    """One of TRL's, with `solution` as text. Only text is parsed there: a number would be None for every completion."""

    @wraps(found)
    def called(*, solution: list[Any] | None = None, **given: Any) -> Any:
        return found(**given, **({} if solution is None else {"solution": [as_text(value) for value in solution]}))

    return called


def _of_trl(name: str, arguments: dict[str, Any]) -> Reward:
    import trl.rewards

    theirs = ALIASES.get(name, name)
    if SHORT.get(theirs) in READ_BY_MATH_VERIFY and not importlib.util.find_spec("math_verify"):
        raise CodeRefused(
            f"problem.rewards: {name} needs math-verify (found none, expected the extra math). Fix: pip install "
            f"'math-verify>=0.9,<1'"
        )
    found = getattr(trl.rewards, theirs)
    if not theirs.startswith("get_"):
        if arguments:
            raise CodeRefused(f"problem.rewards: {name} takes no arguments; remove them")
        return _given_text(found)
    try:
        inspect.signature(found).bind(**arguments)
        return _given_text(found(**arguments))
    except (TypeError, ValueError) as error:
        raise CodeRefused(
            f"problem.rewards: {name} of TRL is {theirs}{inspect.signature(found)}, but was given {arguments}: {error}"
        ) from None


def _judge(functions: dict[str, Reward], asked: dict[str, Any]) -> list[dict[str, float | None]]:
    """{component: value} of each completion."""
    values = {name: _called(name, found, asked) for name, found in functions.items()}
    return [{name: values[name][i] for name in functions} for i in range(len(asked["completions"]))]


def _called(name: str, found: Reward, asked: dict[str, Any]) -> list[float | None]:
    given = {key: asked[key] for key in ASKED}
    values = settled(found(**asked["columns"], **given, **TOLD))
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)):
        raise CallFailed(
            "wrong_length", f"{name} returned {values!r:.80}, expected a list of {len(given['completions'])} numbers"
        )
    if len(values) != len(given["completions"]):
        raise CallFailed(
            "wrong_length", f"{name} returned {len(values)} rewards for {len(given['completions'])} completions"
        )
    return [reward(value, name) for value in values]
