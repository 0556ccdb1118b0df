"""alias, promote, pin, unpin, pins: names that move from artifact to artifact, and protection from clean-up."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import JsonOption, RegistryOption, open_registry, print_json
from pipeline.cli.show.tables import show, table
from pipeline.cli.show.terminal import write
from pipeline.registry import aliases
from pipeline.registry import pins as pinned
from pipeline.results import promote as promotion

Alias = Annotated[str, typer.Argument(help="An alias, such as prod.", show_default=False)]
Id = Annotated[str, typer.Argument(help="An artifact, or an alias.", show_default=False)]
Expect = Annotated[
    int | None,
    typer.Option(
        "--expect", min=0, help="Move only from this entry of its history; 0: it never was.", show_default=False
    ),
]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; it is remembered.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Move even to what is worse, or cannot be compared; remembered.")]

alias = typer.Typer(help="Names that move from artifact to artifact, and remember each move.")


@alias.command(name="set")
def set_to(alias: Alias, id: Id, expect: Expect = None, reason: Reason = "", registry: RegistryOption = None) -> None:
    """Point an alias at an artifact."""
    place = open_registry(registry)
    _print(alias, aliases.set_to(place, alias, aliases.resolve(place, id), expect, reason))


@alias.command()
def rm(alias: Alias, reason: Reason = "", registry: RegistryOption = None) -> None:
    """Take an alias away; its history stays."""
    _print(alias, aliases.remove(open_registry(registry), alias, reason))


@alias.command()
def ls(registry: RegistryOption = None, json: JsonOption = False) -> None:
    """List aliases and where they point."""
    moves = aliases.aliases(open_registry(registry), strict=False)
    if json:
        print_json([{"alias": alias, **_as_json(move)} for alias, move in moves.items()])
        return
    rows = table("alias", "artifact", "n", "who", "when", "why", right=("n",))
    for alias, move in moves.items():
        rows.add_row(alias, *_row(move))
    show(rows)


@alias.command()
def history(alias: Alias, registry: RegistryOption = None, json: JsonOption = False) -> None:
    """Show every move of an alias, oldest first."""
    moves = aliases.history(open_registry(registry), alias)
    if json:
        print_json([_as_json(move) for move in moves])
        return
    rows = table("artifact", "n", "who", "when", "why", right=("n",))
    for move in moves:
        rows.add_row(*_row(move))
    show(rows)


def promote(id: Id, alias: Alias, reason: Reason = "", force: Force = False, registry: RegistryOption = None) -> None:
    """Point an alias at a policy, unless it is credibly worse on validation rows than the one it points at (exit 3)."""
    place = open_registry(registry)
    _print(alias, promotion.promote(place, aliases.resolve(place, id), alias, reason, force))


def pin(id: Id, reason: Reason = "", registry: RegistryOption = None) -> None:
    """Keep an artifact, and what it was made from, from being cleaned."""
    place = open_registry(registry)
    artifact = aliases.resolve(place, id)
    pinned.keep(place, artifact, reason)
    write(f"{artifact.id} is pinned")


def unpin(id: Id, registry: RegistryOption = None) -> None:
    """Let go of an artifact that was pinned."""
    place = open_registry(registry)
    artifact = aliases.look_up(place, id)
    artifact_id = artifact.id if artifact else id  # one that is gone may still have a pin
    pinned.let_go(place, artifact_id)
    write(f"{artifact_id} is not pinned any more")


def pins(registry: RegistryOption = None, json: JsonOption = False) -> None:
    """List who holds which artifact: users, and runs that are using it."""
    found = pinned.pins(open_registry(registry), strict=False)
    if json:
        print_json([{"id": artifact_id, **pin.model_dump(mode="json")} for artifact_id, pin in found])
        return
    rows = table("artifact", "owner", "when", "why")
    for artifact_id, pin in found:
        rows.add_row(artifact_id, pin.owner, f"{pin.at:%Y-%m-%d %H:%M:%S}", pin.reason)
    show(rows)


def _print(alias: str, move: aliases.Move) -> None:
    target = f"points at {move.artifact}" if move.artifact else "points nowhere"
    write(f"{alias} {target} ({move.number}){_evidence(move)}")


def _row(move: aliases.Move) -> tuple[str, ...]:
    why = f"{move.reason}{_evidence(move)}".strip(" ;")
    return (move.artifact or "-", str(move.number), move.actor, move.at[:19].replace("T", " "), why)


def _evidence(move: aliases.Move) -> str:
    """The comparison behind a move, or the reason why there is none; "" for a move without evidence."""
    forced = "; forced" if move.evidence.get("forced") else ""
    if "difference" in move.evidence:
        measured = {name: value for name, value in move.evidence.items() if name != "forced"}
        return f"{forced}; {promotion.Comparison.model_validate(measured)}"
    if "why" in move.evidence:
        return f"{forced}; {move.evidence['why']}"
    return forced


def _as_json(move: aliases.Move) -> dict[str, object]:
    return {"n": move.number, **move.model_dump(mode="json")}
