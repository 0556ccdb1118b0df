"""The audit tells what a reward pays for: every rule by hand, on problems that are broken in one way each."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from stages.errors import BadInput
from stages.job import Format
from stages.problems import catalog
from stages.problems.base import Answer, Judgement, Row, row_id
from stages.problems.catalog import PROBLEMS
from stages.rewards.audit import baselines
from stages.rewards.audit.audit import Report, audit
from stages.rewards.audit.component_rules import rank_correlation

FORMAT = Format(
    prompt="p", prompt_digest="", system_prompt="Add.", user_template="What is {{ prompt }}?", response_prefix=""
)


@dataclass(frozen=True)
class SumRow(Row):
    answer: str


@dataclass(frozen=True)
class Sums:
    """Sums up to 18, answered `<a>7</a>`. What is broken in a test is what it gives."""

    weights: Mapping[str, float] = None  # type: ignore[assignment]
    more: Any = lambda row, text: {}
    """Further rewards of an answer, or others in the place of these."""
    known: Any = lambda row: {"off_by_one": f"<a>{int(row.answer) + 1}</a>", "gold": f"<a>{row.answer}</a>"}
    score: Any = lambda row, text: float(text == f"<a>{row.answer}</a>")
    failure: Any = lambda row, text: None

    outcomes = ("format", "wrong", "right")

    @property
    def reward_weights(self) -> Mapping[str, float]:
        return self.weights or {"format": 0.2, "correct": 0.8}

    def rows(self, split, start, stop, seed) -> list[Row]:
        rng = random.Random(seed)
        numbers = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(stop)]
        return [SumRow(row_id([a, b, i]), f"{a} + {b}", str(a + b)) for i, (a, b) in enumerate(numbers)][start:]

    def row(self, columns: Mapping[str, Any]) -> Row:
        raise NotImplementedError

    def demonstration(self, row: Row, rng: random.Random) -> str:
        raise NotImplementedError

    def baselines(self, row: Row, rng: random.Random) -> Mapping[str, str]:
        return self.known(row)

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        return [self.one(answer.row, answer.text) for answer in answers]

    def one(self, row: Any, text: str) -> Judgement:
        if failure := self.failure(row, text):
            return Judgement(0.0, "format", False, False, dict.fromkeys(self.reward_weights), failure)
        formed = text.startswith("<a>") and text.removeprefix("<a>").removesuffix("</a>").isdigit()
        right = text == f"<a>{row.answer}</a>"
        rewards = {"format": float(formed), "correct": float(right), **self.more(row, text)}
        outcome = "right" if right else "wrong" if formed else "format"
        return Judgement(self.score(row, text), outcome, right, formed, {n: rewards[n] for n in self.reward_weights})

    def passed(self, score: float) -> bool:
        return score > 0


def audited(problem: Sums, format: Format = FORMAT, rows: int = 40) -> Report:
    asked, astray = baselines.of_rows(problem, problem.rows("train", 0, rows, 0), format, 0)
    return audit("rl1", problem, asked, astray)


def rules(problem: Sums, **more: Any) -> dict[str, str]:
    """Rule -> severity"""
    return {finding.rule: finding.severity for finding in audited(problem, **more).findings}


def line(report: Report, name: str):
    return next(line for line in report.baselines if line.name == name)


def test_a_reward_that_pays_what_is_right_has_nothing_said_against_it():
    report = audited(Sums())
    assert report.findings == ()
    assert (report.range.least, report.range.greatest, report.range.source) == (0.0, 1.0, "seen")
    gold, wrong = report.baselines[0], line(report, "off_by_one")
    assert (gold.name, gold.own, gold.rows, gold.outcomes) == ("gold", True, 40, {"right": 40})
    assert (gold.reward, gold.share, gold.score) == pytest.approx((1, 1, 1))
    assert (wrong.reward, wrong.share, wrong.score) == pytest.approx((0.2, 0.2, 0))
    assert wrong.rewards == {"format": 1.0, "correct": 0.0} and wrong.outcomes == {"wrong": 40}
    assert (line(report, "empty").reward, line(report, "empty").own) == (0.0, False)


def test_a_share_is_of_the_range_that_was_seen_whatever_the_scale_of_the_rewards():
    """Malformed -10, wrong 2, right 6: wrong stands at 12/16."""

    def steps(row, text):
        return {"correct": 6.0 if text == f"<a>{row.answer}</a>" else 2.0 if text[:3] == "<a>" else -10.0}

    report = audited(Sums({"correct": 1.0}, steps))
    assert (report.range.least, report.range.greatest) == (-10, 6)
    assert line(report, "off_by_one").share == pytest.approx(12 / 16)
    assert line(report, "empty").share == 0 and line(report, "gold").share == 1


def test_without_gold_the_range_is_what_would_be_possible_and_it_is_said():
    """Nobody earned `correct`, so the .2 for the form is not the whole range."""
    report = audited(
        Sums(known=lambda row: {"seven": "<a>7</a>x"}, more=lambda row, text: {"format": float("x" in text)})
    )
    assert (report.range.least, report.range.greatest, report.range.source) == (0.0, 1.0, "possible")
    assert line(report, "seven").share == pytest.approx(0.2)
    assert {finding.rule: finding.severity for finding in report.findings} == {"no_baselines": "note"}


@pytest.mark.parametrize(("paid", "flagged"), [(0.25, False), (0.26, True), (0.7, True)])
def test_a_wrong_answer_that_is_paid_like_a_right_one_is_flagged(paid, flagged):
    """A wrong answer of the right form gets .2 + .8 x paid and scores 0, so .25 is just at the threshold."""

    def pays(row, text):
        return {"correct": 1.0 if text == f"<a>{row.answer}</a>" else paid * (text[:3] == "<a>")}

    found = [one for one in audited(Sums(more=pays)).findings if one.rule == "exploitable"]
    assert any("off_by_one earns" in one.advice for one in found) == flagged
    for one in found:
        assert one.severity == "warn" and one.stage == "rl1"
        assert one.evidence["gap"] == pytest.approx(one.evidence["reward_share"] - one.evidence["score"])


def test_the_weights_of_the_stage_go_before_those_of_the_problem():
    """A stage that pays 3 for the form and .8 for a right answer pays for the form alone."""
    problem = Sums()
    asked, astray = baselines.of_rows(problem, problem.rows("train", 0, 40, 0), FORMAT, 0)
    others = [("problem.good=1", Sums({"format": 0.5, "correct": 0.5}))]
    report = audit("rl1", problem, asked, astray, others, {"format": 3.0})
    assert report.weights == {"format": 3.0, "correct": 0.8}
    assert line(report, "off_by_one").share == pytest.approx(3 / 3.8)
    flags = [one for one in report.findings if one.rule == "exploitable"]
    assert flags and {one.override for one in flags} == {None}, "the stage's weights stay, whatever the problem's are"


def test_what_pays_a_baseline_is_named_with_what_it_pays():

    def pays(row, text):
        return {"correct": 1.0 if text == f"<a>{row.answer}</a>" else 0.7 * (text[:3] == "<a>")}

    (advice,) = (one.advice for one in audited(Sums(more=pays)).findings if one.advice.startswith("off_by_one earns"))
    assert "76.0 of 100 reward and 0.0 of 100 score" in advice and "correct 0.56, format 0.2" in advice


def off_by_one(row):
    return f"<a>{int(row.answer) + 1}</a>"


def pays_the_form(row, text):
    return {"correct": 1.0 if text == f"<a>{row.answer}</a>" else 0.7 * (text[:3] == "<a>")}


def test_a_setting_that_mends_a_flag_is_found_by_trying_it():
    """Two changes take the flag away; one of them takes gold's worth with it."""
    problem = Sums(more=pays_the_form)
    asked, astray = baselines.of_rows(problem, problem.rows("train", 0, 40, 0), FORMAT, 0)
    others = [
        ("problem.bad=1", Sums(score=lambda row, text: 0.0)),
        ("problem.idle=1", problem),
        ("problem.good=1", Sums()),
    ]
    found = [one for one in audit("rl1", problem, asked, astray, others).findings if one.rule == "exploitable"]
    assert {one.override for one in found} == {"problem.good=1"}
    assert {one.override for one in audit("rl1", problem, asked, astray, others[:2]).findings} == {None}


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (Sums(score=lambda row, text: 0.0), "40 do not pass"),
        (Sums(score=lambda row, text: 0.5 + 0.5 * (text == off_by_one(row))), "40 score less than another answer"),
        (Sums(more=lambda row, text: {"correct": 2.0 * (text == off_by_one(row))}), "40 earn less than an answer "
                                                                                    "with a lower score"),
        (Sums({"correct": -1.0}), "40 earn less"),
    ],
    ids=["scored_by_nobody", "outscored", "outpaid", "weight_with_the_wrong_sign"],
)  # fmt: skip
def test_a_gold_answer_that_is_not_at_the_top_stops(problem, says):
    first = audited(problem).findings[0]
    assert (first.rule, first.severity, first.evidence["share"]) == ("gold", "stop", 1.0)
    assert says in first.advice


