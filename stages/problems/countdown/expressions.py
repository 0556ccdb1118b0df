"""Arithmetic expressions from an untrusted text, read exactly and without eval.

text -> Expression (in postfix order) -> its value, a fraction. Allowed are whole numbers of at most 6 digits, + - * /,
parentheses and blank space; a sign before a number is not. Reading takes time linear in the text, and no recursion.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import NamedTuple

TOKEN = re.compile(r"[ \t\r\n]*+(?:([0-9]{1,6}+)|([-+*/()]))")
STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2}
OPERATIONS: Mapping[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


class Expression(NamedTuple):
    """A well-formed expression."""

    postfix: list[int | str]
    """Operands before their operator: 2 3 4 * + is 2 + 3 * 4."""

    @property
    def numbers(self) -> list[int]:
        """As they are written, in order."""
        return [part for part in self.postfix if isinstance(part, int)]

    def value(self) -> Fraction | None:
        """The value; None for a division by zero. The time it takes grows with the size of the numbers."""
        stack: list[Fraction] = []
        for part in self.postfix:
            if isinstance(part, int):
                stack.append(Fraction(part))
                continue
            right, left = stack.pop(), stack.pop()
            if part == "/" and not right:
                return None
            stack.append(OPERATIONS[part](left, right))
        return stack[0]


def parse(text: str) -> Expression | None:
    """An expression; None for anything else (the shunting-yard algorithm, with a check of what may follow what)."""
    postfix: list[int | str] = []
    waiting: list[str] = []
    operand_next = True
    for token in _tokens(text):
        if (token.isdigit() or token == "(") != operand_next:  # noqa: S105 - a parenthesis
            return None
        if token.isdigit():
            postfix.append(int(token))
            operand_next = False
        elif token == "(":  # noqa: S105
            waiting.append(token)
        elif token == ")":  # noqa: S105
            if not _close(waiting, postfix):
                return None
        else:
            _apply(waiting, postfix, STRENGTH[token])
            waiting.append(token)
            operand_next = True
    _apply(waiting, postfix, 0)
    if operand_next or waiting:
        return None
    return Expression(postfix)


def _tokens(text: str) -> list[str]:
    """Numbers, operators and parentheses; a single `)`, which no expression begins with, for a text with other
    characters."""
    text = text.rstrip()
    tokens: list[str] = []
    at = 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            return [")"]
        tokens.append(match[1] or match[2])
        at = match.end()
    return tokens


def _apply(waiting: list[str], postfix: list[int | str], strength: int) -> None:
    """Operators that bind at least as strongly get their operands, back to the last open parenthesis."""
    while waiting and waiting[-1] != "(" and STRENGTH[waiting[-1]] >= strength:
        postfix.append(waiting.pop())


def _close(waiting: list[str], postfix: list[int | str]) -> bool:
    """Whether there was a parenthesis to close."""
    _apply(waiting, postfix, 0)
    return bool(waiting) and waiting.pop() == "("
