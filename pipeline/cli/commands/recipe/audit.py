"""audit: what a recipe's rewards pay for, compared with what the task means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.cli.options import JsonOption, RecipeArgument, RegistryOption, SetOption, open_plan, print_json
from pipeline.cli.show.progress import Progress
from pipeline.cli.show.tables import SEVERITY_STYLE, show, table
from pipeline.cli.show.terminal import console, write
from pipeline.launch.local import Launcher
from pipeline.plan.plan import Planned
from pipeline.recipe.validation_errors import nearest
from pipeline.results import findings
from pipeline.results.findings import refuse
from pipeline.run import inspections
from stages.errors import BadInput
from stages.job import Finding
from stages.rewards.audit.audit import Report
from stages.rewards.audit.baselines import HOSTILE
from stages.rewards.audit.facts import Line

RowsFile = Annotated[
    Path | None,
    typer.Option(
        "--rows",
        metavar="FILE",
        help="Rows to play, one a line as JSON, as the problem has them. Default: the first 100 of the stage's rows.",
        show_default=False,
    ),
]
Stage = Annotated[
    str | None,
    typer.Option("--stage", metavar="STAGE", help="A grpo stage. Default: the recipe's first one.", show_default=False),
]
BAR = 10
"""Characters of a bar that stands for 100."""
WIDE = 110
"""Characters of a line, below which bars are half as long and components are left to `--json`."""
EIGHTHS = " ▏▎▍▌▋▊▉█"
RANGES = {
    "seen": "the least and the greatest reward that any of these answers earned",
    "possible": "what components that reach 0 and 1 could earn; no best answer is known",
}


def audit(
    recipe: RecipeArgument,
    rows: RowsFile = None,
    stage: Stage = None,
    overrides: SetOption = None,
    registry: RegistryOption = None,
    json: JsonOption = False,
) -> None:
    """Play answers whose worth is known, and show what each earns and scores. Ends with 3 where the best
    answer is not the best paid."""
    if rows and not rows.is_file():
        raise BadInput(f"--rows: {rows} is not there")
    loaded, place, planned = open_plan(recipe, overrides, registry)
    one = _named(planned, stage)
    with Progress() as progress, Launcher(preload=False) as launcher:
        report = inspections.audit(one, rows, place, launcher, loaded.launch, progress.asked("audit"))
    if json:
        print_json(report.model_dump(mode="json"))
    else:
        _print(report, f"{rows}" if rows else f"{one.step.rows}")
    refuse(report.findings)


def _named(planned: list[Planned], stage: str | None) -> Planned:
    """The step to look at. Raises BadInput where there is none."""
    there = {one.step.name: one for one in planned if inspections.rewards_of(one.step) is not None}
    if not there:
        raise BadInput("the recipe has no grpo stage, so nothing is trained by rewards; add one to audit them")
    if stage is not None and stage not in there:
        raise BadInput(f"--stage: no grpo stage is named {stage}{nearest(stage, list(there))}")
    return there[stage or next(iter(there))]


def _print(report: Report, source: str) -> None:
    """The table, what its shares are shares of, and the findings."""
    terminal = console()
    show(_table(report, terminal))
    write(
        f"{report.stage}: {report.rows} rows of {source}; share and score are x 100. The share runs from "
        f"{report.range.least:.4g} to {report.range.greatest:.4g}: {RANGES[report.range.source]}"
    )
    for finding in findings.merged(report.findings):
        terminal.print(_said(finding), soft_wrap=True)
    if not report.findings:
        write("nothing to say against these rewards")


def _said(finding: Finding) -> Text:
    override = f" (--set {finding.override})" if finding.override else ""
    return Text(f"{finding.severity}: {finding.rule}: {finding.advice}{override}", SEVERITY_STYLE[finding.severity])


def _table(report: Report, terminal: Console) -> Table:
    """A line a baseline; on a terminal with a bar each for reward share and score."""
    shown = report.weights if terminal.width >= WIDE else {}
    components = [f"{name}\nx {weight:g}" for name, weight in shown.items()]
    made = table("baseline", "reward", "share", "score", *components, "outcomes", right=("reward", *components))
    for column in made.columns[:4]:
        column.no_wrap = True
    for line in _merged(report.baselines):
        parts = [_number(line.rewards[name]) for name in shown]
        made.add_row(
            line.name, _number(line.reward), _bar(line.share, "yellow", terminal),
            _bar(line.score, "green", terminal), *parts, _outcomes(line),
        )  # fmt: skip
    return made


def _merged(lines: Sequence[Line]) -> list[Line]:
    """Hostile texts that earn the same in everything are one line, where the first of them stood."""
    groups = dict[str, list[Line]]()
    for line in lines:
        hostile = line.name.startswith(HOSTILE) and not line.own
        groups.setdefault(line.model_dump_json(exclude={"name"} if hostile else None), []).append(line)
    return [
        group[0] if len(group) == 1 else group[0].model_copy(update={"name": f"{len(group)} hostile ones"})
        for group in groups.values()
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _bar(share: float | None, style: str, terminal: Console) -> Text:
    """A share x 100, and on a terminal how far that goes."""
    number = f"{'-' if share is None else f'{100 * share:.1f}':>5}"
    if share is None or not terminal.is_terminal:
        return Text(number)
    width = BAR if terminal.width >= WIDE else BAR // 2
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = ("#", "") if terminal.options.ascii_only else ("█", EIGHTHS[eighths % 8].strip())
    return Text.assemble(f"{number} ", (f"{full * (eighths // 8) + rest:<{width}}", style))


def _outcomes(line: Line) -> str:
    counts = sorted({**line.outcomes, **line.failures}.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {count}" for name, count in counts)
