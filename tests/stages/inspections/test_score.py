"""switchback score: completions of anybody, judged in a process that needs no model; what is wrong with a file is one
line."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from pipeline.recipe import recipe
from stages.errors import BadInput
from stages.inspections.score import summarise
from stages.problems import catalog
from stages.problems.base import Answer, Judgement
from stages.problems.catalog import load
from stages.problems.files import answers
from stages.problems.files import rows as rows_of
from stages.rewards.audit.baselines import Baseline
from stages.rewards.audit.table import play
from tests.conftest import ROOT, environment, printed_json, run_cli

PROBLEM = load({"name": "scheduling"})
ROWS = PROBLEM.rows("held_out", 0, 20, seed=0)
PLAYED = ("gold", "everything", "one_item", "unsorted", "format_broken")


@pytest.fixture
def files(tmp_path):
    """(rows, completions): each of 20 rows is answered by five baselines, in the order of the baselines."""
    rows, completions = tmp_path / "rows.jsonl", tmp_path / "completions.jsonl"
    rows.write_text("".join(json.dumps(dict(row.columns())) + "\n" for row in ROWS))
    answers = [(i, PROBLEM.baselines(row, random.Random(0))) for i, row in enumerate(ROWS)]
    lines = [{"row": i, "completion": played[name], "model": "x"} for name in PLAYED for i, played in answers]
    completions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows, completions


def test_counts_averages_and_intervals_are_those_of_the_judgements(files):
    rows, completions = files
    found = printed_json("score", "scheduling", "--rows", rows, "--completions", completions, "--json")
    lines = [json.loads(line) for line in completions.read_text().splitlines()]
    judgements = PROBLEM.judge([Answer(ROWS[line["row"]], line["completion"]) for line in lines])
    assert (found["rows"], found["completions"]) == (20, 100)
    assert list(found["outcomes"]) == ["format", "less_than_2", "non_existing", "unsorted", "overlap", "valid"]
    assert found["outcomes"]["format"] == found["outcomes"]["less_than_2"] == 20 and found["outcomes"]["valid"] >= 20
    assert sum(found["outcomes"].values()) == 100
    assert found["average"] == pytest.approx(sum(one.score for one in judgements) / 100)
    assert found["interval"][0] <= found["average"] <= found["interval"][1]
    assert found["pass_interval"][0] < found["pass_rate"] < found["pass_interval"][1]
    for name in ("format", "sorted", "score"):
        assert found["rewards"][name] == pytest.approx(sum(one.rewards[name] for one in judgements) / 100)
    means = found["rewards"]
    assert found["reward"] == pytest.approx(0.1 * means["format"] + 0.2 * means["sorted"] + 0.7 * means["score"])


def test_settings_change_the_rewards_and_people_get_a_table(files):
    rows, completions = files
    plain = run_cli("score", "scheduling", "--rows", rows, "--completions", completions)
    zero = run_cli("score", "scheduling", "--rows", rows, "--completions", completions, "--set", "overlap=zero")
    assert plain.returncode == zero.returncode == 0
    table, repaired = plain.stdout.splitlines(), zero.stdout.splitlines()
    assert table[2].split()[:3] == ["format", "20", "20.0"]
    assert table[:-1] == repaired[:-1] and table[-1] != repaired[-1]


def test_every_built_in_problem_can_be_scored(tmp_path):
    rows, completions = tmp_path / "rows.jsonl", tmp_path / "completions.jsonl"
    for name, line, completion in (
        ("arithmetic", {"a": 2, "operation": "*", "b": 3}, "6"),
        ("countdown", {"numbers": [2, 3, 4], "target": 24}, "<answer>2*3*4</answer>"),
    ):
        rows.write_text(json.dumps(line))
        completions.write_text(json.dumps({"row": 0, "completion": completion}) + "\n")
        assert printed_json("score", name, "--rows", rows, "--completions", completions, "--json")["average"] == 1


GOOD = {"row": 0, "completion": "x"}


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("completions", "{", "completions.jsonl, line 2: found no JSON"),
        ("completions", "[" * 100_000, "line 2: found no JSON"),
        ("completions", f'{{"row": {"9" * 5000}}}', "line 2: found no JSON"),
        ("completions", "", "line 2: found no JSON"),
        ("completions", "[1]", "line 2: found [1], expected an object"),
        (
            "completions",
            json.dumps(GOOD | {"row": 20}),
            "line 2: row: found 20, expected a line of the rows, from 0 to 19",
        ),
        ("completions", json.dumps(GOOD | {"row": -1}), "line 2: row: found -1"),
        ("completions", json.dumps(GOOD | {"row": True}), "line 2: row: found True"),
        ("completions", json.dumps({"row": 0}), "line 2: completion: found None, expected text"),
        ("completions", json.dumps(GOOD | {"completion": ["x"]}), "line 2: completion: found ['x']"),
        ("rows", "{}", "rows.jsonl, line 2: events: field required"),
        (
            "rows",
            '{"events": [["\\ud800", "1", "2"]], "priority_events": []}',
            "line 2: it holds half of a surrogate pair",
        ),
        ("rows", '{"events": [["x", "1", "2"]], "priority_events": []}', "line 2: events: found the time '1'"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(file, line, said, files):
    path = next(path for path in files if path.stem == file)
    kept = path.read_text().splitlines()
    path.write_text("\n".join([kept[0], line, *kept[1:]]))
    with pytest.raises(BadInput) as error:
        answers(files[1], rows_of(PROBLEM, files[0]))
    assert said in str(error.value) and str(path.parent) in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda rows, completions: ["nosuch", rows, completions],
            "problem.name: found 'nosuch'; there is scheduling, arithmetic, countdown (or give the path of a .py file)",
        ),
        (lambda rows, completions: ["mine.py", rows, completions], "mine.py is not there, or no regular file"),
        (lambda rows, completions: ["scheduling", rows.parent, completions], "is not there, or no regular file"),
        (lambda rows, completions: ["scheduling", rows, _with(rows, b"{}\n")], "line 1: row: found None"),
        (lambda rows, completions: ["scheduling", rows, _with(rows, b"\xff")], "cannot be read as text"),
        (lambda rows, completions: ["scheduling", _with(rows, b""), completions], "is empty"),
    ],
)
def test_a_wrong_name_or_file_is_one_line(change, said, files):
    name, rows, completions = change(*files)
    done = run_cli("score", name, "--rows", rows, "--completions", completions)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_setting_without_a_value_is_told_with_one_of_this_command():
    with pytest.raises(
        BadInput, match="--set overlap: expected a setting of the problem, = and a value, such as form="
    ):
        recipe.problem("scheduling", ["overlap"])


def _with(rows, content):
    path = rows.parent / "bad.jsonl"
    path.write_bytes(content)
    return path


def test_completions_that_no_terminal_can_show_are_scored(files):
    rows, completions = files
    hostile = ["\ud800", "\u202e\u200b", "\x00\x1b[2J", "<schedule>" * 1000, "9" * 5000]
    completions.write_text("".join(json.dumps({"row": 0, "completion": text}) + "\n" for text in hostile))
    found = printed_json("score", "scheduling", "--rows", rows, "--completions", completions, "--json")
    assert found["outcomes"]["format"] == len(hostile) and found["rows"] == 1


def test_neither_the_command_nor_its_worker_imports_torch(files):
    """Which is why it answers at once."""
    rows, completions = files
    code = (
        "import sys, stages\nfrom stages.inspections.score import run\nfrom stages.job import Job, Execution\nfrom "
        "pathlib import Path\nfrom stages.inspections.kinds import INSPECTIONS\nfrom stages.runtime.worker import "
        "_run\n"
        "work, rows, completions = sys.argv[1:]\nPath(work, 'out').mkdir()\n"
        "job = Job(kind='score', name='score', config={}, inputs={'rows': rows, 'completions': completions}, "
        "work=work, out=work + '/out',\n"
        "          problem={'name': 'scheduling'}, rows=None, format=None, seed=0, dtype='float32', "
        "execution=Execution())\n"
        "_run(job, INSPECTIONS[job.kind])\nprint([name for name in ('torch', 'transformers', 'trl', 'prefect') if "
        "name in sys.modules])"
    )
    arguments = [sys.executable, "-c", code, rows.parent, rows, completions]
    done = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


MINE = (
    "REWARDS = {'right': 2.0}\ndef rows(rng): yield {'prompt': 'p', 'n': 1}\n"
    "def rewards(row, completion): return {'right': score(row, completion)}\n"
    "def score(row, completion): return float(int(completion) == row['n'])\n"
)


def scored(tmp_path, completions, *more):
    """The command's arguments; each completion is of the row in turn, whose answers are 1 and 2."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1?", "n": 1}\n{"prompt": "2?", "n": 2}\n')
    said = [{"row": i % 2, "completion": text} for i, text in enumerate(completions)]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    files = ["--rows", tmp_path / "rows.jsonl", "--completions", tmp_path / "said.jsonl"]
    return ["score", tmp_path / "mine.py", *files, *more]


