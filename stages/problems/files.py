"""Rows and completions from files, a JSON object per line.

An error names the file and the number of the invalid line. Later lines are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.errors import BadInput
from stages.problems.base import Answer, Problem, Row
from stages.runtime.workdir import NO_COPIES, Copies, place


class Line(NamedTuple):
    """A line of a file."""

    where: str
    """File and number, from 1; how an error starts."""
    columns: dict[str, Any]


def lines(path: Path, copies: Copies = NO_COPIES) -> Iterator[Line]:
    """The objects of a file, or of its copy. Raises BadInput for what is none, and for an empty file."""
    try:
        text = place(path, copies).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as text: {getattr(error, 'strerror', None) or error}") from None
    if not text:
        raise BadInput(f"{path} is empty; expected a JSON object a line")
    # split there and nowhere else: a JSON string may hold other ends of lines
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{path}, line {number}"
        yield Line(where, _object(line, where))


def rows(problem: Problem, path: Path, copies: Copies = NO_COPIES) -> list[Row]:
    """The rows of a file, as the problem reads them."""
    read: list[Row] = []
    for where, columns in lines(path, copies):
        try:
            refuse_half_pairs(columns)
            read.append(problem.row(columns))
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
    return read


def answers(path: Path, rows: Sequence[Row]) -> list[tuple[int, Answer]]:
    """(row, answer) of each line {"row": line of the rows, from 0, "completion": text}; other columns are left
    alone."""
    return [_answer(line, rows) for line in lines(path)]


def _answer(line: Line, rows: Sequence[Row]) -> tuple[int, Answer]:
    where, columns = line
    row, completion = columns.get("row"), columns.get("completion")
    if type(row) is not int or not 0 <= row < len(rows):
        raise BadInput(f"{where}: row: found {_short(row)}, expected a line of the rows, from 0 to {len(rows) - 1}")
    if not isinstance(completion, str):
        raise BadInput(f"{where}: completion: found {_short(completion)}, expected text")
    return row, Answer(rows[row], completion)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4300 digits
        raise BadInput(f"{where}: found no JSON ({error}), expected an object") from None
    if not isinstance(value, dict):
        raise BadInput(f"{where}: found {_short(value)}, expected an object")
    return value


def refuse_half_pairs(columns: dict[str, Any]) -> None:
    """Raise BadInput where a text cannot be encoded: a JSON escape can say half of a surrogate pair, which no tokenizer
    takes."""
    try:
        json.dumps(columns, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadInput("it holds half of a surrogate pair (\\ud800 to \\udfff), which is no text; remove it") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
