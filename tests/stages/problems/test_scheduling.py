"""The scheduling problem in its compact form: its optimum, its rules in their order, its rewards and its splits."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from stages.problems.base import Answer, Judgement, Row, split_of
from stages.problems.scheduling import compact
from stages.problems.scheduling.intervals import Event, Instance, best_schedule, optimum, overlaps
from stages.problems.scheduling.problem import Scheduling, SchedulingRow

PROBLEM = Scheduling("compact")


def hour(name: str, start: int, end: int) -> Event:
    return Event(name, 60 * start, 60 * end)


A, B, C, D = hour("A", 12, 13), hour("B", 11, 14), hour("C", 14, 16), hour("D", 17, 18)
INSTANCE = Instance((A, B, C, D), frozenset("A"))
ROW = SchedulingRow("id", compact.prompt(INSTANCE), INSTANCE, optimum(INSTANCE))


def judged(row: Row, completion: str) -> Judgement:
    (judgement,) = PROBLEM.judge([Answer(row, completion)])
    return judgement


def answered(*events: Event) -> str:
    return compact.answer(INSTANCE, events)


def brute_force(instance: Instance) -> int:
    """The best of all subsets without an overlap."""
    subsets = (s for n in range(len(instance.events) + 1) for s in combinations(instance.events, n))
    return max(sum(map(instance.weight, s)) for s in subsets if not any(overlaps(a, b) for a, b in combinations(s, 2)))


def test_the_optimum_is_that_of_brute_force():
    rng = random.Random(0)
    for _ in range(500):
        events = []
        for name in "ABCDEFG"[: rng.randint(1, 7)]:
            start = rng.randint(0, 50)
            events.append(Event(name, start, start + rng.randint(1, 20)))
        instance = Instance(tuple(events), frozenset(rng.sample([e.name for e in events], rng.randint(0, len(events)))))
        assert optimum(instance) == brute_force(instance)
        schedule = best_schedule(instance)
        assert sum(map(instance.weight, schedule)) == optimum(instance)
        assert not any(overlaps(a, b) for a, b in combinations(schedule, 2))


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        ("I would book B.", "format"),
        (answered(B, C) + " and more", "format"),
        (answered(B, C).replace("<think>\n", ""), "format"),
        (answered(B, C).replace("11:00", "1:00"), "format"),
        (answered(), "less_than_2"),
        (answered(hour("B", 11, 15), C), "non_existing"),
        (answered(hour("E", 8, 9), B), "non_existing"),
        (answered(B, B), "non_existing"),
        (answered(C, B), "unsorted"),
        (answered(B, A), "overlap"),
        (answered(B, C), "valid"),  # they touch, which is fine
        (answered(D), "valid"),
    ],
)
def test_the_first_broken_rule_is_the_outcome(completion, outcome):
    judgement = judged(ROW, completion)
    assert judgement.outcome == outcome
    assert (judgement.score > 0) == (outcome == "valid")
    assert judgement.well_formed == (outcome != "format")


def test_a_valid_schedule_scores_its_weighted_time_over_the_optimum():
    assert ROW.optimum == 6 * 60  # B, C, D; A would bring 2 instead of B's 3
    assert judged(ROW, answered(A, C)).score == pytest.approx(4 / 6)
    best = judged(ROW, answered(B, C, D))
    assert (best.score, best.solved) == (1.0, True)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (answered(B, C, D), 1.0),
        (answered(A, C), 0.1 + 0.2 + 0.7 * 4 / 6),
        (answered(D), 0.1 + 0.7 / 6),  # one event is never "sorted"
        (answered(A, B), 0.1),
        (answered(D, C), 0.1 + 0.7 * 3 / 6),  # out of order is no reason not to pay for the time
        (answered(B, A), 0.1 + 0.2),
        (answered(B, A, D), 0.3 + 0.7 / 6),  # of the two that overlap, neither counts
        (answered(B, hour("E", 15, 16)), 0.1 + 0.2),
        (answered(C, C), 0.1),
        (answered(B, A, C, D), 0.3 + 0.7 * 3 / 6),
        ("nonsense", 0.0),
    ],
)
def test_rewards_weigh_10_20_70(completion, reward):
    assert weighted(PROBLEM, judged(ROW, completion)) == pytest.approx(reward)


def weighted(problem: Scheduling, judgement: Judgement) -> float:
    return sum(problem.reward_weights[name] * value for name, value in judgement.rewards.items())


@pytest.mark.parametrize(
    ("settings", "rewards"),
    [
        ({}, [0.3 + 0.7, 0.3 + 0.7 * 3 / 6]),
        ({"overlap": "zero"}, [0.3 + 0.7, 0.3]),
        ({"overlap": "reward"}, [0.3 + 0.2 + 0.5, 0.3 + 0.5 * 3 / 6]),
        ({"reward_overlap": "touching"}, [0.3 + 0.7 / 6, 0.3 + 0.7 / 6]),
        ({"reward_overlap": "touching", "overlap": "zero"}, [0.3, 0.3]),
        ({"reward_overlap": "touching", "overlap": "reward"}, [0.3 + 0.5 / 6, 0.3 + 0.5 / 6]),
    ],
)
def test_what_an_overlap_costs_and_whether_touching_is_one_are_settings(settings, rewards):
    """B and C touch; A overlaps B. The score knows nothing of these settings."""
    problem = Scheduling("compact", **settings)
    everything = sorted([A, B, C, D], key=lambda e: (e.start, e.end))
    best, all_of_them = problem.judge([Answer(ROW, answered(B, C, D)), Answer(ROW, answered(*everything))])
    assert (best.score, all_of_them.score, all_of_them.outcome) == (1.0, 0.0, "overlap")
    assert [weighted(problem, best), weighted(problem, all_of_them)] == pytest.approx(rewards)
    assert sum(problem.reward_weights.values()) == pytest.approx(1)


def test_what_is_written_is_read_back():
    for row in PROBLEM.rows("train", 0, 50, seed=0):
        events = list(row.instance.events)
        assert compact.read(compact.answer(row.instance, events)) == (True, True, events)


def test_rows_are_the_same_in_whatever_pieces_they_are_asked_for():
    whole = PROBLEM.rows("train", 0, 30, seed=3)
    assert PROBLEM.rows("train", 0, 10, seed=3) + PROBLEM.rows("train", 10, 30, seed=3) == whole


def test_splits_are_disjoint_by_content_for_every_seed_and_range():
    train = {row.prompt for seed in range(3) for row in PROBLEM.rows("train", 0, 3000, seed)}
    validation = {row.prompt for row in PROBLEM.rows("validation", 0, 400, seed=0)}
    held_out = {row.prompt for row in PROBLEM.rows("held_out", 0, 1000, seed=0)}
    assert len(validation) == 400 and len(held_out) == 1000
    assert not train & validation and not train & held_out and not validation & held_out


def test_training_rows_differ_by_seed_and_evaluation_rows_do_not():
    assert PROBLEM.rows("train", 0, 5, seed=0) != PROBLEM.rows("train", 0, 5, seed=1)
    for split in ("validation", "held_out"):
        assert PROBLEM.rows(split, 0, 5, seed=0) == PROBLEM.rows(split, 0, 5, seed=1)


def test_a_row_id_decides_its_split():
    for split in ("train", "validation", "held_out"):
        assert {split_of(row.id) for row in PROBLEM.rows(split, 0, 20, seed=0)} == {split}


def test_demonstrations_have_the_form_and_leave_the_task_to_be_learned():
    rng, rows = random.Random(0), PROBLEM.rows("train", 0, 1000, seed=0)
    judgements = PROBLEM.judge([Answer(row, PROBLEM.demonstration(row, rng)) for row in rows])
    assert all(judgement.well_formed for judgement in judgements)
    assert 0.37 < sum(judgement.score for judgement in judgements) / 1000 < 0.46


def test_instances_have_an_overlap_and_whole_hours_in_the_day():
    for row in PROBLEM.rows("train", 0, 200, seed=1):
        assert any(overlaps(a, b) for a, b in combinations(row.instance.events, 2))
        assert all(480 <= e.start < e.end <= 1200 and e.start % 60 == e.end % 60 == 0 for e in row.instance.events)
        assert all(a.name < b.name for a, b in pairwise(row.instance.events))
