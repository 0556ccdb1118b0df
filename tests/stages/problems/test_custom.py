"""Problems of one's own, from the recipe to the registry, and the starter."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pipeline import starter
from stages.errors import BadInput, TooManyFailures
from stages.job import Format
from stages.problems import catalog
from stages.problems.base import Answer
from stages.problems.files import rows as rows_of
from stages.rewards.audit import baselines
from stages.rewards.audit.audit import audit
from tests.conftest import run_cli

FORMAT = Format(prompt="p", prompt_digest="", system_prompt="", user_template="{{ prompt }}", response_prefix="")
REWARDS = """
import asyncio, time
def exact(completions, solution, **kwargs):
    found = []
    for completion, wanted in zip(completions, solution):
        text = completion[0]["content"]
        if text == "sleep":
            time.sleep(1000)
        if text == "raise":
            raise KeyError("x")
        found.append(None if text == "none" else float(text == wanted))
    return found
async def brevity(prompts, completions, completion_ids, n, **kwargs):
    assert prompts[0][0]["role"] == "user" and len(n) == len(completion_ids)
    await asyncio.sleep(0)
    return [-len(completion[0]["content"]) / 100 for completion in completions]
def short(completions, **kwargs):
    return [1.0] * (len(completions) + 1)
def lonely(completions, **kwargs):
    return [1.0]
def bare(completions):
    return [1.0] * len(completions)
def longer(completions, **kwargs):
    return [min(1.0, len(completion[0]["content"]) / 10) for completion in completions]


def wanting(completions, n, level, *, trainer_state, hint=None, **kwargs):
    return [1.0] * len(completions)
def hinted(completions, hint=None, **kwargs):
    return [float(bool(one)) for one in hint or [None] * len(completions)]
"""


def dataset(tmp_path: Path, rewards: list, rows: int = 200, **more):
    (tmp_path / "mine.py").write_text(REWARDS)
    hints = [{"hint": "add"} if i == 3 else {} for i in range(rows)]
    lines = [json.dumps({"question": f"{i} + 1?", "n": i, "gold": str(i + 1), **hints[i]}) for i in range(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    named = [one.replace("mine.py", str(tmp_path / "mine.py")) if isinstance(one, str) else one for one in rewards]
    settings = {"dataset": str(tmp_path / "rows.jsonl"), "prompt": "question", "answer": "gold", "rewards": named}
    return catalog.load({**settings, "time_limit": 1.0, "max_failures": 1.0, "workers": 2, **more})


@pytest.mark.parametrize(("text", "failure"), [("sleep", "timeout"), ("raise", "exception")])
def test_of_a_batch_that_fails_only_the_culprit_is_lost(tmp_path, text, failure):
    problem = dataset(tmp_path, ["mine.py:exact", "mine.py:brevity"])
    rows = problem.rows("train", 0, 20, 0)
    texts = [text if i == 7 else row.columns()["gold"] for i, row in enumerate(rows)]
    judged = problem.judge([Answer(row, said) for row, said in zip(rows, texts, strict=True)])
    assert [one.score for i, one in enumerate(judged) if i != 7] == [1.0] * 19
    assert judged[7].failure == failure and judged[7].rewards == {"exact": None, "brevity": None}
    assert judged[0].rewards == {"exact": 1.0, "brevity": -len(texts[0]) / 100}
    problem.guard.close()


def test_a_column_that_only_some_rows_have_reaches_a_reward_whoever_stands_beside_them(tmp_path):
    problem = dataset(tmp_path, ["mine.py:hinted"])
    rows = sorted(problem._all, key=lambda row: row.values["n"])[:6]
    for order in (rows, rows[::-1], rows[3:]):
        judged = problem.judge([Answer(row, "x") for row in order])
        assert [one.score for one in judged] == [float(row.values["n"] == 3) for row in order]
    problem.guard.close()


def test_failures_are_a_share_of_all_answers_of_a_call(tmp_path):
    """Not of those that are asked for again."""
    problem = dataset(tmp_path, ["mine.py:exact"], max_failures=0.1)
    rows = problem.rows("train", 0, 60, 0) * 5
    texts = ["raise" if i % 16 == 3 else row.columns()["gold"] for i, row in enumerate(rows)]
    judged = problem.judge([Answer(row, said) for row, said in zip(rows, texts, strict=True)])
    assert sum(one.failure is not None for one in judged) == texts.count("raise") == 19
    problem.guard.close()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xff\xfe", "cannot be read as text"), (b"[" * 200_000, "rows.jsonl, line 1: found no JSON")],
)
def test_a_dataset_that_cannot_be_read_is_one_line(tmp_path, content, said):
    problem = dataset(tmp_path, ["mine.py:exact"])
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=said):
        problem.rows("train", 0, 1, 0)
    problem.guard.close()


def test_a_reward_that_does_not_apply_is_no_failure(tmp_path):
    problem = dataset(tmp_path, ["mine.py:exact", "think_format"])
    (row,) = problem.rows("train", 0, 1, 0)
    (judged,) = problem.judge([Answer(row, "none")])
    assert (judged.outcome, judged.failure, judged.rewards) == ("unscored", None, {"exact": None, "think_format": 0.0})
    problem.guard.close()


def test_a_reward_of_another_length_is_an_outcome(tmp_path):
    problem = dataset(tmp_path, ["mine.py:short"])
    rows = problem.rows("train", 0, 3, 0)
    assert {one.failure for one in problem.judge([Answer(row, "x") for row in rows])} == {"wrong_length"}
    problem.guard.close()


def test_a_batch_with_one_reward_for_all_is_no_batch_of_right_answers(tmp_path):
    """`[1.0]` has the right length for each answer alone."""
    problem = dataset(tmp_path, ["mine.py:lonely"])
    rows = problem.rows("train", 0, 20, 0)
    judged = problem.judge([Answer(row, "x") for row in rows])
    assert [(one.failure, one.score) for one in judged] == [("wrong_length", 0.0)] * 20
    assert problem.guard.first == "lonely returned 1 rewards for 16 completions"
    problem.guard.close()


def test_answers_of_a_batch_of_the_wrong_length_are_failures_that_count(tmp_path):
    problem = dataset(tmp_path, ["mine.py:lonely"], max_failures=0.1)
    rows = problem.rows("train", 0, 20, 0)
    with pytest.raises(
        TooManyFailures, match=r"failed on 11 of the first 20 answers .*\(wrong_length 11\).* of 100 allows"
    ):
        problem.judge([Answer(row, "x") for row in rows])
    problem.guard.close()


FILE = """
import numpy
REWARDS = {"right": 1.0}
def rows(rng):
    for n in range(400):
        yield {"prompt": f"{n}?"}
