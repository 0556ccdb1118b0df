"""Answers without a score: a row that has none counts in no mean, and where no row has one nothing is trained."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import trl.rewards

from pipeline.results import evaluations
from stages.data.rollouts import Rollout, has_score
from stages.evaluate import Evaluate, summarise, unscored
from stages.intervals import wilson_interval
from stages.job import Format, read_evaluation
from stages.problems import catalog
from stages.problems.base import Answer, Judgement, passes
from stages.problems.custom import rewards_worker
from stages.problems.custom.rewards_worker import as_text
from stages.problems.custom.user_modules import UserModules
from stages.rewards.audit import baselines
from stages.rewards.audit.audit import audit
from tests.conftest import run_cli

FILE = """
REWARDS = {"right": 1.0, "short": 1.0}
def rows(rng):
    for n in range(400):
        yield {"prompt": f"{n}?", "n": n}
def rewards(row, completion):
    if completion == "none":
        return {"right": None, "short": None}
    return {"right": 0.5, "short": None}
def score(row, completion):
    return {"unscored": None, "bad": 2.0}.get(completion, float(completion == "yes"))
"""
REWARDS = """
def one(completions, **kwargs):
    return [None if c[0]["content"] == "none" else float(c[0]["content"] == "yes") for c in completions]
def two(completions, **kwargs):
    return [0.5] * len(completions)
def never(completions, **kwargs):
    return [None] * len(completions)
