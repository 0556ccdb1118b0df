"""score: what completions in a file are worth, whoever sampled them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import ask
from pipeline.cli.common import JsonOption, print_json
from pipeline.cli.tables import outcome_table, show
from pipeline.launch import Launcher
from pipeline.recipe import problem as settings_of
from stages.job import BadInput

Name = Annotated[
    str,
    typer.Argument(metavar="PROBLEM", help="A built-in problem's name, or the path of a .py file.", show_default=False),
]
Rows = Annotated[
    Path, typer.Option("--rows", metavar="FILE", help="Rows, a JSON object a line, as the problem reads them.", show_default=False)
]  # fmt: skip
Completions = Annotated[
    Path,
    typer.Option(
        "--completions",
        metavar="FILE",
        help='A line {"row": line of the rows, from 0, "completion": text} each.',
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="A setting of the problem, such as form=compact. May be given again.", show_default=False),
]  # fmt: skip


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(score)


def score(name: Name, rows: Rows, completions: Completions, overrides: Set = None, json: JsonOption = False) -> None:
    """Judge completions: outcomes, average score and rewards, with intervals. Needs no model."""
    for file in (rows, completions, *([Path(name)] if name.endswith(".py") else [])):
        if not file.is_file():
            raise BadInput(f"{file} is not there, or no regular file; name one on disk")
    settings = settings_of(name, overrides or ())
    with Launcher(preload=False) as launcher:
        found = ask.score(settings.model_dump(mode="json"), rows, completions, launcher)
    if json:
        print_json(found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    show(outcome_table(found["outcomes"], found["outcome_intervals"]))
    low, high = found["interval"]
    print(
        f"average score {100 * found['average']:.2f} (95 % {100 * low:.1f} - {100 * high:.1f}, over {found['rows']} rows)"
    )
    rewards = ", ".join(f"{name} {_x100(value)}" for name, value in found["rewards"].items())
    print(f"reward {_x100(found['reward'])} of 100: {rewards}")
    if found["failures"]:
        counts = ", ".join(f"{failure} {count}" for failure, count in found["failures"].items())
        print(f"not judged: {counts}; the first said: {found['first_failure']}")


def _x100(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
