"""score: outcomes, average score and rewards of completions in a file, from any model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import JsonOption, print_json
from pipeline.cli.show.tables import outcome_table, show
from pipeline.cli.show.terminal import write
from pipeline.errors import Failed
from pipeline.launch.local import Launcher
from pipeline.recipe.recipe import problem as settings_of
from pipeline.run import inspections
from stages.errors import BadInput

Name = Annotated[
    str,
    typer.Argument(metavar="PROBLEM", help="A built-in problem's name, or the path of a .py file.", show_default=False),
]
Rows = Annotated[
    Path,
    typer.Option(
        "--rows", metavar="FILE", help="Rows, a JSON object a line, as the problem reads them.", show_default=False
    ),
]
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
    typer.Option("--set", metavar="FIELD=VALUE", help="A setting of the problem, such as form=compact. May be given "
                                                      "again.", show_default=False),
]  # fmt: skip


def score(name: Name, rows: Rows, completions: Completions, overrides: Set = None, json: JsonOption = False) -> None:
    """Judge completions: outcomes, average score and rewards, with intervals. Needs no model. Ends with 1 where none
    could be judged."""
    for file in (rows, completions, *([Path(name)] if name.endswith(".py") else [])):
        if not file.is_file():
            raise BadInput(f"{file} is not there, or no regular file; name one on disk")
    settings = settings_of(name, overrides or ())
    with Launcher(preload=False) as launcher:
        found = inspections.score(settings.model_dump(mode="json"), rows, completions, launcher)
    if json:
        print_json(found)
    else:
        _print(found, built_in="name" in settings.model_dump())
    _refuse_unjudged(found)


def _print(found: dict[str, Any], built_in: bool) -> None:
    show(outcome_table(found["outcomes"], found["outcome_intervals"]))
    failed = sum(found["failures"].values())
    note = f"; {failed} of {found['completions']} completions could not be judged and count as 0" if failed else ""
    if found["unscored"]:
        note += f"; {found['unscored']} of {found['rows']} rows have no score and are left out"
    rows = found["rows"] - found["unscored"]
    if found["average"] is None:
        write(f"average score - (no row has a score{note})")
    else:
        between = " - ".join(f"{100 * end:.1f}" for end in found["interval"])
        write(f"average score {100 * found['average']:.2f} (95 % {between}, over {rows} rows{note})")
    rewards = ", ".join(f"{name} {_x100(value)}" for name, value in found["rewards"].items())
    write(f"reward {_x100(found['reward'])} {_scale(found['weights'], built_in)}: {rewards}")
    if failed:
        counts = ", ".join(f"{failure} {count}" for failure, count in found["failures"].items())
        write(f"not judged: {counts}; the first said: {found['first_failure']}")


def _scale(weights: dict[str, float], built_in: bool) -> str:
    """What the reward x 100 is of. Only the components of a built-in problem are known to be 0..1."""
    return (
        f"of {100 * sum(max(0.0, weight) for weight in weights.values()):.4g}" if built_in else "(weighted sum x 100)"
    )


def _refuse_unjudged(found: dict[str, Any]) -> None:
    """Raise Failed where the numbers say nothing of the completions, because none was judged."""
    if sum(found["failures"].values()) == found["completions"]:
        raise Failed(
            f"score: none of the {found['completions']} completions could be judged; the first said: "
            f"{found['first_failure']}; fix it and run again"
        )


def _x100(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
