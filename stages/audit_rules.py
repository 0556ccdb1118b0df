"""What is wrong with a reward, told from what it pays for answers whose worth is known.

the lines of an audit, and every answer it played -> findings. Pure: no problem, no files. Shares are of the range of rewards (`stages.audit`), 0..1.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import NamedTuple

from stages.baselines import GOLD, HOSTILE
from stages.config import Frozen
from stages.job import Finding
from stages.problems.base import Judgement

EXPLOITABLE = 0.4
"""Reward share above score share. A training reward may lead the policy in steps (a right form is worth something), but one that pays nearly half of
its range for nothing has a summit of its own: in the reference scheduling task, copying every event earns .69 for .01, and 36 % of the trained
policy's answers still overlap."""
GOLD_MISSES = 0.05
"""Share of the rows on which gold may fail before the run is stopped. Real data sets have a few wrong answers; a wrong judge or a wrong column fails on
many rows."""
GOLD_ROWS = 2
"""Rows on which gold has to fail before the run is stopped, where there are so many: one of a few rows may be odd."""
SPARSE = 0.9
"""Share of the well-formed answers of the problem's own baselines for which a component is 0. A group of 8 in which one answer in ten earns something
has nothing to learn from in 43 % of the cases."""
DOMINATED = 0.95
"""Share of the weights, or of the reward's variance, that is one component's: the others then decide between ties only."""
DISAGREE = 0.1
"""Rank correlation of a component with the score, below which it leads elsewhere, or nowhere; over hundreds of answers chance alone stays below it."""
HOLD_GOLD = (f"{HOSTILE}repeated", f"{HOSTILE}swapped_tags")
"""Texts in which nothing but the right answer stands, so that a judge may well accept them."""
UNEARNED = 0.5
"""Mean score of answers that do not look at their row. A coin does as well on a question with two answers; more is a task that asks for nothing."""
EXACT = 1e-9
"""Differences of rewards and scores that are rounding."""


class Played(NamedTuple):
    """One answer and what it got."""

    name: str
    own: bool
    """A baseline of the problem's own."""
    row: int
    judgement: Judgement
    passed: bool
    reward: float | None
    """The weighted sum of its components; None where no component could be had."""


class Line(Frozen):
    """A baseline over all its rows."""

    name: str
    own: bool
    """The problem's own; False: one that fits any problem."""
    rows: int
    reward: float | None
    """Mean, weighted. None: there was none."""
    share: float | None
    """Where its mean reward lies between the least and the greatest, 0..1."""
    score: float
    """Mean, 0..1."""
    outcomes: dict[str, int]
    rewards: dict[str, float | None]
    """Component -> mean."""
    failures: dict[str, int]
    """What user code did instead of judging -> how often."""

    @property
    def gap(self) -> float:
        """How far the reward's share is above the score's."""
        return (self.share or 0.0) - self.score


class Audited(NamedTuple):
    """Everything that rules look at."""

    stage: str
    weights: Mapping[str, float]
    played: Sequence[Played]
    lines: Sequence[Line]
    astray: int
    """Rows whose gold does not start with the response prefix."""
    mended: Mapping[str, str]
    """Exploitable baseline -> a `--set` with which it is not."""
    first_failure: str | None = None
    """What user code said when it failed first."""

    @property
    def has_gold(self) -> bool:
        """Whether it is known what the best answer is."""
        return any(line.name == GOLD for line in self.lines)

    def values(self, component: str) -> list[tuple[float, Played]]:
        """What a component gave, where it applied."""
        pairs = ((one.judgement.rewards.get(component), one) for one in self.played)
        return [(value, one) for value, one in pairs if value is not None]

    def of(self, component: str) -> list[float]:
        """The same without the answers."""
        return [value for value, _ in self.values(component)]


def findings(audited: Audited) -> list[Finding]:
    """What every rule has to say, what stops a run first."""
    found = [finding for rule in RULES for finding in rule(audited)]
    return sorted(found, key=lambda finding: ("stop", "warn", "note").index(finding.severity))


