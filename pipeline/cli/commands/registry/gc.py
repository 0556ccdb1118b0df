"""gc: list or remove unneeded artifacts and leftovers."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer
from rich.filesize import decimal

from pipeline.cli.options import JsonOption, RegistryOption, open_registry, print_json
from pipeline.cli.show.tables import show, table
from pipeline.cli.show.terminal import write
from pipeline.registry.cleanup.gc import Survey, clean, survey
from pipeline.registry.workdir import work_root
from stages.config import seconds
from stages.errors import BadInput

LONGEST = 100 * 365 * 86400.0
"""Seconds."""
Apply = Annotated[bool, typer.Option("--apply", help="Remove it; without this it is only shown.")]
Grace = Annotated[
    str, typer.Option("--grace", metavar="TIME", help="Keep what is younger, such as 30m, 24h, 7d; 0: nothing.")
]


def gc(apply: Apply = False, grace: Grace = "24h", registry: RegistryOption = None, json: JsonOption = False) -> None:
    """Show, or remove, what no alias, pin, live run or kept artifact needs, and resume checkpoints of published
    stages."""
    place = open_registry(registry)
    place.must_exist()
    collect = clean if apply else survey
    collected = collect(place, work_root(place), age(grace))
    if json:
        print_json({"applied": apply, "frees": collected.frees, **collected.model_dump(mode="json")})
    else:
        _print(collected, apply)


def age(text: str) -> timedelta:
    """A time such as 30m, 24h, 7d, or seconds. Raises BadInput on anything else."""
    is_number = text.isascii() and text.isdigit()
    grace = seconds(f"{text}s" if is_number else text)
    if not isinstance(grace, float) or grace > LONGEST:
        raise BadInput(f"--grace: found {text!r}, expected a time such as 30m, 24h or 7d")
    return timedelta(seconds=grace)


def _print(collected: Survey, applied: bool) -> None:
    rows = table("what", "name", "frees", "why", right=("frees",))
    for removal in collected.removals:
        frees = "?" if removal.bytes is None else decimal(removal.bytes)
        rows.add_row(removal.what, removal.name, frees, removal.why)
    if collected.removals:
        show(rows)
    write(f"{len(collected.kept)} artifacts stay; --json says why each")
    if applied:
        write(f"freed {decimal(collected.frees)}")
    else:
        write(f"would free {decimal(collected.frees)}; nothing was removed, --apply does it")
