"""diff: two artifacts side by side, in 80 columns."""

from __future__ import annotations

import json as encoder
import textwrap
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from pipeline.cli.options import JsonOption, RegistryOption, open_registry, print_json
from pipeline.cli.show.terminal import write
from pipeline.registry.aliases import resolve
from pipeline.registry.keys import abbreviated
from pipeline.results.compare import Comparison, Pair, compare
from stages.errors import printable
from stages.job import Evaluation

WIDTH = 80
SCORES = {"greedy": "greedy", "mean": "mean", "solved": "solved", "format": "format"}
"""Field of an Evaluation -> its name in the table."""
LONGEST = 400
"""Characters of an answer that are printed; --json prints all of it."""

First = Annotated[str, typer.Argument(metavar="A", help="An artifact.", show_default=False)]
Second = Annotated[str, typer.Argument(metavar="B", help="Another.", show_default=False)]


def diff(a: First, b: Second, registry: RegistryOption = None, json: JsonOption = False) -> None:
    """Show where two artifacts differ: what was asked, execution, Format, metrics, scores, answers."""
    place = open_registry(registry)
    found = compare(place, resolve(place, a), resolve(place, b))
    if json:
        print_json(found.model_dump(mode="json"))
    else:
        write("\n".join(_lines(found)))


def _lines(found: Comparison) -> Iterator[str]:
    yield from (f"A: {found.ids[0]}", f"B: {found.ids[1]}")
    yield from _fields("what was asked", found.asked)
    yield from _fields("execution, which is no part of the key", found.execution)
    yield from _fields("Format", found.format)
    yield from _numbers("metrics", found.metrics)
    yield from _scores(found)
    yield from _samples(found)


def _fields(title: str, fields: Mapping[str, Pair]) -> Iterator[str]:
    """A line per different field, with both values."""
    yield f"\n{title}:" if fields else f"\n{title}: the same"
    for name, (before, after) in fields.items():
        change = f"{name}: {_value(before)} -> {_value(after)}"
        yield from textwrap.wrap(change, WIDTH, initial_indent="  ", subsequent_indent="      ")


def _value(value: Any) -> str:
    if value is None:
        return "-"
    text = abbreviated(encoder.dumps(value, ensure_ascii=False))
    if len(text) > 120:
        text = f"{text[:100]}... ({len(text)} characters)"
    return printable(text)


def _numbers(title: str, numbers: Mapping[str, Pair]) -> Iterator[str]:
    if numbers:
        yield f"\n{title:<46}{'A':>16}{'B':>16}"
    for name, pair in numbers.items():
        left, right = ("-" if number is None else f"{number:.5g}" for number in pair)
        yield f"  {printable(name):<44}{left:>16}{right:>16}"


def _scores(found: Comparison) -> Iterator[str]:
    """The scores of both x 100, as in all tables."""
    if found.scores:
        yield f"\n{'scores x 100':<46}{'A':>16}{'B':>16}"
    for split, pair in found.scores.items():
        for field, name in SCORES.items():
            left, right = (_score(evaluation, field) for evaluation in pair)
            yield f"  {f'{split} {name}':<44}{left:>16}{right:>16}"
        left, right = map(_interval, pair)
        yield f"  {f'{split} mean, 95 %':<44}{left:>16}{right:>16}"
    if found.scores and not found.comparable:
        yield "  not comparable: they were not both evaluated with the same settings"


def _score(evaluation: Evaluation | None, field: str) -> str:
    return "-" if evaluation is None else _x100(getattr(evaluation, field))


def _x100(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _interval(evaluation: Evaluation | None) -> str:
    if evaluation is None or evaluation.interval is None:
        return "-"
    low, high = evaluation.interval
    return f"{100 * low:.1f} - {100 * high:.1f}"


def _samples(found: Comparison) -> Iterator[str]:
    if found.samples:
        yield "\nthe first rows that came out differently"
    elif found.comparable:
        yield "\nno validation row has another greedy score"
    for sample in found.samples:
        yield f"  row {printable(sample.row)}"
        for name, score, answers in zip("AB", sample.scores, sample.answers, strict=True):
            yield from _answers(name, score, answers)


def _answers(name: str, score: Any, answers: tuple[str, ...]) -> Iterator[str]:
    scores = score if isinstance(score, list) else [score]
    if not answers:
        yield f"  {name}  nothing was kept"
    margin = "     | "
    for answer_score, text in zip(scores, answers, strict=True):
        yield f"  {name}  score {_x100(answer_score)}"
        shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
        for line in shown.splitlines():
            yield from textwrap.wrap(printable(line or " "), WIDTH, initial_indent=margin, subsequent_indent=margin)