def gold(audited: Audited) -> Iterator[Finding]:
    """Gold passes, nothing scores more, and nothing that scores less earns more; what scores as much and earns more is worth a word, too."""
    of_row = {one.row: one for one in audited.played if one.name == GOLD}
    others = [(one, of_row[one.row]) for one in audited.played if one.name != GOLD and one.row in of_row]
    fails = {
        "do not pass": {row for row, one in of_row.items() if not one.passed},
        "score less than another answer": {best.row for one, best in others if _more(_score(one), _score(best))},
        "earn less than an answer with a lower score": {
            best.row for one, best in others if _more(one.reward, best.reward) and _more(_score(best), _score(one))
        },
    }
    equals = {best.row for one, best in others if _more(one.reward, best.reward)}
    missed = set[int]().union(*fails.values())
    if not (missed or equals):
        return
    stops = len(missed) > GOLD_MISSES * len(of_row) and len(missed) >= min(GOLD_ROWS, len(of_row))
    fails = fails if missed else {"earn less than an answer that scores as much": equals}
    said = ", ".join(f"{len(rows)} {what}" for what, rows in fails.items() if rows)
    above = Counter(
        one.name for one, best in others if _more(_score(one), _score(best)) or _more(one.reward, best.reward)
    )
    by = f" (most often {above.most_common(1)[0][0]})" if above else ""
    mend = "training would lead away from the task: mend the reward, the score or the gold answers"
    yield Finding(
        rule="gold",
        severity="stop" if stops else "warn",
        stage=audited.stage,
        evidence={"rows": len(of_row), "missed": len(missed), "share": len(missed) / len(of_row)},
        advice=f"of {len(of_row)} gold answers, {said}{by}; {mend if stops else 'look at what is odd about these rows'}",
    )


def gold_prefix(audited: Audited) -> Iterator[Finding]:
    """The best answer is one that a policy can write."""
    if audited.astray:
        yield _warn(
            audited,
            "gold_prefix",
            {"rows": audited.astray},
            f"{audited.astray} gold answers do not start with the response prefix, so no rollout can be like them; make format.response_prefix"
            " and the answers agree",
        )


def gold_form(audited: Audited) -> Iterator[Finding]:
    """The best answer has the form that is asked for."""
    judged = [one for one in audited.played if one.name == GOLD and one.judgement.failure is None]
    if malformed := sum(not one.judgement.well_formed for one in judged):
        yield _warn(
            audited,
            "gold_form",
            {"rows": float(malformed)},
            f"{malformed} of {len(judged)} gold answers do not have the right form (well_formed); mend them, or what tells the form",
        )


def exploitable(audited: Audited) -> Iterator[Finding]:
    """No baseline is paid much better than it does."""
    for line in audited.lines:
        if not exploits(line):
            continue
        share = line.share or 0.0
        yield _warn(
            audited,
            "exploitable",
            {"reward_share": share, "score": line.score, "gap": line.gap},
            f"{line.name} earns {100 * share:.1f} of 100 reward and {100 * line.score:.1f} of 100 score, so training may settle for it;"
            f" it is {_why_paid(audited, line)}",
            audited.mended.get(line.name),
        )


def _why_paid(audited: Audited, line: Line) -> str:
    """The components that pay a baseline, and those that cost the worst answer more than they cost it."""
    paid = {name: audited.weights[name] * (value or 0.0) for name, value in line.rewards.items()}
    spared = {name: min(0.0, part) - _least(audited, name) for name, part in paid.items()}
    by = f"paid by {_parts(paid) or 'nothing'}"
    if not _parts(spared):
        return f"{by}: let a broken rule cost more there"
    mend = "let a broken rule cost more" if sum(paid.values()) > sum(spared.values()) else "let a right answer earn more than these cost"  # fmt: skip
    return f"{by}, and spared what costs other answers ({_parts(spared)}): {mend}"


def _least(audited: Audited, component: str) -> float:
    """The most that a component takes off, as a number up to 0."""
    return min([0.0, *(audited.weights[component] * value for value in audited.of(component))])


def _parts(paid: Mapping[str, float]) -> str:
    """Components and what they come to, the most first."""
    most = sorted(paid, key=lambda name: -paid[name])
    return ", ".join(f"{name} {paid[name]:.3g}" for name in most if paid[name] > EXACT)


def exploits(line: Line) -> bool:
    """Whether a baseline is paid much better than it does."""
    return line.name != GOLD and line.gap > EXPLOITABLE


