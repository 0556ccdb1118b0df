"""Arithmetic and countdown: what is asked can be answered, what is right scores 1, and each other outcome has its
name."""

from __future__ import annotations

import ast
import operator
import random
import re
from fractions import Fraction
from itertools import permutations, product

import pytest

from stages.errors import BadInput
from stages.problems.arithmetic import Arithmetic
from stages.problems.base import Answer, split_of
from stages.problems.catalog import PROBLEMS, load
from stages.problems.countdown.expressions import parse
from stages.problems.countdown.problem import Countdown
from stages.problems.countdown.solver import solve


def judged(problem, row, completion):
    (judgement,) = problem.judge([Answer(row, completion)])
    return judgement


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        ("-28", "right"),
        (" -28\n", "right"),
        ("<think>\n12 is less</think>\n-28", "right"),
        ("</think></think>-28", "right"),
        ("28", "wrong"),
        ("-" + "0" * 9 + "28", "right"),
        ("-" + "0" * 5000 + "28", "format"),
        ("9" * 18, "wrong"),
        ("9" * 19, "format"),
        ("It is -28.", "format"),
        ("- 28", "format"),
        ("-28 </think>", "format"),
        ("-\u0662\u0668", "format"),
        ("", "format"),
    ],
)
def test_an_arithmetic_answer_is_a_number_and_nothing_else(completion, outcome):
    problem = Arithmetic()
    row = problem.row({"a": 12, "operation": "-", "b": 40})
    judgement = judged(problem, row, completion)
    assert row.prompt == "12 - 40 =" and judgement.outcome == outcome
    assert judgement.score == (outcome == "right") and judgement.well_formed == (outcome != "format")
    weighted = sum(problem.reward_weights[name] * value for name, value in judgement.rewards.items())
    assert weighted == pytest.approx({"right": 1.0, "wrong": 0.1, "format": 0.0}[outcome])


def test_arithmetic_rows_have_the_digits_and_operations_that_were_asked_for():
    rows = Arithmetic(3, ("*", "-")).rows("train", 0, 500, seed=0)
    assert {row.operation for row in rows} == {"*", "-"} and 900 < max(row.a for row in rows) < 1000
    assert all(judged(Arithmetic(), row, str(eval(row.prompt.rstrip("= ")))).score == 1 for row in rows)


def test_asking_for_more_rows_than_there_are_is_one_line_and_no_endless_search():
    problem = Arithmetic(1, ("+",))
    counts = []
    for split in ("train", "validation", "held_out"):
        with pytest.raises(BadInput, match=r"only \d+ in this split") as error:
            problem.rows(split, 0, 101, seed=0)
        counts.append(int(re.search(r"only (\d+)", str(error.value))[1]))
    assert sum(counts) == 100
    assert len(problem.rows("train", 0, counts[0], seed=1)) == counts[0]


DOWN = Countdown()
ROW = DOWN.row({"nums": [3, 7, 25, 50], "target": 82})


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        ("<think>hm</think>\n<answer>25 + 50 + 7</answer>", "on_target"),
        ("<answer>1 + 1</answer> no, <answer> (50+25)+7 </answer>", "on_target"),
        ("<answer>25 + 50 + 7 * 3 / 3</answer>", "numbers"),
        ("<answer>82</answer>", "numbers"),
        ("<answer>7 + 7 + 50</answer>", "numbers"),
        ("<answer>25 + 50</answer>", "off_target"),
        ("<answer>50 / (25 - 25)</answer>", "numbers"),
        ("<answer>25 + 50 + 7 = 82</answer>", "format"),
        ("<answer></answer>", "format"),
        ("25 + 50 + 7", "format"),
        ("<answer>25 + 50 + 7", "format"),
        ("</answer>25 + 50 + 7<answer>", "format"),
        ("<answer>__import__('os').getcwd()</answer>", "format"),
        ("<answer>50 ** 25</answer>", "format"),
    ],
)
def test_a_countdown_answer_is_one_expression_of_the_given_numbers(completion, outcome):
    judgement = judged(DOWN, ROW, completion)
    assert judgement.outcome == outcome
    assert judgement.score == (outcome == "on_target") and judgement.well_formed == (outcome != "format")
    weighted = sum(DOWN.reward_weights[name] * value for name, value in judgement.rewards.items())
    assert weighted == pytest.approx({"on_target": 1.0, "format": 0.0}.get(outcome, 0.1))  # TinyZero's 1, 0 and .1


def test_every_number_may_have_to_be_used():
    strict = Countdown(use_all=True)
    row = strict.row({"numbers": [2, 3, 4], "target": 24})
    assert row.prompt == "Numbers: 2, 3, 4\nTarget: 24\nUse every number."
    assert judged(strict, row, "<answer>2 * 3 * 4</answer>").solved
    loose = Countdown().row({"numbers": [2, 3, 4, 24], "target": 24})
    assert judged(Countdown(), loose, "<answer>24</answer>").solved


