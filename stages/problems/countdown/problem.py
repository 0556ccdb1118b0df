"""Countdown: reach the target with the numbers, each used at most once.

    Numbers: 3, 7, 25, 50       <think> ... </think>
    Target: 82    is answered   <answer>25 + 50 + 7</answer>

What counts is the last <answer>; thinking is not asked for. The outcomes: format (no <answer>, or no expression in it),
numbers (one that is not given, or too often; with `use_all`, also one that is left out), off_target, on_target. The
score is 1 on the target, else 0. Training pays .1 for the form and .9 more for the target, as TinyZero does
(github.com/Jiayi-Pan/TinyZero, verl/utils/reward_score/countdown.py: .1 and 1), but the form is an expression and not
any text between the tags, and `use_all` is a setting (there, every number must be used).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

from pydantic import AliasChoices, BaseModel, Field

from stages.config import Config, identity
from stages.errors import BadInput
from stages.job import Split
from stages.problems.base import Answer, Judgement, Row, generated, parsed_line, row_id
from stages.problems.countdown.expressions import Expression, parse
from stages.problems.countdown.solver import results, solve

MISSES = 10_000
"""Draws in a row without a target that is small enough, after which the settings are refused."""
OPEN, CLOSE = "<answer>", "</answer>"
SOLVED = 0.25
"""Share of the demonstrations that reach the target; the others combine the numbers at random. They show the form and
leave the task to be learned."""


class CountdownSettings(Config):
    """Reach a target with some numbers and + - * /."""

    name: Literal["countdown"] = identity()
    numbers: int = identity(4, ge=3, le=5)
    """How many numbers a row has."""
    largest: int = identity(99, ge=10, le=9999)
    """The greatest of them, at most; the least is 1."""
    largest_target: int = identity(100, ge=10, le=999_999)
    """The greatest target, at most."""
    use_all: bool = identity(False)
    """Every number must be used. Off: each at most once."""


@dataclass(frozen=True)
class CountdownRow(Row):
    """A row of this problem."""

    numbers: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class Countdown:
    """The problem; CountdownSettings documents its fields."""

    numbers: int = 4
    largest: int = 99
    largest_target: int = 100
    use_all: bool = False

    outcomes = ("format", "numbers", "off_target", "on_target")
    reward_weights = MappingProxyType({"format": 0.1, "target": 0.9})

    def rows(self, split: Split, start: int, stop: int, seed: int) -> list[Row]:
        """See Problem.rows; every row can be solved. Raises BadInput when there are not so many."""
        return generated(self._generate, split, start, stop, seed)

    def row(self, columns: Mapping[str, Any]) -> Row:
        """See Problem.row. The columns are `numbers` (or `nums`, as in Jiayi-Pan/Countdown-Tasks-3to4) and `target`;
        one that cannot be solved is refused."""
        line = parsed_line(_Line, columns)
        if solve(tuple(sorted(line.numbers)), line.target, self.use_all) is None:
            raise BadInput(
                f"found numbers {line.numbers} and target {line.target}, which no expression joins; remove the row"
            )
        return self._row(line.numbers, line.target)

    def demonstration(self, row: Row, rng: random.Random) -> str:
        """See Problem.demonstration."""
        row = cast(CountdownRow, row)
        if rng.random() < SOLVED:
            expression = self._gold(row)
        else:
            _, expression = _random_expression(row.numbers, rng)
        return f"<think>\n{expression} = {_value(expression)}, wanted {row.target}\n</think>\n{_answer(expression)}"

    def baselines(self, row: Row, rng: random.Random) -> Mapping[str, str]:
        """See Problem.baselines. `target_itself` uses a number that is not given; `all_added` and `random_expression`
        miss most targets."""
        row = cast(CountdownRow, row)
        gold = self._gold(row)
        return {
            "gold": _answer(gold),
            "all_added": _answer(" + ".join(map(str, row.numbers))),
            "one_number": _answer(str(row.numbers[0])),
            "random_expression": _answer(_random_expression(row.numbers, rng)[1]),
            "target_itself": _answer(f"{row.target} * 1"),
            "empty_answer": _answer(""),
            "format_broken": gold,
        }

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """See Problem.judge. Rewards: format: there is an expression in the last <answer>. target: it uses its numbers
        rightly and hits the target."""
        return [self._judge(cast(CountdownRow, answer.row), answer.text) for answer in answers]

    def passed(self, score: float) -> bool:
        """Only the target passes."""
        return score == 1

    def _judge(self, row: CountdownRow, completion: str) -> Judgement:
        expression = read(completion)
        outcome = self._outcome(row, expression)
        hit = outcome == "on_target"
        rewards = {"format": float(expression is not None), "target": float(hit)}
        return Judgement(float(hit), outcome, solved=hit, well_formed=expression is not None, rewards=rewards)

    def _outcome(self, row: CountdownRow, expression: Expression | None) -> str:
        if expression is None:
            return "format"
        used, given = Counter(expression.numbers), Counter(row.numbers)
        if not used <= given or (self.use_all and used != given):
            return "numbers"
        return "on_target" if expression.value() == row.target else "off_target"

    def _gold(self, row: CountdownRow) -> str:
        solution = solve(tuple(sorted(row.numbers)), row.target, self.use_all)
        assert solution is not None, "rows that cannot be solved are never made"
        return solution

    def _generate(self, rng: random.Random) -> Iterator[CountdownRow]:
        missed = 0
        while missed < MISSES:
            numbers = [rng.randint(1, self.largest) for _ in range(self.numbers)]
            target, _ = _random_expression(numbers, rng)
            missed += 1
            if target <= self.largest_target and target not in numbers:
                missed = 0
                yield self._row(numbers, target)
        raise BadInput(
            f"countdown: {MISSES} times in a row, {self.numbers} numbers up to {self.largest} made no target up to "
            f"{self.largest_target}; raise largest_target"
        )

    def _row(self, numbers: Sequence[int], target: int) -> CountdownRow:
        rule = "\nUse every number." if self.use_all else ""
        prompt = f"Numbers: {', '.join(map(str, numbers))}\nTarget: {target}{rule}"
        return CountdownRow(row_id([sorted(numbers), target]), prompt, tuple(numbers), target)


def read(completion: str) -> Expression | None:
    """The expression in the last <answer>; None where there is none."""
    close = completion.rfind(CLOSE)
    start = completion.rfind(OPEN, 0, max(close, 0))
    if start < 0:
        return None
    return parse(completion[start + len(OPEN) : close])


def _answer(expression: str) -> str:
    return f"{OPEN}{expression}{CLOSE}"


def _value(expression: str) -> str:
    parsed = parse(expression)
    assert parsed is not None, "an expression of our own"
    return str(parsed.value())


def _random_expression(numbers: Sequence[int], rng: random.Random) -> tuple[int, str]:
    """(value, expression) of all the numbers, joined in a random order by random operations that keep to positive whole
    numbers."""
    pool = [(number, str(number)) for number in numbers]
    while len(pool) > 1:
        (small, of_small), (large, of_large) = sorted(pool.pop(rng.randrange(len(pool))) for _ in range(2))
        value, sign = rng.choice(list(results(large, small)))
        pool.append((int(value), f"({of_large} {sign} {of_small})"))
    value, expression = pool[0]
    return value, expression.removeprefix("(").removesuffix(")")


Number = Annotated[int, Field(ge=1, lt=10**6, strict=True)]


class _Line(BaseModel):
    """A line of a file; other columns are left alone."""

    numbers: list[Number] = Field(validation_alias=AliasChoices("numbers", "nums"), min_length=1, max_length=5)
    target: Number
