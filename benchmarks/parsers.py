"""What reading a hostile completion costs: CPU time of every built-in problem's judge, for texts of doubling length.

    python benchmarks/parsers.py

Each family is a way to make a backtracking or recursive reader suffer, at any length. The table has the milliseconds
of the longest text, and the greatest factor by which doubling the text raised the time, the least of several
measurements each. Exits 1 when a doubling more than triples it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import pairwise

from stages.problems.base import Answer, Problem
from stages.problems.catalog import load

LENGTHS = (125_000, 250_000, 500_000, 1_000_000)
"""Characters."""
REPEATS = 5
BOUND = 3.0
NOISE = 0.002
"""Seconds below which a time is not compared: it is a matter of microseconds, whatever the length."""

EVENT = "<event>\n<name>Tea</name>\n<start>09:00</start>\n<end>10:00</end>\n</event>\n"
ANSWER = f"<think>\nhm\n</think>\n<schedule>\n{EVENT}</schedule>"
UNITS: dict[str, tuple[str, str, str]] = {
    "one letter": ("", "a", ""),
    "blank space": ("", " ", ""),
    "blank space inside an event": ("<think>a</think><schedule><event>", " \n", "</event></schedule>"),
    "blank space after the answer": (ANSWER, " ", "x"),
    "blank space after a number": ("7", " ", "x"),
    "unicode blank space": ("<schedule><event>", "\u2003\u2028", ""),
    "angle brackets": ("", "<", ""),
    "opened <think>": ("", "<think>", ""),
    "closed </think>": ("<think>", "</think>", ""),
    "opened <schedule>": ("<think>a</think>", "<schedule>", ""),
    "opened <event>": ("<think>a</think><schedule>", "<event>", ""),
    "nested events": ("<think>a</think><schedule>", "<event><name>", ""),
    "events without an end": ("<think>a</think><schedule>", "<event><name>a</name><start>09:00</start>", ""),
    "events without a schedule's end": ("<think>a</think><schedule>", EVENT, ""),
    "whole events": ("<think>a</think><schedule>", EVENT, "</schedule>"),
    "whole schedules": ("", ANSWER, ""),
    "every tag but the last": ("", ANSWER.removesuffix("</schedule>"), ""),
    "a name without an end": ("<think>a</think><schedule><event><name>", "a", ""),
    "names and no start": ("<think>a</think><schedule><event>", "<name>a</name>", ""),
    "starts and no end": ("<think>a</think><schedule><event><name>a</name>", "<start>09:00</start>", ""),
    "half a start": ("<think>a</think><schedule><event><name>a</name>", "<start>09:0", ""),
    "compact lines": ("<think>\n</think>\n<schedule>\n", "A 12:00-13:00\n", "</schedule>"),
    "compact lines without an end": ("<think>\n</think>\n<schedule>\n", "A 12:00-13:00\n", ""),
    "compact thinking": ("<think>\n", "A 1", "</think>"),
    "digits": ("", "9", ""),
    "digits in an answer": ("<answer>", "9", "</answer>"),
    "zeros in front": ("-", "0", "1"),
    "arabic digits": ("", "\u0669", ""),
    "opened <answer>": ("", "<answer>", ""),
    "closed </answer>": ("", "</answer>", ""),
    "answers": ("", "<answer>1</answer>", ""),
    "parentheses": ("<answer>", "(", "</answer>"),
    "closed parentheses": ("<answer>1", ")", "</answer>"),
    "nested sums": ("<answer>", "(1+", "</answer>"),
    "a long sum": ("<answer>1", "+1", "</answer>"),
    "a long product": ("<answer>9", "*999999", "</answer>"),
    "a tower of divisions": ("<answer>9", "/0", "</answer>"),
    "blank space in an answer": ("<answer>1", " ", "</answer>"),
    "signs": ("<answer>", "-", "1</answer>"),
    "right to left": ("", "\u202e\u200b<schedule>\u2066", ""),
    "zero width": ("<schedule>", "\u200b\u200d\ufeff", "</schedule>"),
    "lone surrogates": ("<think>", "\ud800", "</think>"),
    "null characters": ("", "\0<name>\0", ""),
    "combining marks": ("<event><name>a", "\u0301", "</name>"),
    "emoji": ("<name>", "\U0001f600", "</name>"),
}
"""Family -> (start, what is repeated, end)."""

PROBLEMS = (
    {"name": "scheduling", "form": "text"},
    {"name": "scheduling", "form": "compact"},
    {"name": "arithmetic"},
    {"name": "countdown"},
)
"""Every reader there is."""


def hostile(family: str, length: int) -> str:
    """A text of the family, of about that many characters."""
    start, unit, end = UNITS[family]
    return start + unit * (length // len(unit)) + end


def judging(problem: Problem) -> Callable[[str], None]:
    """What judges a text as an answer to the problem's first row."""
    (row,) = problem.rows("train", 0, 1, seed=0)
    return lambda text: _only(problem, Answer(row, text))


def _only(problem: Problem, answer: Answer) -> None:
    (judgement,) = problem.judge([answer])
    assert judgement.outcome in problem.outcomes and 0 <= judgement.score <= 1


def seconds(judge: Callable[[str], None], text: str) -> float:
    """The least CPU time of several."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        judge(text)
        times.append(time.process_time() - start)
    return min(times)


def growth(times: list[float]) -> float:
    """The greatest factor between two lengths; 1 where nothing takes long enough to be told."""
    return max((after / before for before, after in pairwise(times) if before > NOISE), default=1.0)


def main() -> int:
    """Print the table; returns the exit code."""
    worst = 0.0
    print(f"{'problem':<20} {'family':<34} {'ms at 1 MB':>10} {'doubling':>9}")
    for settings in PROBLEMS:
        judge = judging(load(settings))
        for family in UNITS:
            times = [seconds(judge, hostile(family, length)) for length in LENGTHS]
            worst = max(worst, growth(times))
            name = " ".join(settings.values())
            print(f"{name:<20} {family:<34} {1000 * times[-1]:>10.2f} {growth(times):>8.2f}x")
    print(f"the greatest: {worst:.2f}x; at most {BOUND:g}x is good")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