def unearned(audited: Audited) -> Iterator[Finding]:
    """Answers that do not look at their row do not score."""
    for line in audited.lines:
        if line.own or line.name in HOLD_GOLD or line.score <= UNEARNED:
            continue
        why = (
            "one class of rows outweighs the others"
            if line.name == "one_answer"
            else "the score can be had for nothing"
        )
        yield _warn(
            audited,
            "unearned",
            {"score": line.score, "rows": line.rows},
            f"{line.name} scores {100 * line.score:.1f} of 100: {why}; balance the rows, or make the score stricter",
        )


def constant(audited: Audited) -> Iterator[Finding]:
    """The reward and every component tell answers apart. Without a gold only weights of 0 are told, because nothing right was then played."""
    same = [name for name in audited.weights if audited.has_gold and _spread(audited.of(name)) == 0]
    for name in same:
        values = audited.of(name)
        yield _warn(
            audited,
            "constant",
            {"value": values[0], "answers": len(values)},
            f"{name} is {values[0]:g} for all {len(values)} answers, the best and the worst, so it teaches nothing; mend it or remove it",
        )
    weighted = {name for name, weight in audited.weights.items() if weight}
    rewards = [one.reward for one in audited.played if one.reward is not None]
    if _spread(rewards) == 0 and (not weighted or (audited.has_gold and not weighted <= {*same})):
        why = (
            "their components cancel out; mend the rewards or their weights"
            if weighted
            else "every weight is 0; give them weights"
        )
        yield _warn(
            audited,
            "constant",
            {"value": rewards[0], "answers": len(rewards)},
            f"all {len(rewards)} answers earn {rewards[0]:g}, the best and the worst, so training learns nothing: {why}",
        )


def _spread(values: Sequence[float]) -> float | None:
    """The greatest less the least, rounding left out; None where there are none."""
    spread = max(values) - min(values) if values else None
    return 0.0 if spread is not None and spread <= EXACT else spread


def absent(audited: Audited) -> Iterator[Finding]:
    """Every component applies to some answer."""
    judged = sum(one.judgement.failure is None for one in audited.played)
    for name in audited.weights if judged else ():
        if not audited.of(name):
            yield _warn(
                audited,
                "absent",
                {"answers": judged},
                f"{name} is None for all {judged} answers that were judged, so it pays nothing; mend when it applies, or remove it",
            )


def sparse(audited: Audited) -> Iterator[Finding]:
    """Every component is often enough above 0 to be found."""
    for name in audited.weights:
        values = [value for value, one in audited.values(name) if one.own and one.judgement.well_formed]
        zeros = sum(value == 0 for value in values) / len(values) if values else 0.0
        if SPARSE < zeros < 1:
            yield _warn(
                audited,
                "sparse",
                {"zeros": zeros, "answers": len(values)},
                f"{name} is 0 for {zeros:.0%} of the well-formed answers, so most groups learn nothing from it; give partial credit, or start from a"
                " policy that earns it sometimes",
            )


def dominated(audited: Audited) -> Iterator[Finding]:
    """No component makes all others idle."""
    weights = {name: abs(weight) for name, weight in audited.weights.items() if weight}
    if len(weights) < 2:  # one component dominates by right
        return
    of_weight = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    of_variance = _shares_of_variance(audited)
    for name in weights:
        share = max(of_weight[name], of_variance.get(name, 0.0))
        if share > DOMINATED:
            yield _warn(
                audited,
                "dominated",
                {"of_weights": of_weight[name], "of_variance": of_variance.get(name, 0.0)},
                f"{name} {_how_much(share)}, so the other components hardly count; weigh them, or remove them",
            )


def _how_much(share: float) -> str:
    """Above 1 where other components fall when it rises: their shares of the variance are negative."""
    return (
        f"makes up {share:.0%} of the reward"
        if share <= 1
        else "decides the reward against the components that pull the other way"
    )


def disagree(audited: Audited) -> Iterator[Finding]:
    """Every component rises with the score."""
    for name in audited.weights if audited.has_gold else ():
        pairs = audited.values(name)
        found = rank_correlation([value for value, _ in pairs], [one.judgement.score for _, one in pairs])
        sign = -1 if audited.weights[name] < 0 else 1
        if found is not None and audited.weights[name] and sign * found < DISAGREE:
            yield _warn(
                audited,
                "disagree",
                {"rank_correlation": found, "answers": len(pairs)},
                f"{_leads(name, sign, sign * found)} with the score (rank correlation {found:+.2f}), so it leads away from the task"
                " where it can; look at what it pays for",
            )


