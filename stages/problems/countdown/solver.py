"""Countdown by brute force: every value that every subset of the numbers can make, smaller subsets first."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

Value = int | Fraction


@lru_cache(maxsize=4096)
def solve(numbers: tuple[int, ...], target: int, use_all: bool) -> str | None:
    """An expression that makes the target from the numbers, each used at most once (`use_all`: exactly once); None when
    there is none.

    Whole positive numbers on the way are tried first: they are the game's own rule, and a fraction of the work. Seconds
    for five numbers that cannot make the target, milliseconds for most else.
    """
    expression = _search(numbers, target, use_all, whole=True) or _search(numbers, target, use_all, whole=False)
    if expression is None:
        return None
    return expression.removeprefix("(").removesuffix(")")


def _search(numbers: tuple[int, ...], target: int, use_all: bool, whole: bool) -> str | None:
    """In parentheses, where it is more than a number."""
    everything = (1 << len(numbers)) - 1
    made: dict[int, dict[Value, str]] = {1 << i: {number: str(number)} for i, number in enumerate(numbers)}
    for subset in sorted(range(1, everything + 1), key=int.bit_count):
        values = made.setdefault(subset, {})
        for part in _parts(subset):
            _combine(made[part], made[subset ^ part], whole, values)
        if target in values and (subset == everything or not use_all):
            return values[target]
    return None


def _parts(subset: int) -> Iterator[int]:
    """The larger half of every way to split a set of bits in two."""
    part = (subset - 1) & subset
    while part > subset ^ part:
        yield part
        part = (part - 1) & subset


def _combine(left: dict[Value, str], right: dict[Value, str], whole: bool, values: dict[Value, str]) -> None:
    """Put what one operation makes of a value of each into `values`."""
    for a, of_a in left.items():
        for b, of_b in right.items():
            large, of_large, small, of_small = a, of_a, b, of_b
            if large < small:
                large, of_large, small, of_small = b, of_b, a, of_a
            for value, sign in results(large, small, whole):
                if value not in values:
                    values[value] = f"({of_large} {sign} {of_small})"
            if not whole and large and large != small:
                values.setdefault(Fraction(small) / large, f"({of_small} / {of_large})")
                values.setdefault(small - large, f"({of_small} - {of_large})")


def results(large: Value, small: Value, whole: bool = True) -> Iterator[tuple[Value, str]]:
    """(value, operation) of every operation on two numbers; `whole` leaves out what is no positive whole number."""
    yield large + small, "+"
    yield large * small, "*"
    if large > small or not whole:
        yield large - small, "-"
    if small and not whole:
        yield Fraction(large) / small, "/"
    elif small and large % small == 0:
        yield large // small, "/"
