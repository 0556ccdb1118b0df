"""Tables for people: scores x 100, one line a thing; plain when piped, NO_COLOR honoured."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from pipeline.plan.plan import Planned
from pipeline.registry import Artifact, Registry
from pipeline.registry.runs import Run
from pipeline.results.summary import RunSummary, StageSummary

ACTION_STYLE = {"reuse": "green", "run": "yellow", "skip": "dim"}
SEVERITY_STYLE = {"stop": "bold red", "warn": "yellow", "note": "dim"}


class _Console(Console):
    """A console that falls silent when nobody reads any more; a training is not stopped by that."""

    def on_broken_pipe(self) -> None:
        """In the place of rich's, which exits."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> Console:
    """As wide as the terminal; when piped, as wide as it takes."""
    made = _Console(highlight=False)
    return made if made.is_terminal else _Console(highlight=False, width=200)


def show(table: Table) -> None:
    """Print a table."""
    console().print(table)


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table; the columns in `right` hold numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(
            column, justify="right" if column in right else "left", overflow="fold", no_wrap=column in right
        )
    return made


def plan_table(planned: Sequence[Planned]) -> Table:
    """Step, what is done about it, why."""
    made = table("step", "kind", "", "why")
    for one in planned:
        made.add_row(one.step.name, one.step.kind, f"[{ACTION_STYLE[one.action]}]{one.action}[/]", escape(one.why))
    return made


def print_artifacts(registry: Registry, artifacts: Sequence[Artifact]) -> None:
    """Artifacts, a line each. There may be thousands, for which rich needs seconds."""
    rows = [(one.id, one.kind, _moment(one.created), decimal(one.size), registry.location(one)) for one in artifacts]
    header = ("id", "kind", "created", "size", "path")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = tuple("─" * width for width in widths)
    print("\n".join(_aligned(row, widths) for row in (header, rule, *rows)))


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    id, kind, created, size, path = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
    return f"{id}  {kind}  {created}  {size.strip():>{widths[3]}}  {path}".rstrip()


def artifact_table(registry: Registry, artifact: Artifact) -> Table:
    """One artifact, a line a fact."""
    made = table("artifact", artifact.id)
    made.add_row("kind", artifact.kind)
    made.add_row("path", escape(registry.location(artifact)))
    made.add_row("created", _moment(artifact.created))
    made.add_row("size", f"{decimal(artifact.size)} in {len(artifact.files)} files")
    for role, source in artifact.inputs.items():
        made.add_row(role, source.id or escape(source.name))
    for name, value in artifact.metrics.items():
        made.add_row(name, f"{value:.4g}")
    return made


def runs_table(runs: Sequence[Run]) -> Table:
    """Runs, a line each."""
    made = table("run", "recipe", "state", "started", "goes on with")
    for one in runs:
        made.add_row(one.run, one.recipe, one.state, _moment(one.started), one.resumes or "-")
    return made


def run_table(summary: RunSummary) -> Table:
    """Stage by stage: held-out score with interval, solved and format share, seconds, place."""
    numbers = ("greedy", "mean", "95 %", "solved", "format", "pass@1", "seconds")
    made = table("stage", "kind", *numbers, "artifact", right=numbers)
    for stage in summary.stages:
        made.add_row(
            stage.name, stage.kind, *_scores(stage), _seconds(stage), stage.artifact or escape(stage.path or "-")
        )
    return made


def probe_table(lines: Sequence[dict[str, Any]]) -> Table:
    """A line a policy, prompt and prefix."""
    numbers = ("pass", "95 %", "format", "follows", "95 % ", "tokens")
    made = table("policy", "prompt", "prefix", *numbers, right=numbers)
    for line in lines:
        followed = line["follow"] is not None
        follows = (_x100(line["follow"]), _between(line["follow_interval"])) if followed else ("-", "-")
        made.add_row(
            line["policy"], escape(line["prompt"]), escape(repr(line["response_prefix"])), _x100(line["pass_rate"]), _between(line["interval"]),
            _x100(line["format"]), *follows, f"{line['tokens']:.1f}",
        )  # fmt: skip
    return made


def outcome_table(outcomes: dict[str, int], intervals: dict[str, Sequence[float]]) -> Table:
    """A line an outcome."""
    numbers = ("completions", "share", "95 %")
    made = table("outcome", *numbers, right=numbers)
    total = sum(outcomes.values())
    for name, count in outcomes.items():
        made.add_row(escape(name), str(count), _x100(count / total), _between(intervals[name]))
    return made


def _between(interval: Sequence[float]) -> str:
    return f"{_x100(interval[0])} - {_x100(interval[1])}"


def _scores(stage: StageSummary) -> list[str]:
    e = stage.evaluation
    if e is None:
        return ["-"] * 6
    shares = (e.solved, e.format, e.pass_at_k["1"])
    return [_x100(e.greedy), _x100(e.mean), _between(e.interval), *map(_x100, shares)]


def _moment(timestamp: str) -> str:
    return timestamp[:19].replace("T", " ")


def _x100(share: float) -> str:
    return f"{100 * share:.1f}"


def _seconds(stage: StageSummary) -> str:
    if stage.name == "base" or stage.seconds is None:
        return "-"
    return "reused" if stage.reused else f"{stage.seconds:.1f}"