@pytest.mark.parametrize(
    ("wrong", "rows", "severity"),
    [(0, 40, None), (2, 40, "warn"), (3, 40, "stop"), (1, 10, "warn"), (2, 10, "stop"), (1, 1, "stop")],
)
def test_a_few_wrong_gold_answers_are_a_warning_and_many_stop(wrong, rows, severity):
    """Of 40, 2 are one in twenty; one of 10 may be an odd row."""
    last = {row.id for row in Sums().rows("train", rows - wrong, rows, 0)}
    problem = Sums(known=lambda row: {"gold": f"<a>{int(row.answer) + (row.id in last)}</a>"})
    assert rules(problem, rows=rows).get("gold") == severity


def test_an_answer_as_good_as_gold_that_earns_more_does_not_stop():
    """Spaces around a right answer are right, too, and here they are paid."""
    problem = Sums(
        {"correct": 1.0},
        known=lambda row: {"gold": f"<a>{row.answer}</a>", "spaced": f" <a>{row.answer}</a>"},
        more=lambda row, text: {
            "correct": float(text.strip() == f"<a>{row.answer}</a>") * (1 + 0.1 * (text[0:1] == " "))
        },
        score=lambda row, text: float(text.strip() == f"<a>{row.answer}</a>"),
    )
    (finding,) = (one for one in audited(problem).findings if one.rule == "gold")
    assert finding.severity == "warn" and "scores as much (most often spaced)" in finding.advice


