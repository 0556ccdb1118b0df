"""rows: the rows of a split, a JSON object a line."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pipeline.cli.options import RecipeArgument, SetOption
from pipeline.launch.local import Launcher
from pipeline.recipe import checks
from pipeline.recipe.recipe import load
from pipeline.run import inspections
from stages.errors import BadInput
from stages.inspections.rows import RowsConfig
from stages.job import SPLITS, parse_rows
from stages.problems.catalog import PROBLEMS
from stages.visible import visible

Split = Annotated[
    str,
    typer.Option(
        "--split",
        metavar="SPLIT",
        help=f"{', '.join(SPLITS)}, or a range of one, such as train[0:1000], as stages name it.",
    ),
]


def rows(recipe: RecipeArgument, split: Split = "train", overrides: SetOption = None) -> None:
    """Write the rows of a split to stdout, a JSON object a line, as the recipe's stages and evaluations see them."""
    loaded = load(recipe, overrides or ())
    checks.check(loaded)
    config = _asked(split, loaded.seed)
    settings = loaded.problem.model_dump(mode="json")
    if config.stop is None and settings.get("name") in PROBLEMS:
        raise BadInput(
            f"--split {split}: {settings['name']} makes as many rows as it is asked for; name a range, such as "
            f"{split}[0:1000]"
        )
    with Launcher(preload=False) as launcher:
        for line in inspections.rows(settings, config, loaded.seed, launcher):
            # UTF-8 in every locale, as files of rows are
            sys.stdout.buffer.write((visible(line) if sys.stdout.isatty() else line).encode())
    sys.stdout.buffer.flush()


def _asked(split: str, seed: int) -> RowsConfig:
    """A split, or a range of it. Raises BadInput."""
    if split in SPLITS:
        return RowsConfig(split=split)
    try:
        found = parse_rows(split, seed)
    except BadInput as error:
        raise BadInput(f"--split: {error}") from None
    return RowsConfig(split=found.split, start=found.start, stop=found.stop)
