"""General rows in addition to a stage's own: how many, and which.

the number of own rows + a share + the lines of a file -> lines of it, each at most once. A seed puts the lines into an
order and the first so many are drawn, so a larger share draws the same lines and more; which those are does not depend
on what the own rows say. A grpo stage takes so many at every step, in that order, and when all were taken, all again
in another."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

from stages.config import Config, UserPath, identity, resolved
from stages.errors import BadInput

T = TypeVar("T")
RULE = "mix"
"""The `rule` that a general row is there by (`stages.tokens.token_rows`)."""
MARK = f"{RULE}:"
"""What its id starts with, before the number of its line."""


class Mix(Config):
    """General conversations in addition to a stage's own rows, so that the policy does not forget them."""

    data: UserPath = resolved()
    """A .jsonl file of conversations (`stages.data.sources` says what a line may be), identified by its bytes."""
    share: float = identity(gt=0, lt=1)
    """Their share of all rows, such as 0.07; a single step has it on average only."""


def count(own: int, share: float) -> int:
    """The number of general rows that are `share` of all rows, with `own` others:
    share / (1 - share) * own, rounded."""
    return round(share / (1 - share) * own)


def order(lines: Sequence[T], seed: int) -> list[T]:
    """The lines in the order in which they are drawn."""
    shuffled = list(lines)
    random.Random(f"mix-{seed}").shuffle(shuffled)
    return shuffled


def drawn(stage: str, lines: Sequence[T], own: int, share: float, seed: int) -> list[T]:
    """The lines that a mix adds to `own` rows. Raises BadInput where there are fewer, and where it would be none."""
    wanted = count(own, share)
    if not wanted:
        raise BadInput(
            f"stages.{stage}.mix: a share of {share:g} with {own} own rows is {share / (1 - share) * own:.2g} rows, "
            f"which rounds to 0; raise the share, or remove mix"
        )
    if wanted > len(lines):
        lower = f", or lower the share to {_most(len(lines), own):g}" if lines else ""
        raise BadInput(
            f"stages.{stage}.mix: a share of {share:g} with {own} own rows takes {share:g} / (1 - {share:g}) * {own} = "
            f"{wanted} rows, but its data have {len(lines)}, and no row is repeated; add rows{lower}"
        )
    return order(lines, seed)[:wanted]


def count_of_step(own: int, share: float) -> int:
    """How many general rows make up at least `share` of a step's rows, with `own` others: share / (1 - share) * own,
    rounded up."""
    exact = Fraction(str(share))
    return math.ceil(exact / (1 - exact) * own)


def drawn_by_steps(stage: str, lines: Sequence[T], a_step: int, steps: int, seed: int) -> list[T]:
    """The lines that so many steps take, in the order in which they are drawn. Raises BadInput where one step would
    take a line twice."""
    if a_step > len(lines):
        raise BadInput(
            f"stages.{stage}.mix: every step takes {a_step} rows, but its data have {len(lines)}; add rows, or lower "
            f"the share or prompts_per_step"
        )
    return order(lines, seed)[: a_step * steps]


def of_step(drawn: Sequence[T], a_step: int, step: int, seed: int) -> list[T]:
    """The rows of a step, from 0. No row is taken twice in a pass; one that is left where a pass does not divide into
    steps waits for the next, in another order."""
    a_pass = len(drawn) // a_step
    which, within = divmod(step, a_pass)
    rows = list(drawn)
    if which:
        random.Random(f"mix-{seed}-{which}").shuffle(rows)
    return rows[within * a_step : (within + 1) * a_step]


def _most(general: int, own: int) -> float:
    """The largest share that so many rows make up, rounded down to three digits."""
    share = general / (general + own)
    scale = 10 ** (2 - math.floor(math.log10(share)))
    return math.floor(share * scale) / scale