def _leads(name: str, sign: int, agrees: float) -> str:
    if sign > 0:
        return f"{name} {'falls' if agrees < -DISAGREE else 'does not rise'}"
    return f"{name} has a negative weight and {'rises' if agrees < -DISAGREE else 'does not fall'}"


def failures(audited: Audited) -> Iterator[Finding]:
    """User code judges whatever it is given."""
    counts = Counter(one.judgement.failure for one in audited.played if one.judgement.failure)
    if counts:
        where = Counter(one.name for one in audited.played if one.judgement.failure)
        said = f"; the first said: {audited.first_failure}" if audited.first_failure else ""
        yield _warn(
            audited,
            "failures",
            {**{str(name): float(count) for name, count in counts.items()}, "answers": len(audited.played)},
            f"{sum(counts.values())} of {len(audited.played)} answers could not be judged ({', '.join(f'{n} {c}' for n, c in counts.items())};"
            f" most often {where.most_common(1)[0][0]}); such a rollout has no reward{said}",
        )


def no_baselines(audited: Audited) -> Iterator[Finding]:
    """It is said what was not looked at."""
    if not audited.has_gold:
        own = [line.name for line in audited.lines if line.own]
        yield Finding(
            rule="no_baselines",
            severity="note",
            stage=audited.stage,
            evidence={"own": float(len(own))},
            advice=f"{_no_gold(own)}, and nothing says that the best answer earns most; give it baselines with one that is named {GOLD}"
            " (a problem file's baselines(row, rng); the column that problem.gold of a dataset names)",
        )


def _no_gold(own: Sequence[str]) -> str:
    if not own:
        return f"the problem has no {GOLD} baseline, so only answers that fit any problem were played"
    lowered = {name.lower(): name for name in own}
    close = difflib.get_close_matches(GOLD, lowered, n=1)
    meant = f" (did you mean {GOLD} by {lowered[close[0]]}?)" if close else ""
    return (
        f"the problem's baselines are {', '.join(own)}, and none is named {GOLD}{meant}, so no best answer was played"
    )


RULES: tuple[Callable[[Audited], Iterator[Finding]], ...] = (
    gold,
    gold_prefix,
    gold_form,
    exploitable,
    unearned,
    constant,
    absent,
    sparse,
    dominated,
    disagree,
    failures,
    no_baselines,
)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's, ties at their mean rank, in -1..1; None where one of the two is constant."""
    first, second = _ranks(a), _ranks(b)
    spread = (_covariance(first, first) * _covariance(second, second)) ** 0.5
    return _covariance(first, second) / spread if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, at = [0.0] * len(values), 0
    for _, tied in groupby(order, key=values.__getitem__):
        places = list(tied)
        for i in places:
            ranks[i] = at + (len(places) - 1) / 2
        at += len(places)
    return ranks


def _covariance(a: Sequence[float], b: Sequence[float]) -> float:
    if not a:
        return 0.0
    mean_a, mean_b = fmean(a), fmean(b)
    return fmean((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))


def _shares_of_variance(audited: Audited) -> dict[str, float]:
    """Component -> its part of the reward's variance (its covariance with the reward); they add up to 1. Empty where the reward is constant, and without a
    gold, because what only right answers earn does not vary then."""
    complete = [one for one in audited.played if one.reward is not None]
    rewards = [one.reward for one in complete if one.reward is not None]
    if not (whole := _covariance(rewards, rewards)) or not audited.has_gold:
        return {}
    parts = {
        name: [weight * (one.judgement.rewards.get(name) or 0.0) for one in complete]
        for name, weight in audited.weights.items()
    }
    return {name: _covariance(values, rewards) / whole for name, values in parts.items()}


def _warn(audited: Audited, rule: str, evidence: dict[str, float], advice: str, override: str | None = None) -> Finding:
    return Finding(rule=rule, severity="warn", stage=audited.stage, evidence=evidence, advice=advice, override=override)


def _score(one: Played) -> float:
    return one.judgement.score


def _more(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and a > b + EXACT
