"""The rows of a split, to read, or to make a file of conversations of: `job.problem` -> `rows.jsonl` in `job.out`, a
row a line, as `Problem.row` reads it.

A question and no stage: nothing is published. Needs no model and no torch."""

from __future__ import annotations

import json
from pathlib import Path

from stages.config import Config, identity
from stages.errors import BadInput, TooFew
from stages.job import Job, Result, RowRange, Split
from stages.problems import catalog
from stages.problems.base import Problem, Row

FILE = "rows.jsonl"
MOST = 100_000
"""Rows of a split that are asked for where no range is: a problem with as many may have no end."""


class RowsConfig(Config):
    """Which rows."""

    split: Split = identity()
    """Of the problem."""
    start: int = identity(0, ge=0)
    """The first, from 0."""
    stop: int | None = identity(None, ge=1)
    """Where they end. Off: with the split."""


def run(job: Job) -> Result:
    """Write the rows. Raises BadInput where there are fewer, and where a whole split has no end."""
    config = RowsConfig.model_validate(job.config)
    assert job.problem is not None, "the command that asks for rows names a problem"
    problem = catalog.load(job.problem)
    rows = _whole(problem, config, job.seed) if config.stop is None else _range(problem, config, config.stop, job.seed)
    with Path(job.out, FILE).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(row.line()), ensure_ascii=False) + "\n" for row in rows)
    return Result(outputs={"rows": FILE}, metrics={"rows": len(rows)})


def _range(problem: Problem, config: RowsConfig, stop: int, seed: int) -> list[Row]:
    return catalog.rows(problem, RowRange(split=config.split, start=config.start, stop=stop, seed=seed))


def _whole(problem: Problem, config: RowsConfig, seed: int) -> list[Row]:
    """Every row of the split."""
    try:
        _range(problem, config, MOST, seed)
    except TooFew as error:
        return _range(problem, config, error.there, seed) if error.there else []
    raise BadInput(
        f"--split {config.split}: the problem has {MOST} rows in it or more, and may have no end; name a range, such "
        f"as {config.split}[0:1000]"
    )
