"""Which training rows ask what policies are evaluated on.

evaluated rows + a Format -> what they ask (`Asked`); training rows -> the evaluated rows that they ask -> a finding, or
the training rows without them. A question is the words of a user's turn, white space folded: those of the problem, and
those that the Format makes of them. A row asks one for each of its answers, so of a conversation each trained turn
counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from stages.job import Evaluated, Finding, Format, Split
from stages.problems import catalog
from stages.problems.base import Row, folded
from stages.tokens import chat, prefix
from stages.tokens.token_rows import ANSWERED, COMPLETION, USER, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Questions = tuple[str, ...]
MOST = 0.05
"""Share of a split's evaluated rows that training may ask. A stage that asks more is not run."""
BEFORE_AN_ANSWER = re.compile("(?<!{u}){u}++(?=[^{u}{ours}]*+[{ours}])".format(u=USER, ours="".join(ANSWERED)))
"""In the roles of a row: the words of a user's turn that is answered."""


class Place(NamedTuple):
    """An evaluated row."""

    split: Split
    number: int
    """From 0, among those of its split."""


@dataclass(frozen=True)
class Asked:
    """What evaluated rows ask."""

    rows: Mapping[str, frozenset[Place]]
    """Question -> the rows that ask it."""
    counts: Mapping[Split, int]
    """How many rows of each split are evaluated."""

    def by(self, questions: Questions) -> frozenset[Place]:
        """The evaluated rows that ask one of these."""
        return frozenset[Place]().union(*(self.rows.get(question, ()) for question in questions))


def rows_of(evaluated: Evaluated) -> dict[Split, list[Row]]:
    """The rows that policies are scored on."""
    problem = catalog.load(evaluated.problem)
    return {range.split: catalog.rows(problem, range) for range in evaluated.ranges}


def asked(rows: Mapping[Split, Sequence[Row]], format: Format, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """What rows ask, as text and as the tokenizer reads its own ids of it."""
    found: dict[str, set[Place]] = {}
    for split, some in rows.items():
        prompts = prefix.prompts(tokenizer, format, some)
        for number, (row, (ids, roles)) in enumerate(zip(some, prompts, strict=True)):
            as_read = _decoded(tokenizer, ids, roles + COMPLETION)
            for question in (*of_prompt(format, row), *as_read):
                found.setdefault(question, set()).add(Place(split, number))
    counts: dict[Split, int] = {split: len(some) for split, some in rows.items()}
    return Asked({text: frozenset(places) for text, places in found.items()}, counts)


def of_prompt(format: Format, row: prefix.Columns) -> Questions:
    """What a row of a problem, or a line with a prompt of plain text, asks."""
    prompt = row.prompt if isinstance(row, Row) else str(row["prompt"])
    return _distinct([prompt, prefix.messages(format, row)[-1]["content"]])


def of_turns(turns: Sequence[chat.Message], given: int = 0) -> Questions:
    """What a conversation asks before each of its answers, which come after the first `given` turns."""
    found: list[str] = []
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant" and i >= given:
            found += [before["content"] for before in turns[:i] if before["role"] == "user"][-1:]
    return _distinct(found)


def of_row(tokenizer: PreTrainedTokenizerBase, row: TokenRow) -> Questions:
    """What a training row asks: as text where that is known, else by its ids."""
    return row.questions or _decoded(tokenizer, row.ids, row.roles)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], roles: str) -> Questions:
    words = [list(ids[run.start() : run.end()]) for run in BEFORE_AN_ANSWER.finditer(roles)]
    return _distinct([str(tokenizer.decode(some)) for some in words])


def _distinct(texts: Sequence[str]) -> Questions:
    return tuple(dict.fromkeys(map(folded, texts)))


def without(rows: Sequence[T], questions: Callable[[T], Questions], evaluated: Asked | None) -> list[T]:
    """The rows that ask none of the evaluated ones. None: all."""
    return [row for row in rows if evaluated is None or not evaluated.by(questions(row))]


def findings(stage: str, sources: Mapping[str, Sequence[Questions]], evaluated: Asked) -> Iterator[Finding]:
    """What training asks of what is evaluated; `sources` are the questions of each file, or other source, of rows."""
    hits = {name: frozenset[Place]().union(*map(evaluated.by, rows)) for name, rows in sources.items()}
    every = frozenset[Place]().union(*hits.values())
    if not every:
        return
    counts: dict[Split, int] = {split: sum(one.split == split for one in every) for split in evaluated.counts}
    worst = max(counts[split] / count for split, count in evaluated.counts.items() if count)
    holders = [name for name, some in hits.items() if some]
    who = f"{' and '.join(holders)} {'ask' if holders[1:] else 'asks'}"
    each = [f"{count} of the {evaluated.counts[split]} {split}" for split, count in counts.items() if count]
    first = min(every)
    example = min((text for text, places in evaluated.rows.items() if first in places), key=len)
    yield Finding(
        rule="trains_on_evaluated_rows",
        severity="stop" if worst > MOST else "warn",
        stage=stage,
        evidence={**{split: float(count) for split, count in counts.items()}, "share": worst},
        advice=f"{who} {' and '.join(each)} rows that policies are scored on, such as {example[:60]!r}, so scores "
        f"would be of questions that were trained; leave them out",
        override=f"stages.{stage}.drop_overlap=true",
    )
