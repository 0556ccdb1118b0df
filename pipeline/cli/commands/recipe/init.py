"""init: a starter that runs as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline import starter
from pipeline.cli.show.terminal import write

Directory = Annotated[Path, typer.Argument(help="Where to write; made where it is not there.")]
Problem = Annotated[str, typer.Option("--problem", help=f"One of {', '.join(starter.CHOICES)}.")]


def init(directory: Directory = Path(), problem: Problem = starter.OWN) -> None:
    """Write a starter: a recipe, a problem of your own, a prompt and a tiny model. Nothing is overwritten."""
    for path in starter.write(directory, problem):
        write(f"wrote {path}")
    write("next:")
    if directory != Path():
        write(f"  cd {directory}")
    write("  switchback plan recipe.yaml\n  switchback run recipe.yaml")