def test_a_problem_of_ones_own_is_scored_and_says_what_it_could_not_judge(tmp_path):
    command = scored(tmp_path, ["1", "1", "one"])
    found = printed_json(*command, "--json")
    assert found["outcomes"] == {"failed": 1, "unscored": 0, "malformed": 0, "wrong": 1, "partial": 0, "passed": 1}
    assert found["average"] == pytest.approx(1 / 3) and found["rewards"] == {"right": 0.5}
    assert found["failures"] == {"exception": 1} and "mine.py:4: ValueError: invalid literal" in found["first_failure"]
    shown = run_cli(*command).stdout
    assert "not judged: exception 1; the first said: mine.py:4: ValueError" in shown
    assert "over 2 rows; 1 of 3 completions could not be judged and count as 0)" in shown
    assert "reward 100.0 (weighted sum x 100): right 50.0" in shown, "which is no share of anything"


def test_where_nothing_could_be_judged_the_numbers_are_no_result(tmp_path):
    done = run_cli(*scored(tmp_path, ["one", "two"], "--json"))
    assert done.returncode == 1 and json.loads(done.stdout)["failures"] == {"exception": 2}
    assert done.stderr.startswith(
        "switchback: score: none of the 2 completions could be judged; the first said: mine.py:4:"
    )
    assert len(done.stderr.splitlines()) == 1


