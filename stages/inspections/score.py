"""What completions from anywhere are worth: a file of rows and a file of completions -> outcomes, average score,
rewards, intervals.

A question and no stage: nothing is published. Needs no model and no torch. `job.problem` judges, `job.inputs` has the
files `rows` and `completions` (`stages.problems.files`), and `score.json` in `job.out` has the answer:

    rows, completions           how many rows were answered, and how often in all
    outcomes                    outcome -> how many completions, in the order in which rules are judged
    outcome_intervals           outcome -> 95 % Wilson interval of its share, which takes completions for independent
    unscored                    rows without a score, whatever was answered: they are left out of the next five
    average, interval           mean score, and its 95 % bootstrap interval over rows (null where no row has a score)
    pass_rate, pass_interval    share that passes, and its 95 % Wilson interval (null likewise)
    solved                      share with the best possible score (null likewise)
    rewards, reward             component -> its mean, where it applies (null where it never does); the mean of
                                their weighted sum, over the completions to which a component applies (none does to
                                one that could not be judged)
    weights                     component -> its weight in that sum
    failures, first_failure     what user code did in place of judging -> how often; the message of the first
                                (null without any)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stages.config import Config
from stages.guard.failures import first_message
from stages.job import Job, Result
from stages.problems.base import Judgement, Problem, passes, total

FILE = "score.json"


class ScoreConfig(Config):
    """Nothing to set."""


def run(job: Job) -> Result:
    """Write `score.json`. Raises BadInput with file and line for a row or completion that cannot be used."""
    from stages.problems import catalog, files

    assert job.problem is not None, "a job of score names a problem"
    problem = catalog.load(job.problem, job.copies)
    rows = files.rows(problem, Path(job.inputs["rows"]))
    answered = files.answers(Path(job.inputs["completions"]), rows)
    judgements = problem.judge([answer for _, answer in answered])
    found = summarise(problem, [row for row, _ in answered], judgements)
    Path(job.out, FILE).write_text(json.dumps(found, indent=1), encoding="utf-8")
    metrics = {} if found["average"] is None else {"average": found["average"]}
    return Result(outputs={"score": FILE}, metrics=metrics)


def summarise(problem: Problem, rows: Sequence[int], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """The numbers; `rows` says which row each judgement is of."""
    from stages.intervals import wilson_interval

    count = len(judgements)
    with_score = {row for row, judgement in zip(rows, judgements, strict=True) if judgement.scored}
    outcomes = Counter(judgement.outcome for judgement in judgements)
    return {
        "rows": len(set(rows)),
        "unscored": len(set(rows)) - len(with_score),
        "completions": count,
        "outcomes": {name: outcomes[name] for name in problem.outcomes},
        "outcome_intervals": {name: wilson_interval(outcomes[name], count) for name in problem.outcomes},
        **_scores(problem, [pair for pair in zip(rows, judgements, strict=True) if pair[0] in with_score]),
        "rewards": {
            name: _mean(judgement.rewards.get(name) for judgement in judgements) for name in problem.reward_weights
        },
        "reward": _mean(total(judgement.rewards, problem.reward_weights) for judgement in judgements),
        "weights": dict(problem.reward_weights),
        "failures": dict(Counter(judgement.failure for judgement in judgements if judgement.failure)),
        "first_failure": first_message(problem),
    }


def _scores(problem: Problem, pairs: Sequence[tuple[int, Judgement]]) -> dict[str, Any]:
    """What the completions of rows with a score come to."""
    from stages.estimates import grouped_interval
    from stages.intervals import wilson_interval

    if not pairs:
        return dict.fromkeys(("average", "interval", "pass_rate", "pass_interval", "solved"))
    scores = [judgement.score for _, judgement in pairs]
    passed = sum(passes(problem, judgement) for _, judgement in pairs)
    return {
        "average": sum(scores) / len(pairs),
        "interval": grouped_interval(scores, [row for row, _ in pairs]),
        "pass_rate": passed / len(pairs),
        "pass_interval": wilson_interval(passed, len(pairs)),
        "solved": sum(judgement.solved for _, judgement in pairs) / len(pairs),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that apply; None where none does."""
    applied = [value for value in values if value is not None]
    return sum(applied) / len(applied) if applied else None
