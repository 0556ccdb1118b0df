"""Whatever a model writes is judged: no exception, and no more than linear time."""

from __future__ import annotations

import importlib.util
import random
import time

import pytest

from stages.problems.base import Answer
from stages.problems.catalog import load
from tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("parsers", ROOT / "benchmarks" / "parsers.py")
parsers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parsers)

IDS = [" ".join(settings.values()) for settings in parsers.PROBLEMS]


def fuzzed(rng: random.Random, gold: str) -> str:
    """A hostile text, or a right answer with hostile text in it; one in a hundred is long."""
    length = 1_000_000 if rng.random() < 0.01 else rng.choice((1, 30, 1000))
    start, unit, end = parsers.UNITS[rng.choice(list(parsers.UNITS))]
    texts = [start, unit * (length // len(unit) + 1), end, gold, chr(rng.randrange(0x110000)), "<think>", "</schedule>"]
    rng.shuffle(texts)
    return "".join(texts[: rng.randint(1, 4)])


@pytest.mark.parametrize("settings", parsers.PROBLEMS, ids=IDS)
def test_ten_thousand_hostile_completions_are_judged(settings):
    """Ten thousand among the four."""
    problem, rng = load(settings), random.Random(0)
    rows = problem.rows("train", 0, 20, seed=0)
    golds = [problem.baselines(row, rng)["gold"] for row in rows]
    for i in range(2500):
        answer = Answer(rows[i % 20], fuzzed(rng, golds[i % 20]))
        (judgement,) = problem.judge([answer])
        assert judgement.outcome in problem.outcomes and 0 <= judgement.score <= 1
        assert set(judgement.rewards) == set(problem.reward_weights)


@pytest.mark.parametrize("settings", parsers.PROBLEMS, ids=IDS)
@pytest.mark.parametrize("family", parsers.UNITS)
def test_a_megabyte_is_judged_in_a_moment(settings, family):
    """Quadratic time would be hours. `benchmarks/parsers.py` looks at how the time grows."""
    judge, text = parsers.judging(load(settings)), parsers.hostile(family, 1_000_000)
    start = time.process_time()
    judge(text)
    assert time.process_time() - start < 2