def test_rows_without_a_score_are_left_out_of_the_average_and_counted():
    """Two completions of each of three rows: both scored, one scored, none scored."""
    problem = load({"name": "arithmetic"})
    scored = [1.0, 0.0, 1.0, None, None, None]
    judgements = [
        Judgement(score or 0.0, "right" if score else "wrong", score == 1, True, {}, scored=score is not None)
        for score in scored
    ]
    found = summarise(problem, [0, 0, 1, 1, 2, 2], judgements)
    assert (found["rows"], found["unscored"], found["average"], found["solved"]) == (3, 1, 0.5, 0.5)
    assert found["pass_rate"] == 0.5 and sum(found["outcomes"].values()) == 6
    none = summarise(problem, [2, 2], judgements[4:])
    assert none["unscored"] == 1 and none["average"] is none["interval"] is none["pass_rate"] is None


def test_too_many_failures_are_one_line_without_a_class_or_a_log_and_leave_no_directory(tmp_path):
    (tmp_path / "tmp").mkdir()
    done = run_cli(*scored(tmp_path, ["one"] * 40), env={"TMPDIR": str(tmp_path / "tmp")})
    assert done.returncode == 1 and done.stderr.startswith("switchback: score: mine.py failed on 11 of the first ")
    assert "TooManyFailures" not in done.stderr and "mine.py:4: ValueError" in done.stderr and "log" not in done.stderr
    assert done.stderr.endswith("fix it and run again, or raise problem.max_failures\n")
    assert not list((tmp_path / "tmp").iterdir())


SOMETIMES = """
REWARDS = {'even': 1.0}
def rows(rng):
    for n in range(400): yield {'prompt': str(n), 'n': n}
def rewards(row, completion): return {'even': float(completion == str(row['n'])) if row['n'] % 2 == 0 else None}
def score(row, completion): return float(completion == str(row['n']))
"""


def test_audit_and_score_agree_on_a_component_that_does_not_always_apply(tmp_path):
    """A row to which no component applies counts in neither."""
    (tmp_path / "mine.py").write_text(SOMETIMES)
    problem = catalog.load({"file": str(tmp_path / "mine.py"), "workers": 1})
    rows = problem.rows("train", 0, 100, 0)
    answers = [Answer(row, row.columns()["prompt"]) for row in rows]
    judgements = problem.judge(answers)
    assert 20 < sum(one.rewards["even"] is None for one in judgements) < 80
    baselines = [Baseline("gold", True, i, answer) for i, answer in enumerate(answers)]
    (line,) = play(problem, problem.reward_weights, baselines).lines
    assert summarise(problem, range(100), judgements)["reward"] == line.reward == 1.0