"""
FORMAT = Format(prompt="p", prompt_digest="", system_prompt="", user_template="{{ prompt }}", response_prefix="")


def own_file(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    return catalog.load({"file": str(tmp_path / "mine.py"), "max_failures": 1.0, "workers": 1})


def dataset(tmp_path, *rewards):
    (tmp_path / "r.py").write_text(REWARDS)
    lines = [json.dumps({"prompt": f"{n}?", "gold": "yes"}) for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    named = [f"{tmp_path / 'r.py'}:{name}" for name in rewards]
    return catalog.load({"dataset": str(tmp_path / "rows.jsonl"), "gold": "gold", "rewards": named, "workers": 1})


def test_an_answer_has_no_score_where_it_is_none_or_no_component_applies(tmp_path):
    problem = own_file(tmp_path)
    (row,) = problem.rows("train", 0, 1, 0)
    texts = ("yes", "no", "none", "unscored", "bad")
    judged = problem.judge([Answer(row, text) for text in texts])
    assert [one.scored for one in judged] == [True, True, False, False, True]
    assert [one.outcome for one in judged] == ["passed", "wrong", "unscored", "unscored", "failed"]
    assert [one.score for one in judged] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert judged[3].rewards == {"right": 0.5, "short": None}, "it may be trained all the same"
    assert [passes(problem, one) for one in judged] == [True, False, False, False, False]
    problem.guard.close()
    other = dataset(tmp_path, "one", "two")
    (row,) = other.rows("train", 0, 1, 0)
    judged = other.judge([Answer(row, text) for text in ("yes", "no", "none")])
    assert [(one.scored, one.score) for one in judged] == [(True, 1.0), (True, 0.0), (False, 0.0)]
    other.guard.close()


def rollout(score: float | None) -> Rollout:
    scored = score is not None
    judgement = Judgement(score or 0.0, "x" if scored else "unscored", score == 1, scored, {}, scored=scored)
    return Rollout(([], ""), ([], ""), "t", judgement, True)


def summarised(greedy, sampled):
    player = SimpleNamespace(
        problem=SimpleNamespace(passed=lambda score: score >= 1, outcomes=("x", "unscored")),
        seen_format=lambda: FORMAT,
    )
    job = SimpleNamespace(inputs={"policy": "p"}, sources={"policy": "p"}, seed=0)
    groups = [[rollout(score) for score in group] for group in sampled]
    return summarise(job, Evaluate(samples=2), "held_out", player, [rollout(score) for score in greedy], groups)


def test_rows_without_a_score_are_in_no_mean_and_other_answers_without_one_count_as_0():
    """Four rows: all scored; none scored; one sample without a score; only the greedy answer with one."""
    found = summarised([1.0, None, 0.5, 1.0], [[1.0, 0.0], [None, None], [None, 1.0], [None, None]])
    assert (found.rows, found.unscored) == (4, 1)
    assert found.greedy == pytest.approx((1 + 0.5 + 1) / 3) and found.mean == pytest.approx((1 + 0 + 0 + 1 + 0 + 0) / 6)
    assert found.solved == pytest.approx(2 / 6) and found.pass_at_k == pytest.approx({"1": 2 / 6, "2": 2 / 3})
    assert found.outcomes == {"x": 3 / 8, "unscored": 5 / 8}, "outcomes are of all samples"


def test_without_a_row_that_has_a_score_there_is_no_mean(tmp_path):
    found = summarised([None, None], [[None, None], [None, None]])
    assert found.unscored == 2 and found.pass_at_k == {}
    assert [found.greedy, found.mean, found.interval, found.solved, found.format] == [None] * 5
    (tmp_path / "e.json").write_text(found.model_dump_json())
    assert read_evaluation(tmp_path / "e.json") == found


def test_an_empty_interval_of_an_earlier_version_is_read_as_wilsons(tmp_path):
    found = summarised([0.0] * 9, [[0.0, 0.0]] * 9)
    assert found.interval == wilson_interval(0, 9)
    old = found.model_dump(mode="json") | {"interval": [0.0, 0.0]}
    del old["unscored"]
    (tmp_path / "e.json").write_text(json.dumps(old))
    assert read_evaluation(tmp_path / "e.json") == found


def test_what_is_left_out_is_a_finding():
    greedy = [rollout(score) for score in (1.0, None, 0.5)]
    sampled = [[rollout(score) for score in group] for group in ([1.0, 0.0], [None, None], [None, 1.0])]
    assert [has_score((best, *group)) for best, group in zip(greedy, sampled, strict=True)] == [True, False, True]
    rows, answers = unscored("base.evaluate", "held_out", greedy, sampled)
    assert (rows.rule, rows.evidence) == ("rows_without_score", {"rows": 3, "left_out": 1})
    assert (answers.rule, answers.evidence) == ("answers_without_score", {"answers": 1})
    assert [*unscored("base.evaluate", "held_out", greedy[:1], sampled[:1])] == []


def line(row, greedy, samples):
    return {"row": row, "greedy": {"score": greedy}, "samples": [{"score": score} for score in samples]}


def test_a_paired_difference_is_of_the_rows_to_which_both_have_a_score():
    """Three rows: both scored; one scored by the first only; some samples without a score, which count as 0."""
    a = [line("1", 1.0, [1.0, 1.0]), line("2", 1.0, [1.0, 1.0]), line("3", 0.0, [None, 1.0])]
    b = [line("1", 0.0, [0.0, 1.0]), line("2", None, [None, None]), line("3", 0.0, [0.0, 0.0])]
    ours, theirs = ({one["row"]: evaluations.mean_score(one) for one in lines} for lines in (a, b))
    assert ours == {"1": 1.0, "2": 1.0, "3": 0.5} and theirs == {"1": 0.5, "2": None, "3": 0.0}
    assert evaluations.paired(ours, theirs) == [0.5, 0.5]
    assert evaluations.paired(theirs, dict.fromkeys(theirs)) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((148, "148"), (-3, "-3"), (0.5, "0.5"), (1e-5, "0.00001"), (1e21, "1" + 21 * "0"), (10**30, str(10**30))),
        *(("7", "7"), (None, None), (True, "true"), ([1, "è"], '[1, "è"]')),
    ],
)  # fmt: skip
def test_a_reference_answer_reaches_rewards_of_trl_as_text(value, text):
    assert as_text(value) == text


def test_a_reward_of_trl_is_given_text_and_one_of_ones_own_what_the_file_has():
    def exact(completions, solution, **kwargs):
        return [float(one == "148") for one in solution]

    asked = {"prompts": [], "completion_ids": [], "completions": ["a", "b"], "columns": {"solution": [148, "148"]}}
    assert rewards_worker._judge({"own": exact}, asked) == [{"own": 0.0}, {"own": 1.0}]
    assert rewards_worker._judge({"text": rewards_worker._given_text(exact)}, asked) == [{"text": 1.0}, {"text": 1.0}]
    named = {"path": None, "name": "think_format", "component": "think_format", "arguments": {}}
    theirs = rewards_worker._load(named, UserModules())
    assert theirs.__wrapped__ is trl.rewards.think_format_reward, "each of TRL's is given text"
    assert rewards_worker._needs(rewards_worker._given_text(exact)) == ["solution"]


def test_an_audit_stops_where_no_answer_has_a_score_and_names_the_likely_cause(tmp_path):
    problem = dataset(tmp_path, "never")
    asked, astray = baselines.of_rows(problem, problem.rows("train", 0, 5, 0), FORMAT, 0)
    found = {one.rule: one for one in audit("rl1", problem, asked, astray).findings}
    assert found["no_score"].severity == "stop" and found["absent"].severity == "warn"
    problem.guard.close()

    class Unreadable:
        """A dataset whose reference answers math-verify cannot read."""

        def __getattr__(self, name):
            return getattr(problem, name)

        def why_none(self, component, row):
            settings = problem.settings.model_copy(update={"rewards": ("accuracy",), "answer": "gold"})
            return type(problem).why_none(SimpleNamespace(settings=settings), "accuracy", row)

    found = {one.rule: one for one in audit("rl1", Unreadable(), asked, astray).findings}
    cause = "(math-verify reads no number or formula in the reference answers, such as 'yes')"
    assert cause in found["absent"].advice and cause in found["no_score"].advice
    problem.guard.close()


def test_a_run_ends_with_3_before_training_where_no_row_has_a_score(settings, write, tmp_path):
    """Also when the evaluation of the base was made by an earlier run, and where rewards are not audited."""
    dataset(tmp_path, "never")
    settings |= {
        "problem": {"dataset": str(tmp_path / "rows.jsonl"), "rewards": [f"{tmp_path / 'r.py'}:never"], "workers": 1},
        "evaluate": {"rows": 3, "samples": 1, "max_completion_length": 2},
        "validation": {"rows": 3},
        "format": {"prompt": "plain", "response_prefix": ""},
    }
    settings["stages"] = [{**settings["stages"][1], "policy": "base", "rows": "train[0:4]", "audit": False}]
    runs = [run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect") for _ in range(2)]
    for done in runs:
        assert done.returncode == 3 and "base.evaluate: none of the 3 " in done.stderr, done
    assert "mean -, because none of 3 rows has a score" in runs[0].stdout
    made = [path.name for path in (tmp_path / "r" / "artifacts").iterdir()]
    assert len(made) == 1 and "evaluate" in made[0]
