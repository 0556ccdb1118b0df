"""Arithmetic: one operation on two whole numbers. Small enough for tests and for a first tutorial.

    12 - 40 =    is answered    -28

The answer is everything after the last </think>, or the completion itself where there is none: a whole number of at
most 18 digits, and blank space around it. The score is 1 when it is right.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, Field

from stages.config import Config, FromList, identity
from stages.job import Split
from stages.problems.base import Answer, Judgement, Row, generated, parsed_line, row_id

Operation = Literal["+", "-", "*"]
OPERATIONS: Mapping[Operation, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
MAX_DIGITS = 9
"""Of an operand, so that a product has no more digits than an answer may have."""
NUMBER = re.compile(r"-?[0-9]{1,18}")
THOUGHT = "</think>"
RIGHT_ANSWERS = 0.5
"""Share of the demonstrations that are right; the others are off by up to 3. They show the form and leave the task to
be learned."""


class ArithmeticSettings(Config):
    """One operation on two whole numbers; tiny, for tests and tutorials."""

    name: Literal["arithmetic"] = identity()
    digits: int = identity(2, ge=1, le=MAX_DIGITS)
    """Digits of an operand, at most. One digit and one operation make 100 rows in all."""
    operations: Annotated[tuple[Operation, ...], FromList] = identity(("+", "-"), min_length=1)
    """What may be asked: +, - and *."""


@dataclass(frozen=True)
class ArithmeticRow(Row):
    """A row of this problem."""

    a: int
    operation: Operation
    b: int

    @property
    def result(self) -> int:
        """The right answer."""
        return OPERATIONS[self.operation](self.a, self.b)


@dataclass(frozen=True)
class Arithmetic:
    """The problem. Operands are whole numbers from 0 on, of at most `digits` digits."""

    digits: int = 2
    operations: tuple[Operation, ...] = ("+", "-")

    outcomes = ("format", "wrong", "right")
    reward_weights = MappingProxyType({"format": 0.1, "right": 0.9})

    def rows(self, split: Split, start: int, stop: int, seed: int) -> list[Row]:
        """See Problem.rows. Raises BadInput when there are not so many."""
        return generated(self._generate, split, start, stop, seed)

    def row(self, columns: Mapping[str, Any]) -> Row:
        """See Problem.row. The columns are `a`, `operation` and `b`, of any size up to 9 digits."""
        line = parsed_line(_Line, columns)
        return _row(line.a, line.operation, line.b)

    def demonstration(self, row: Row, rng: random.Random) -> str:
        """See Problem.demonstration."""
        answer = cast(ArithmeticRow, row).result
        if rng.random() >= RIGHT_ANSWERS:
            answer += rng.choice((-3, -2, -1, 1, 2, 3))
        return str(answer)

    def baselines(self, row: Row, rng: random.Random) -> Mapping[str, str]:
        """See Problem.baselines."""
        right = cast(ArithmeticRow, row).result
        return {
            "gold": str(right),
            "off_by_one": str(right + 1),
            "random_number": str(rng.randrange(10**self.digits)),
            "format_broken": f"The answer is {right}.",
        }

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """See Problem.judge. Rewards: format: it is a number. right: it is the result."""
        return [_judge(cast(ArithmeticRow, answer.row), answer.text) for answer in answers]

    def passed(self, score: float) -> bool:
        """Only the right answer passes."""
        return score == 1

    def _generate(self, rng: random.Random) -> Iterator[ArithmeticRow]:
        while True:
            yield _row(rng.randrange(10**self.digits), rng.choice(self.operations), rng.randrange(10**self.digits))


def read(completion: str) -> int | None:
    """The number that a completion answers with; None for any other answer."""
    answer = completion.rpartition(THOUGHT)[2].strip()
    return int(answer) if NUMBER.fullmatch(answer) else None


def _judge(row: ArithmeticRow, completion: str) -> Judgement:
    number = read(completion)
    well_formed, right = number is not None, number == row.result
    if not well_formed:
        outcome = "format"
    elif right:
        outcome = "right"
    else:
        outcome = "wrong"
    rewards = {"format": float(well_formed), "right": float(right)}
    return Judgement(float(right), outcome, solved=right, well_formed=well_formed, rewards=rewards)


def _row(a: int, operation: Operation, b: int) -> ArithmeticRow:
    return ArithmeticRow(row_id([a, operation, b]), f"{a} {operation} {b} =", a, operation, b)


class _Line(BaseModel):
    """A line of a file; other columns are left alone."""

    a: int = Field(ge=0, lt=10**MAX_DIGITS, strict=True)
    operation: Operation
    b: int = Field(ge=0, lt=10**MAX_DIGITS, strict=True)