def test_a_gold_answer_without_the_right_form_is_said():
    """What is right here is said in words; the form asks for digits."""
    problem = Sums(
        known=lambda row: {"gold": f"<a>{row.answer} in words</a>"},
        score=lambda row, text: float("in words" in text),
        more=lambda row, text: {"correct": float("in words" in text)},
    )
    (finding,) = (one for one in audited(problem).findings if one.rule == "gold_form")
    assert finding.severity == "warn" and "40 of 40 gold answers do not have the right form" in finding.advice


def test_every_answer_starts_with_the_response_prefix_as_a_rollout_does():
    format = replace_prefix("<a>")
    asked, astray = baselines.of_rows(Sums(), Sums().rows("train", 0, 12, 0), format, 0)
    assert astray == 0 and all(one.answer.text.startswith("<a>") for one in asked)
    texts = {one.name: one.answer.text for one in asked if one.row == 0}
    assert texts["empty"] == "<a>" and texts["gold"].count("<a>") == 1
    assert texts["prompt_copied"].startswith("<a>Add.\n\nWhat is ")


def replace_prefix(prefix: str) -> Format:
    return FORMAT.model_copy(update={"response_prefix": prefix})


@pytest.mark.parametrize(
    ("start", "text", "written"),
    [
        ("", "<a>7</a>", "<a>7</a>"),
        ("<a>", "<a>7</a>", "<a>7</a>"),
        ("<a>", "", "<a>"),
        ("<think>\nOkay", "<think>\n\n</think>", "<think>\nOkay\n</think>"),
        ("So: ", "<a>7</a>", "So: <a>7</a>"),
    ],
)
def test_an_answer_goes_on_from_the_prefix(start, text, written):
    assert baselines.continued(start, text) == written


def test_a_gold_that_no_rollout_can_be_like_is_said():
    assert rules(Sums(), format=replace_prefix("<a>")) == {}
    found = audited(Sums(), format=replace_prefix("So: ")).findings
    assert [one.rule for one in found][:2] == ["gold", "gold_prefix"] and found[1].evidence == {"rows": 40}


class Drawing(Sums):
    """With a baseline that is drawn."""

    def baselines(self, row, rng):
        return {"drawn": str(rng.random())}


def test_a_row_is_played_in_the_same_way_whatever_rows_are_with_it():
    rows = Sums().rows("train", 0, 30, 0)
    all, alone, other = (
        baselines.of_rows(Drawing(), part, FORMAT, seed)[0]
        for part, seed in ((rows, 5), (rows[7:8], 5), (rows[7:8], 6))
    )
    drawn = [[one.answer.text for one in part if one.name == "drawn"] for part in (all, alone, other)]
    assert drawn[0][7:8] == drawn[1] != drawn[2] and len(set(drawn[0])) == 30