def test_a_division_is_exact_and_by_zero_worth_nothing():
    row = DOWN.row({"numbers": [3, 3, 8, 8], "target": 24})
    assert judged(DOWN, row, "<answer>8 / (3 - 8 / 3)</answer>").outcome == "on_target"
    assert judged(DOWN, row, "<answer>8 / (3 - 3)</answer>").outcome == "off_target"
    assert judged(DOWN, row, DOWN.baselines(row, random.Random(0))["gold"]).solved


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"numbers": [1, 1], "target": 100}, "no expression joins"),
        ({"numbers": [], "target": 1}, "numbers"),
        ({"numbers": [1] * 6, "target": 1}, "numbers"),
        ({"numbers": [0, 2], "target": 2}, "numbers.0"),
        ({"numbers": [1, 2]}, "target: field required"),
        ({"numbers": ["1", 2], "target": 3}, "numbers.0"),
    ],
)
def test_a_line_that_is_no_countdown_row_says_why(line, said):
    with pytest.raises(BadInput, match=said):
        DOWN.row(line)


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def pythons(text):
    """The value of an expression as Python's own grammar reads it; None for what is none of ours, "zero" for a
    division by zero."""

    def value(node):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        raise SyntaxError

    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        return None
    except ZeroDivisionError:
        return "zero"


def test_expressions_are_read_as_pythons_grammar_reads_them():
    rng = random.Random(0)
    good = 0
    for _ in range(20_000):
        parts = [rng.choice(["1", "2", "30", "+", "-", "*", "/", "(", ")", " "]) for _ in range(rng.randint(1, 9))]
        text = "".join(parts)
        if re.search(r"(^|[-+*/(])\s*[-+]|\*\*|//|\d\s*\(|\d{7}", text):
            assert parse(text) is None  # signs, powers, calls and long numbers are not ours
            continue
        parsed, expected = parse(text), pythons(text)
        assert (parsed is None) == (expected is None), text
        if parsed is not None:
            good += 1
            assert parsed.value() == (None if expected == "zero" else expected), text
    assert good > 500


def test_the_solver_finds_a_solution_exactly_when_one_exists():
    """Against every order, every operation and every way to put parentheses round three numbers."""
    rng = random.Random(0)
    shapes = ("{} {} {} {} {}", "({} {} {}) {} {}", "{} {} ({} {} {})")
    for _ in range(12):
        numbers = tuple(sorted(rng.randint(1, 12) for _ in range(3)))
        all_three = {
            pythons(shape.format(a, x, b, y, c))
            for a, b, c in permutations(numbers)
            for x, y in product("+-*/", repeat=2)
            for shape in shapes
        }
        for target in range(1, 60):
            found = solve(numbers, target, use_all=True)
            assert (found is not None) == (target in all_three), (numbers, target)
            if found:
                assert pythons(found) == target and sorted(map(int, re.findall(r"\d+", found))) == list(numbers)


@pytest.mark.parametrize(
    "settings",
    [{"name": "arithmetic"}, {"name": "countdown"}, {"name": "countdown", "use_all": True, "numbers": 5}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
class TestEveryProblem:
    """What holds for both."""

    def test_rows_are_of_their_split_alone_and_the_same_in_whatever_pieces(self, settings):
        problem = load(settings)
        rows = {split: problem.rows(split, 0, 60, seed=0) for split in ("train", "validation", "held_out")}
        assert all(split_of(row.id) == split for split, some in rows.items() for row in some)
        assert rows["train"][20:] == problem.rows("train", 20, 60, seed=0) != problem.rows("train", 20, 60, seed=1)
        assert rows["held_out"] == problem.rows("held_out", 0, 60, seed=1)
        assert len({row.id for row in rows["train"]}) == 60

    def test_gold_is_the_best_and_every_row_has_it(self, settings):
        problem, rng = load(settings), random.Random(0)
        for row in problem.rows("validation", 0, 60, seed=0):
            played = problem.baselines(row, rng)
            judgements = dict(zip(played, problem.judge([Answer(row, text) for text in played.values()]), strict=True))
            assert judgements["gold"].solved and problem.passed(judgements["gold"].score)
            assert judgements["format_broken"].outcome == "format"
            assert all(
                sum(one.rewards.values()) <= sum(judgements["gold"].rewards.values()) for one in judgements.values()
            )
            assert problem.row(row.columns()) == row

    def test_demonstrations_have_the_form_and_leave_the_task_to_be_learned(self, settings):
        problem, rng = load(settings), random.Random(0)
        rows = problem.rows("train", 0, 300, seed=0)
        judgements = problem.judge([Answer(row, problem.demonstration(row, rng)) for row in rows])
        assert all(one.well_formed and one.outcome in problem.outcomes for one in judgements)
        assert 0.15 < sum(one.score for one in judgements) / 300 < 0.6

    def test_weights_sum_to_one_and_name_the_rewards(self, settings):
        problem = load(settings)
        (row,) = problem.rows("train", 0, 1, seed=0)
        assert set(judged(problem, row, "?").rewards) == set(problem.reward_weights)
        assert sum(problem.reward_weights.values()) == pytest.approx(1)


def test_every_setting_of_every_built_in_problem_reaches_it():
    other = {
        "form": "compact",
        "overlap": "zero",
        "reward_overlap": "touching",
        "digits": 5,
        "operations": ("*",),
        "numbers": 5,
        "largest": 50,
        "largest_target": 70,
        "use_all": True,
    }
    for name, built_in in PROBLEMS.items():
        for field in built_in.settings.model_fields:
            if field != "name":
                assert getattr(load({"name": name, field: other[field]}), field) == other[field]


def test_countdown_settings_that_make_next_to_no_row_are_refused():
    with pytest.raises(BadInput, match=r"5 numbers up to 9999 made no target up to 10; raise largest_target"):
        Countdown(numbers=5, largest=9999, largest_target=10).rows("train", 0, 200, 0)
