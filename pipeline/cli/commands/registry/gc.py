"""gc: what nobody needs any more, and its removal."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape

from pipeline.cli.options import JsonOption, RegistryOption, open_registry, print_json
from pipeline.cli.show.tables import show, table
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
    found = (clean if apply else survey)(place, work_root(place), age(grace))
    if json:
        print_json({"applied": apply, "frees": found.frees, **found.model_dump(mode="json")})
    else:
        _print(found, apply)


def age(text: str) -> timedelta:
    """A time such as 30m, 24h, 7d, or seconds. Raises BadInput on anything else."""
    found = seconds(f"{text}s" if text.isascii() and text.isdigit() else text)
    if not isinstance(found, float) or found > LONGEST:
        raise BadInput(f"--grace: found {text!r}, expected a time such as 30m, 24h or 7d")
    return timedelta(seconds=found)


def _print(found: Survey, applied: bool) -> None:
    made = table("what", "name", "frees", "why", right=("frees",))
    for one in found.removals:
        made.add_row(one.what, escape(one.name), "?" if one.bytes is None else decimal(one.bytes), escape(one.why))
    if found.removals:
        show(made)
    print(f"{len(found.kept)} artifacts stay; --json says why each")
    if applied:
        print(f"freed {decimal(found.frees)}")
    else:
        print(f"would free {decimal(found.frees)}; nothing was removed, --apply does it")