def test_a_baseline_that_is_no_text_is_bad_input():
    with pytest.raises(BadInput, match=r"its baseline gold of row .* is of type int, expected text"):
        audited(Sums(known=lambda row: {"gold": 7}))


def test_hostile_texts_are_played_on_a_few_rows_only():
    report = audited(Sums())
    hostile = [line for line in report.baselines if line.name.startswith("hostile_")]
    assert len(hostile) == 8 and {line.rows for line in hostile} == {baselines.HOSTILE_ROWS} == {10}


def test_the_problems_own_baseline_goes_before_a_general_one_of_the_same_name():
    report = audited(Sums(known=lambda row: {"gold": f"<a>{row.answer}</a>", "empty": "<a></a>"}))
    assert line(report, "empty").own and line(report, "empty").rows == 40


def always(name, value):
    return lambda row, text: {name: value}


WEIGHTS = {"format": 0.2, "correct": 0.7, "style": 0.1}


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (Sums(WEIGHTS, always("style", 0.5)), {"constant": "warn"}),
        (Sums(WEIGHTS, lambda row, text: {"style": float(row.prompt.startswith("9") and "<a>" in text)}), {}),
        (Sums({"format": 0.02, "correct": 0.98}), {"dominated": "warn"}),
        (
            Sums(
                {"format": 0.5, "correct": 0.5}, lambda row, text: {"correct": 100.0 * (text == f"<a>{row.answer}</a>")}
            ),
            {"dominated": "warn"},
        ),
        (Sums({"correct": 1.0}), {}),
        (Sums(WEIGHTS, lambda row, text: {"style": float("<a>" not in text)}), {"disagree": "warn"}),
        (Sums({**WEIGHTS, "style": -0.1}, lambda row, text: {"style": min(1.0, len(text) / 1e6)}), {}),
        (Sums(score=lambda row, text: float("<a>" in text)), {"unearned": "warn"}),
        (Sums(failure=lambda row, text: "timeout" if len(text) > 1000 else None), {"failures": "warn"}),
    ],
    ids=[
        "constant",
        "rare_is_not_constant",
        "dominated_by_weight",
        "dominated_by_size",
        "one_component_may_dominate",
        "disagrees",
        "a_penalty_that_agrees",
        "unearned",
        "failures",
    ],
)
def test_each_way_to_be_broken_has_its_rule(problem, expected):
    assert rules(problem) == expected


def advice(problem: Sums, rule: str) -> list[str]:
    return [finding.advice for finding in audited(problem).findings if finding.rule == rule]


@pytest.mark.parametrize("known", [Sums.known, lambda row: {}], ids=["gold", "no_gold"])
def test_weights_of_nothing_are_said_with_or_without_gold(known):
    (said,) = advice(Sums({"format": 0.0, "correct": 0.0}, known=known), "constant")
    assert said.endswith(
        "earn 0, the best and the worst, so training learns nothing: every weight is 0; give them weights"
    )


def test_components_that_cancel_out_are_said_and_one_constant_component_is_said_once():
    def opposite(row, text):
        return {"correct": float(text == f"<a>{row.answer}</a>"), "style": -float(text == f"<a>{row.answer}</a>")}

    (said,) = advice(Sums({"correct": 0.5, "style": 0.5}, opposite), "constant")
    assert "answers earn 0, " in said and "their components cancel out" in said
    (said,) = advice(Sums({"style": 1.0}, always("style", 0.5)), "constant")
    assert said.startswith("style is 0.5 for all")
    assert advice(Sums(known=lambda row: {}, more=always("correct", 0.0)), "constant") == []


@pytest.mark.parametrize("known", [Sums.known, lambda row: {}], ids=["gold", "no_gold"])
def test_a_component_that_never_applies_is_said(known):
    (said,) = advice(Sums(WEIGHTS, always("style", None), known=known), "absent")
    assert said.startswith("style is None for all ") and "pays nothing" in said
    assert advice(Sums(known=known, failure=lambda row, text: "timeout"), "absent") == [], "nothing was judged"


