"""Options and printing that every command shares. Imports no recipe: `ls` and its like start faster without."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.show.terminal import write
from pipeline.registry import Registry
from stages.config import expanded
from stages.errors import BadInput

if TYPE_CHECKING:
    from pipeline.plan.plan import Planned
    from pipeline.recipe.recipe import Recipe

REGISTRY = "SWITCHBACK_REGISTRY"


RecipeArgument = Annotated[Path, typer.Argument(help="Recipe file.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Override a field, such as stages.rl1.kl.beta=0.01. May be given again.",
        show_default=False,
    ),
]
RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry",
        help=f"Registry: a directory, or a URL of an object store. Default: the recipe's, {REGISTRY}, ./registry.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def open_registry(option: str | None, recipe: Recipe | None = None) -> Registry:
    """--registry, the recipe's, the environment's, ./registry: the first that is given. Relative paths count from the
    working directory."""
    if option:
        return Registry(_path("--registry", option))
    if recipe and recipe.registry:
        return Registry(recipe.registry)
    return Registry(_path(REGISTRY, os.environ.get(REGISTRY) or "registry"))


def _path(where: str, path: str) -> str:
    """A path that no recipe holds, with `~` expanded; a shell leaves it in `--registry=~/runs`. Raises BadInput."""
    try:
        return expanded(path)
    except ValueError as error:
        raise BadInput(f"{where}: {error}") from None


def print_json(content: Any) -> None:
    """Indented, for people and programs."""
    write(json.dumps(content, indent=2))


def open_plan(
    recipe: Path, overrides: list[str] | None, registry: str | None
) -> tuple[Recipe, Registry, list[Planned]]:
    """The recipe, its registry, and what a run of all stages would do. Raises BadInput for a recipe that cannot be
    run."""
    from pipeline.plan import plan as planning
    from pipeline.recipe import checks
    from pipeline.recipe.recipe import load

    loaded = load(recipe, overrides or ())
    checks.check(loaded)
    place = open_registry(registry, loaded)
    return loaded, place, planning.plan(loaded, place)
