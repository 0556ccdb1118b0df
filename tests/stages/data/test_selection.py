"""Selection: which rollouts of a row become data, and why the others do not."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.selection import Candidate, Keep, candidate, control, funnel, normalised, select, similarity
from stages.problems.base import total
from stages.problems.scheduling.problem import Scheduling

ANY = Keep(min_score=0, per_prompt=99, dedup="off")
"""Keeps all that can be trained on."""


def one(score: float = 1.0, *, sample: int = 0, ids: tuple[int, ...] | None = None, **more) -> Candidate:
    ids = (sample,) if ids is None else ids
    fields = {
        "length": len(ids),
        "text": str(ids),
        "finished": True,
        "judged": True,
        "reward": score,
        "passed": score > 0,
    }
    return Candidate(**{"ids": ids, "score": score, "sample": sample, **fields, **more})


LINE = {
    "ids": [7, 7, 5, 6],
    "prefix": 2,
    "text": "yes",
    "finished": True,
    "failure": None,
    "score": 0.5,
    "rewards": {"a": 0.25},
    "sample": 4,
    "step": 9,
}
"""A rollout as `rollouts.line` has it."""


def group(*scores: float, ids: list[int] | None = None) -> list[Candidate]:
    """One rollout a score, with ids of its own unless they are given."""
    numbers = ids or range(len(scores))
    return [one(s, sample=i, ids=(n,)) for i, (s, n) in enumerate(zip(scores, numbers, strict=True))]


def kept(candidates: list[Candidate], keep: Keep) -> list[int]:
    return [i for i, choice in enumerate(select(candidates, keep)) if choice.rank]


@pytest.mark.parametrize(
    ("keep", "scores", "ids", "expected"),
    [
        (Keep(min_score=0.5, per_prompt=8), (0.4, 0.5, 1.0, 0.6), None, [1, 2, 3]),
        (Keep(min_score=0.5, per_prompt=2), (0.6, 0.5, 1.0, 0.6), None, [0, 2]),
        (Keep(min_score=0.5, per_prompt=8), (1.0, 1.0, 1.0, 0.7), [5, 6, 5, 7], [0, 1, 3]),
        (Keep(min_score=0.0, per_prompt=8), (0.0, 0.0), None, [0, 1]),
        (Keep(min_score=1.0), (0.99, 0.98), None, []),
        (Keep(min_score=0.5, pass_rate=(0.3, 0.7)), (1.0, 1.0, 1.0, 1.0), None, []),
        (Keep(min_score=0.5, pass_rate=(0.3, 0.7)), (1.0, 0.0, 0.0, 0.0), None, []),
        (Keep(min_score=0.5, pass_rate=(0.25, 0.25)), (1.0, 0.0, 0.0, 0.0), None, [0]),
    ],
)
def test_by_score_once_each_best_first_up_to_the_cap_within_the_band(keep, scores, ids, expected):
    assert kept(group(*scores, ids=ids), keep) == expected


@pytest.mark.parametrize("flaw", [{"finished": False}, {"judged": False, "passed": False}])
def test_what_was_cut_or_could_not_be_judged_is_never_kept(flaw):
    """It would teach not to stop; and nobody knows what it is worth."""
    assert kept([replace(one(sample=0), **flaw), one(sample=1)], ANY) == [1]


def test_what_could_not_be_judged_is_no_part_of_the_pass_rate():
    failed = replace(one(0.0, sample=1), judged=False, passed=False)
    assert kept([one(sample=0), failed], Keep(pass_rate=(1, 1))) == [0]
    assert kept([one(sample=0), one(0.0, sample=1)], Keep(pass_rate=(1, 1))) == []


def test_among_equal_scores_the_reward_decides_then_the_newest_policy_then_who_was_first():
    candidates = [
        one(sample=0, step=3), one(sample=1, step=7), one(sample=0), one(sample=1), one(sample=2, reward=2.0, step=1),
    ]  # fmt: skip
    candidates = [replace(c, ids=(i,)) for i, c in enumerate(candidates)]
    ranks = [choice.rank for choice in select(candidates, ANY)]
    assert ranks == [5, 4, 2, 3, 1]


def test_a_reward_is_the_weighted_sum_of_the_components_that_apply():
    assert total({"a": 1.0, "b": 0.5, "c": None}, {"a": 0.1, "b": 2.0, "c": 9.0}) == pytest.approx(1.1)
    assert total({"a": None}, {"a": 1.0}) is None
    line = {"ids": [7, 7, 5, 6], "prefix": 2, "text": "", "finished": True, "failure": None, "score": 0.5,
            "rewards": {"format": 1.0, "sorted": 0.0, "score": 0.5}, "sample": 4, "step": 9}  # fmt: skip
    problem = Scheduling("compact")
    found = candidate(line, {"format": 0.1, "sorted": 0.2, "score": 0.7}, problem.passed)
    assert (found.reward, found.length, found.passed, found.step) == (pytest.approx(0.45), 2, True, 9)
    assert kept([found], Keep(min_score=0, min_reward=0.44)) == [0] and not kept(
        [found], Keep(min_score=0, min_reward=0.46)
    )
    assert kept([found], Keep(min_score=0, max_length=2)) == [0] and not kept([found], Keep(min_score=0, max_length=1))


@pytest.mark.parametrize(
    ("change", "field", "expected"),
    [
        ({}, "judged", True),
        ({"failure": "timeout"}, "judged", False),
        ({}, "passed", True),
        ({"failure": "timeout"}, "passed", False),
        ({"score": 0.4}, "passed", False),
        ({}, "finished", True),
        ({"finished": False}, "finished", False),
        ({}, "sample", 4),
        ({}, "length", 2),
        ({}, "ids", (7, 7, 5, 6)),
        ({}, "text", "yes"),
        ({}, "step", 9),
        ({"step": None}, "step", None),
        ({}, "score", 0.5),
        ({}, "reward", 0.5),
        ({"rewards": {"a": None}}, "reward", float("-inf")),
    ],
)
def test_rules_see_of_a_rollout_what_its_line_says(change, field, expected):
    """With a pass from half a point on, which a failure never is, though its score of 0 may be enough for the
    problem."""
    found = candidate({**LINE, **change}, {"a": 2.0}, lambda score: score >= 0.5)
    assert getattr(found, field) == expected
    if "failure" in change:
        assert not candidate({**LINE, **change}, {"a": 2.0}, lambda score: True).passed


def test_left_alone_it_keeps_two_of_a_row_that_are_all_but_perfect():
    assert kept(group(0.98, 1.0, 0.99, 1.0), Keep()) == [1, 3]
    assert kept(group(0.98, 0.99), Keep()) == [1]
    assert kept(group(1.0, 1.0, ids=[5, 5]), Keep()) == [0]


@pytest.mark.parametrize("band", [(-0.1, 0.5), (0.5, 1.1), (0.9, 0.1)])
def test_a_band_is_two_shares_in_order(band):
    with pytest.raises(ValueError, match=r"pass_rate: found \["):
        Keep(pass_rate=band)


BAD = {"judged": False, "passed": False}
BREAKS = [
    ("judged", {}, BAD),
    ("pass_rate", {"pass_rate": (0.5, 1)}, {"passed": False}),
    ("finished", {}, {"finished": False}),
    ("min_score", {"min_score": 0.5}, {"score": 0.4}),
    ("min_reward", {"min_reward": 0.5}, {"reward": 0.4}),
    ("max_length", {"max_length": 9}, {"length": 10}),
    ("dedup", {"dedup": "exact"}, {"ids": (1, 2, 3, 4)}),
    ("max_similarity", {"max_similarity": 0.1}, {"ids": (1, 2, 3, 4)}),
    ("per_prompt", {"per_prompt": 1}, {}),
]  # fmt: skip
"""Rule -> settings with which it drops something, and what it drops beside `BETTER`."""
BETTER = one(0.9, sample=0, ids=(1, 2, 3, 4), passed=True)


@pytest.mark.parametrize(("first", "second"), [*combinations(BREAKS, 2)], ids=lambda rule: rule[0])
def test_a_rollout_that_two_rules_would_drop_is_counted_by_the_first(first, second):
    """In the order of docs/rejection.md, which is that of BREAKS."""
    flawed = replace(one(0.8, sample=1, ids=(5, 6, 7, 8)), **{**first[2], **second[2]})
    others = [BETTER] if {first[0], second[0]} & {"dedup", "max_similarity", "per_prompt"} else []
    if "pass_rate" in (first[0], second[0]):
        others = [replace(each, passed=False) for each in others]
    keep = Keep(**{**ANY.model_dump(), **first[1], **second[1]})
    assert select([flawed, *others], keep)[0].dropped_by == first[0]


def test_a_completion_that_was_cut_counts_in_the_pass_rate():
    """It was judged, and did not pass: a row whose answers are mostly too long is a hard one."""
    assert kept([one(sample=0), one(0.0, sample=1, finished=False)], Keep(pass_rate=(0.6, 1))) == []
    assert kept([one(sample=0), one(0.0, sample=1, finished=False)], Keep(pass_rate=(0.5, 1))) == [0]


def test_a_reward_that_is_exactly_the_least_is_enough():
    assert kept([one(sample=0, reward=0.5), one(sample=1, reward=0.49)], Keep(min_reward=0.5)) == [0]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Yes,  it\nis ", "yes, it is", True),
        ("ﬁne", "FINE", True),
        ("x²", "x2", True),
        ("straße", "STRASSE", True),
        ("1 2", "12", False),
        ("yes.", "yes", False),
    ],
)
def test_normalised_texts_are_the_same_but_for_case_space_and_compatibility(a, b, same):
    assert (normalised(a) == normalised(b)) == same
    pair = [one(0.9, sample=0, ids=(1,), text=a), one(1.0, sample=1, ids=(2,), text=b)]
    assert kept(pair, Keep(min_score=0, per_prompt=9, dedup="normalised")) == ([1] if same else [0, 1]), (
        "the better stays"
    )
    assert kept(pair, Keep(min_score=0, per_prompt=9)) == [0, 1]


def test_similarity_is_what_two_completions_share_of_all_their_pieces():
    first, second, third = tuple(range(8)), (*range(7), 99), tuple(range(50, 58))
    pieces = lambda ids: {ids[i : i + 4] for i in range(len(ids) - 3)}  # noqa: E731
    shared = len(pieces(first) & pieces(second)) / len(pieces(first) | pieces(second))
    assert similarity(frozenset(pieces(first)), frozenset(pieces(second))) == shared == pytest.approx(4 / 6)
    candidates = [one(sample=i, ids=ids) for i, ids in enumerate((first, second, third))]
    assert kept(candidates, Keep(min_score=0, per_prompt=9, max_similarity=0.66)) == [0, 2]
    assert kept(candidates, Keep(min_score=0, per_prompt=9, max_similarity=0.67)) == [0, 1, 2]
    short = [one(sample=0, ids=(1, 2)), one(sample=1, ids=(1, 3))]
    assert kept(short, Keep(min_score=0, per_prompt=9, max_similarity=0.0)) == [0, 1]


def test_no_other_choice_of_distinct_rollouts_has_a_higher_total_score():
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randint(0, 3) for _ in range(6)]
        by_id = {number: rng.choice([0.0, 0.3, 0.6, 1.0]) for number in range(4)}  # equal ids score the same
        candidates = group(*[by_id[number] for number in ids], ids=ids)
        keep = Keep(min_score=0.3, per_prompt=rng.randint(1, 3))
        picked = kept(candidates, keep)
        good = [i for i, c in enumerate(candidates) if c.score >= 0.3]
        choices = (
            c for n in range(keep.per_prompt + 1) for c in combinations(good, n) if len({ids[i] for i in c}) == len(c)
        )
        best = max(sum(candidates[i].score for i in choice) for choice in choices)
        assert sum(candidates[i].score for i in picked) == pytest.approx(best)
        assert len({ids[i] for i in picked}) == len(picked) <= keep.per_prompt


CANDIDATES = st.lists(
    st.builds(
        lambda score, reward, ids, finished, judged, step: one(
            score,
            ids=tuple(ids),
            reward=reward,
            finished=finished,
            judged=judged,
            passed=judged and score > 0,
            step=step,
            text="".join("aA bB"[i] for i in ids),
        ),
        st.sampled_from([0.0, 0.5, 1.0]),
        st.sampled_from([0.1, 0.9]),
        st.lists(st.integers(0, 4), min_size=1, max_size=7),
        st.booleans(),
        st.booleans(),
        st.sampled_from([None, 1, 2]),
    ),
    max_size=9,
).map(lambda found: [replace(c, sample=i) for i, c in enumerate(found)])
KEEPS = st.builds(
    Keep,
    min_score=st.sampled_from([0.0, 0.5, 1.0]),
    min_reward=st.sampled_from([None, 0.5]),
    max_length=st.sampled_from([None, 3]),
    dedup=st.sampled_from(["exact", "normalised", "off"]),
    max_similarity=st.sampled_from([None, 0.0, 0.5]),
    per_prompt=st.integers(1, 4),
    pass_rate=st.sampled_from([None, (0.2, 0.8)]),
)


@settings(max_examples=300, deadline=None)
@given(CANDIDATES, KEEPS, st.randoms(use_true_random=False))
def test_every_rule_holds_for_what_is_kept_and_the_funnel_adds_up(candidates, keep, rng):
    choices = select(candidates, keep)
    picked = [c for c, choice in zip(candidates, choices, strict=True) if choice.rank]
    assert all(c.judged and c.finished and c.score >= keep.min_score for c in picked)
    assert all(c.reward >= (keep.min_reward or 0) and c.length <= (keep.max_length or 99) for c in picked)
    assert len(picked) <= keep.per_prompt and sorted(c.rank for c in choices if c.rank) == [*range(1, len(picked) + 1)]
    assert all((choice.rank is None) != (choice.dropped_by is None) for choice in choices)
    counts = [*funnel(choices).values()]
    assert (
        counts[0] == len(candidates)
        and counts[-1] == counts[-2] == len(picked)
        and counts == sorted(counts, reverse=True)
    )
    shuffled = rng.sample(candidates, len(candidates))
    again = {c.sample for c, choice in zip(shuffled, select(shuffled, keep), strict=True) if choice.rank}
    assert again == {c.sample for c in picked}, "the order they come in does not matter"
    if keep.pass_rate is None:
        assert kept(picked, keep) == [*range(len(picked))], "what was kept is kept again"


def test_a_control_is_as_many_drawn_whatever_they_scored():
    candidates = [*group(1.0, 0.0, 0.0, 0.5), one(sample=4, finished=False), replace(one(sample=5), judged=False)]
    drawn = [tuple(control(candidates, 2, random.Random(seed))) for seed in range(4000)]
    assert set(drawn) == set(combinations(range(4), 2))
    shares = [drawn.count(pair) / len(drawn) for pair in set(drawn)]
    assert max(abs(share - 1 / 6) for share in shares) < 0.03
    assert drawn[0] == tuple(control(candidates, 2, random.Random(0)))