def rewards(row, completion):
    return {"right": 1.0}
def score(row, completion):
    return {"yes": 1.0, "no": 0.5}.get(completion, 0.0)
def passed(score):
    return {1.0: numpy.bool_(True), 0.5: "no"}.get(score, False)
def well_formed(row, completion):
    return None if completion == "none" else numpy.float64(1.0) > 0.5
"""


def own_file(tmp_path: Path, code: str = FILE):
    (tmp_path / "mine.py").write_text(code)
    return catalog.load({"file": str(tmp_path / "mine.py"), "max_failures": 1.0, "workers": 1})


def test_what_is_neither_true_nor_false_is_not_taken_for_either(tmp_path):
    problem = own_file(tmp_path)
    (row,) = problem.rows("train", 0, 1, 0)
    judged = problem.judge([Answer(row, text) for text in ("yes", "wrong", "no", "none")])
    assert [one.outcome for one in judged] == ["passed", "wrong", "failed", "failed"]
    assert [one.failure for one in judged] == [None, None, "not_a_bool", "not_a_bool"]
    assert problem.guard.first == "passed returned 'no', expected True or False"
    with pytest.raises(BadInput, match=r"passed failed .*expected True or False"):
        problem.passed(0.5)
    problem.guard.close()


@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        (["mine.py:exakt"], r"mine.py has no function exakt; did you mean exact \(mine.py:\d+\)"),
        (
            ["mine.py:wanting"],
            r"wanting takes level, which is no column of .*rows.jsonl; there is gold, hint, n, question, solution: "
            r"take one of",
        ),
        (["mine.py:bare"], r"takes no \*\*kwargs"),
        ([{"name": "repetition_penalty", "arguments": {"x": 1}}], r"get_repetition_penalty_reward\(ngram_size"),
    ],
)
def test_rewards_that_cannot_be_used_are_refused_in_one_line(tmp_path, rewards, says):
    with pytest.raises(BadInput, match=says):
        dataset(tmp_path, rewards).rows("train", 0, 1, 0)


def test_a_column_of_gold_answers_is_what_the_audit_plays_as_the_best(tmp_path):
    """`exact` pays them most, `longer` does not."""
    rules = {}
    for reward in ("exact", "longer"):
        problem = dataset(tmp_path, [f"mine.py:{reward}"], gold="gold")
        asked, astray = baselines.of_rows(problem, problem.rows("train", 0, 10, 0), FORMAT, 0)
        report = audit("rl1", problem, asked, astray)
        assert next(line for line in report.baselines if line.name == "gold").own
        rules[reward] = {finding.rule: finding.severity for finding in report.findings}
        problem.guard.close()
    assert rules["exact"] == {} and rules["longer"]["gold"] == "stop"


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("gould", "problem.gold: a row of .* has no 'gould'; it has"),
        ("n", "problem.gold: 'n' of .* is int, expected text"),
    ],
)
def test_a_gold_column_that_is_none_is_refused(column, said, tmp_path):
    with pytest.raises(BadInput, match=said):
        dataset(tmp_path, ["mine.py:exact"], gold=column).rows("train", 0, 1, 0)


def test_a_reward_that_wants_the_solution_asks_for_the_answer_column(tmp_path):
    with pytest.raises(
        BadInput, match=r"exact takes solution, .*name the column with the reference answer as problem.answer"
    ):
        dataset(tmp_path, ["mine.py:exact"], answer=None).rows("train", 0, 1, 0)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("def rows", "async def rows", r"mine.py:4: rows is async, expected a plain function; write def rows\(rng\)"),
        ("        yield", "        _ =", r"rows returned None, expected dicts, one a row; yield them"),
        (
            "def score",
            "def baselines(row, rng):\n    return ['x']\ndef score",
            r"baselines returned \['x'\], expected \{name: completion\}",
        ),
    ],
)
def test_a_function_that_returns_something_else_is_one_clear_line(tmp_path, old, new, says):
    problem = own_file(tmp_path, FILE.replace(old, new))
    with pytest.raises(BadInput, match=says):
        problem.baselines(problem.rows("train", 0, 1, 0)[0], random.Random(0))
    problem.guard.close()


def test_more_rows_than_a_dataset_has_are_refused_with_what_there_is(tmp_path):
    problem = dataset(tmp_path, ["think_format"], rows=40)
    with pytest.raises(BadInput, match=r"has train \d+, validation \d+, held_out \d+"):
        problem.rows("train", 0, 40, 0)


def test_half_a_surrogate_pair_in_a_file_is_named_by_its_line(tmp_path):
    problem = dataset(tmp_path, ["think_format"])
    file = tmp_path / "other.jsonl"
    file.write_text('{"question": "\\ud83d\\ude00 \\\\ud83d", "gold": "1"}\n')
    assert rows_of(problem, file)[0].prompt == "\U0001f600 \\ud83d"
    file.write_text(file.read_text() + '{"question": "a \\uD83D", "gold": "1"}\n')
    with pytest.raises(BadInput, match=r"other.jsonl, line 2: it holds half of a surrogate pair"):
        rows_of(problem, file)


def test_demonstrations_of_a_dataset_without_a_gold_column_are_refused_by_check(settings, write, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    settings["problem"] = {"dataset": str(tmp_path / "rows.jsonl"), "rewards": ["think_format"]}
    done = run_cli("check", write(settings))
    assert done.returncode == 2
    assert "stages.warmup.data: a dataset has no demonstrations without a gold column; name the" in done.stderr


def test_an_unknown_reward_is_refused_with_those_there_are(settings, write):
    settings["problem"] = {"dataset": "org/data", "rewards": ["acuracy"]}
    done = run_cli("check", write(settings))
    assert done.returncode == 2 and "there is no reward 'acuracy'; there is accuracy," in done.stderr


def test_the_starter_is_written_once_and_never_over_anything(tmp_path):
    done = run_cli("init", "mine", cwd=tmp_path)
    assert done.returncode == 0 and "switchback run recipe.yaml" in done.stdout
    (tmp_path / "mine" / "recipe.yaml").write_text("mine")
    again = run_cli("init", "mine", cwd=tmp_path)
    assert again.returncode == 2 and "is not overwritten" in again.stderr
    assert (tmp_path / "mine" / "recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_a_starter_has_no_place_in_or_below_a_file(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="file is a file; give a directory"):
        starter.write(tmp_path / place, "file")


@pytest.mark.parametrize("problem", starter.CHOICES)
def test_every_starter_can_be_planned(tmp_path, problem):
    assert run_cli("init", "--problem", problem, cwd=tmp_path).returncode == 0
    done = run_cli("plan", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_starter_trains_and_harvests_even_when_its_reward_hangs_on_some_rows(tmp_path):
    """Three rows of a hundred hang; the run ends well and says so."""
    assert run_cli("init", cwd=tmp_path).returncode == 0
    file = tmp_path / "my_problem.py"
    hang = '    if "7 7" in row["prompt"]:\n        __import__("time").sleep(1000)\n    words, right'
    file.write_text(file.read_text().replace("    words, right", hang))
    text = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(text.replace("my_problem.py}", "my_problem.py, time_limit: 0.3s}"))
    small = ["stages.warmup.rows=train[0:500]", "stages.warmup.epochs=1", "stages.rl1.rows=train[2000:2040]"]
    small += ["stages.rl1.steps=3", "stages.rl1.prompts_per_step=8", "stages.rl1.group_size=4"]
    small += ["evaluate.rows=20", "evaluate.samples=1", "validation.rows=20"]
    small += ["stages.harvest.samples=2", "stages.harvest.keep.min_score=0"]
    settings = [part for one in small for part in ("--set", one)]
    done = run_cli("run", "recipe.yaml", "--no-prefect", "--until", "harvest", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "the problem's own code failed on" in said and "(timeout" in said and "no answer within 0.3 s" in said