def test_what_penalties_do_not_cost_is_named_where_nothing_is_paid():
    """Saying nothing earns 0: of -1..0.25 that is .8, without a component that pays it."""

    def long(row, text):
        return {"length": min(1.0, len(text) / 8), "correct": 0.25 * (text == f"<a>{row.answer}</a>")}

    said = advice(Sums({"length": -1.0, "correct": 1.0}, long), "exploitable")
    (empty,) = (one for one in said if one.startswith("empty earns"))
    assert (
        "it is paid by nothing, and spared what costs other answers (length 1): let a right answer earn more" in empty
    )


def test_a_penalty_that_rises_with_the_score_is_said_to():
    (said,) = advice(Sums({"format": 0.5, "correct": -0.5}), "disagree")
    assert said.startswith(
        "correct has a negative weight and rises with the score (rank correlation +1.00), so it leads away"
    )


def test_more_than_the_whole_variance_is_no_percentage():
    """A penalty that rises with what is right takes some of it away again: of the variance, correct has 1.02."""

    def pulled(row, text):
        right = float(text == f"<a>{row.answer}</a>")
        return {"correct": right, "style": -0.02 * right}

    (said,) = advice(Sums({"correct": 0.5, "style": 0.5}, pulled), "dominated")
    assert said.startswith("correct decides the reward against the components that pull the other way, so")


def test_a_gold_by_another_name_is_asked_after():
    (said,) = advice(Sums(known=lambda row: {"Gold": f"<a>{row.answer}</a>", "wrong": "<a>1</a>"}), "no_baselines")
    assert said.startswith(
        "the problem's baselines are Gold, wrong, and none is named gold (did you mean gold by Gold?)"
    )
    (said,) = advice(Sums(known=lambda row: {"seven": "<a>7</a>"}), "no_baselines")
    assert "baselines are seven, and none is named gold, so" in said
    with pytest.raises(BadInput, match=r"a baseline of row .* is named ''; give it a name, gold for the best"):
        audited(Sums(known=lambda row: {"": "x"}))


def test_a_component_that_even_good_answers_rarely_earn_is_sparse():
    """Of 80 well-formed answers of the problem's own, 4 earn it: one in twenty. With 12 of 80 it is more than one in
    ten."""
    for rows, flagged in ((4, True), (12, False)):
        lucky = {row.id for row in Sums().rows("train", 0, rows, 0)}

        def bonus(row, text, lucky=lucky):
            return {"style": float(row.id in lucky and text == f"<a>{row.answer}</a>")}

        found = [one for one in audited(Sums(WEIGHTS, bonus)).findings if one.rule == "sparse"]
        assert bool(found) == flagged


def test_failures_are_counted_and_earn_nothing():
    report = audited(Sums(failure=lambda row, text: "timeout" if len(text) > 1000 else None))
    long = line(report, "hostile_long")
    assert (long.reward, long.share, long.score, long.failures) == (None, None, 0.0, {"timeout": 10})
    (finding,) = report.findings
    assert finding.evidence["timeout"] == sum(one.failures.get("timeout", 0) for one in report.baselines) >= 10


def test_a_judge_that_takes_the_right_answer_among_many_wrong_ones_is_flagged():
    """Here, too, the right answer said three times is right."""

    def says(row, text):
        return float(f"<a>{row.answer}</a>" in text)

    found = audited(Sums(score=says, more=lambda row, text: {"correct": says(row, text)})).findings
    assert [one.advice.split()[0] for one in found if one.rule == "unearned"] == ["hostile_many_answers"]


def test_one_answer_that_is_right_for_most_rows_is_flagged():
    """Everybody's answer is 4 but one row's in ten."""

    class Easy(Sums):
        def rows(self, split, start, stop, seed):
            return [SumRow(str(i), f"{i} + 0", "4" if i % 10 else "5") for i in range(start, stop)]

    (finding,) = audited(Easy()).findings
    assert finding.rule == "unearned" and finding.evidence["score"] == pytest.approx(0.9)
    assert "one_answer scores 90.0 of 100: one class of rows outweighs the others" in finding.advice


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation([1, 1], [0, 1]) is None and rank_correlation([], []) is None


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_built_in_problem_stands_its_audit(name):
    """Nothing raises, and no gold answer is beaten."""
    problem = catalog.load({"name": name, **({"form": "compact"} if name == "scheduling" else {})})
    asked, astray = baselines.of_rows(problem, problem.rows("train", 0, 30, 0), FORMAT, 0)
    found = audit("rl1", problem, asked, astray).findings
    assert "stop" not in [finding.severity for finding in found]
