"""Tables: scores x 100, a line per thing. They are plain when piped, and without colour under NO_COLOR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from pipeline.cli.show.terminal import console, write
from pipeline.registry import Artifact, Registry
from pipeline.registry.runs import Run
from pipeline.results.summary import RunSummary, StageSummary
from stages.visible import visible

if TYPE_CHECKING:
    from pipeline.plan.plan import Planned

ACTION_STYLE = {"reuse": "green", "run": "yellow", "skip": "dim"}
WIDE, LEFT_OUT = 110, ("kind", "solved", "format")
"""Columns of a terminal that holds a whole line per stage; what a narrower one does without."""
SEVERITY_STYLE = {"stop": "bold red", "warn": "yellow", "note": "dim"}


def show(table: Table) -> None:
    """Print a table."""
    console().print(table)


class _Table(Table):
    """A table that makes its cells visible before it measures them, so that no escape pushes text out of its cell."""

    def add_row(self, *cells: Any, **more: Any) -> None:
        """As rich's."""
        super().add_row(*(visible(cell) if isinstance(cell, str) else cell for cell in cells), **more)


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table; the columns in `right` hold numbers."""
    empty = _Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        is_number = column in right
        empty.add_column(column, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    return empty


def plan_table(planned: Sequence[Planned]) -> Table:
    """A line per step: its name, kind, action and the reason for it."""
    rows = table("step", "kind", "", "why")
    for plan in planned:
        action = Text(plan.action, ACTION_STYLE[plan.action])
        rows.add_row(plan.step.name, plan.step.kind, action, plan.why)
    return rows


def print_artifacts(registry: Registry, artifacts: Sequence[Artifact]) -> None:
    """Print a line per artifact. Rich would need seconds for thousands of them."""
    rows = [
        (artifact.id, artifact.kind, _moment(artifact.created), decimal(artifact.size), registry.location(artifact))
        for artifact in artifacts
    ]
    header = ("id", "kind", "created", "size", "path")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = tuple("─" * width for width in widths)
    write("\n".join(_aligned(row, widths) for row in (header, rule, *rows)))


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    artifact_id, kind, created, size, path = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
    return f"{artifact_id}  {kind}  {created}  {size.strip():>{widths[3]}}  {path}".rstrip()


def artifact_table(registry: Registry, artifact: Artifact) -> Table:
    """One artifact, a line per fact."""
    facts = table("artifact", artifact.id)
    facts.add_row("kind", artifact.kind)
    facts.add_row("path", registry.location(artifact))
    facts.add_row("created", _moment(artifact.created))
    facts.add_row("size", f"{decimal(artifact.size)} in {len(artifact.files)} files")
    for role, source in artifact.inputs.items():
        facts.add_row(role, source.id or source.name)
    for name, value in artifact.metrics.items():
        facts.add_row(name, f"{value:.4g}")
    return facts


def runs_table(runs: Sequence[Run]) -> Table:
    """A line per run."""
    rows = table("run", "recipe", "state", "started", "continues")
    for run in runs:
        rows.add_row(run.run, run.recipe, run.state, _moment(run.started), run.resumes or "-")
    return rows


def run_table(summary: RunSummary) -> Table:
    """A line per stage: held-out score with interval, solved and format share, seconds, place."""
    numbers = ("greedy", "mean", "95 %", "solved", "format", "pass@1", "seconds")
    columns: tuple[str, ...] = ("stage", "kind", *numbers, "artifact")
    shown = columns if console().width >= WIDE else tuple(name for name in columns if name not in LEFT_OUT)
    rows = table(*shown, right=numbers)
    for stage in summary.stages:
        place = stage.artifact or (Path(stage.path).name if stage.path else "-")
        cells = (stage.name, stage.kind, *_scores(stage), _seconds(stage), place)
        rows.add_row(*(cell for name, cell in zip(columns, cells, strict=True) if name in shown))
    return rows


def probe_table(lines: Sequence[dict[str, Any]]) -> Table:
    """A line per policy, prompt and prefix."""
    numbers = ("pass", "95 %", "format", "follows", "95 % ", "tokens")
    rows = table("policy", "prompt", "prefix", *numbers, right=numbers)
    for line in lines:
        follows = ("-", "-")
        if line["follow"] is not None:
            follows = (_x100(line["follow"]), _between(line["follow_interval"]))
        rows.add_row(
            line["policy"],
            line["prompt"],
            repr(line["response_prefix"]),
            _x100(line["pass_rate"]),
            _between(line["interval"]),
            _x100(line["format"]),
            *follows,
            f"{line['tokens']:.1f}",
        )
    return rows


def outcome_table(outcomes: dict[str, int], intervals: dict[str, Sequence[float]]) -> Table:
    """A line per outcome."""
    numbers = ("completions", "share", "95 %")
    rows = table("outcome", *numbers, right=numbers)
    total = sum(outcomes.values())
    for name, count in outcomes.items():
        rows.add_row(name, str(count), _x100(count / total), _between(intervals[name]))
    return rows


def _between(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{_x100(interval[0])} - {_x100(interval[1])}"


def _scores(stage: StageSummary) -> list[str]:
    scores = stage.evaluation
    if scores is None:
        return ["-"] * 6
    shares = (scores.solved, scores.format, scores.pass_at_k.get("1"))
    return [_x100(scores.greedy), _x100(scores.mean), _between(scores.interval), *map(_x100, shares)]


def _moment(timestamp: str) -> str:
    return timestamp[:19].replace("T", " ")


def _x100(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _seconds(stage: StageSummary) -> str:
    if stage.name == "base" or stage.seconds is None:
        return "-"
    return "reused" if stage.reused else f"{stage.seconds:.1f}"
