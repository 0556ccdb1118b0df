"""The rules of an audit that look at components: whether each tells answers apart, is earned often enough, leaves room
for the others, and rises with the score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import fmean

from stages.job import Finding
from stages.rewards.audit.facts import EXACT, Audited, warn, warn_of

SPARSE = 0.9
"""Share of the well-formed answers of the problem's own baselines for which a component is 0. A group of 8 in which
one answer in ten earns something has nothing to learn from in 43 % of the cases."""
DOMINATED = 0.95
"""Share of the weights, or of the reward's variance, that is one component's: the others then decide between ties
only."""
DISAGREE = 0.1
"""Rank correlation of a component with the score, below which it leads elsewhere, or nowhere; over hundreds of answers
chance alone stays below it."""


def constant(audited: Audited) -> Iterator[Finding]:
    """The reward and every component tell answers apart. Without a gold only weights of 0 are told, because nothing
    right was then played."""
    same = [name for name in audited.weights if audited.has_gold and _spread(audited.of(name)) == 0]
    for name in same:
        values = audited.of(name)
        yield warn_of(
            name,
            audited,
            "constant",
            {"value": values[0], "answers": len(values)},
            f"is {values[0]:g} for all {len(values)} answers, the best and the worst, so it teaches nothing; fix it "
            f"or remove it",
        )
    weighted = {name for name, weight in audited.weights.items() if weight}
    rewards = [one.reward for one in audited.played if one.reward is not None]
    if _spread(rewards) == 0 and (not weighted or (audited.has_gold and not weighted <= {*same})):
        why = "every weight is 0; give them weights"
        if weighted:
            why = "their components cancel out; fix the rewards or their weights"
        yield warn(
            audited,
            "constant",
            {"value": rewards[0], "answers": len(rewards)},
            f"all {len(rewards)} answers earn {rewards[0]:g}, the best and the worst, so training learns nothing: "
            f"{why}",
        )


def _spread(values: Sequence[float]) -> float | None:
    """The greatest less the least, rounding left out; None where there are none."""
    if not values:
        return None
    spread = max(values) - min(values)
    return spread if spread > EXACT else 0.0


def absent(audited: Audited) -> Iterator[Finding]:
    """Every component applies to some answer."""
    judged = sum(one.judgement.failure is None for one in audited.played)
    for name in audited.weights if judged else ():
        if not audited.of(name):
            cause = f" ({audited.causes[name]})" if name in audited.causes else ""
            yield warn_of(
                name,
                audited,
                "absent",
                {"answers": judged},
                f"is None for all {judged} answers that were judged{cause}, so it pays nothing; fix when it applies, "
                f"or remove it",
            )


def unscored(audited: Audited) -> Iterator[Finding]:
    """Some answer has a score. Where none has, every mean would be '-'."""
    judged = [one.judgement for one in audited.played if one.judgement.failure is None]
    if judged and not any(one.scored for one in judged):
        cause = "; ".join(audited.causes.values()) or "no component applies to them, or their score is None"
        found = warn(
            audited,
            "no_score",
            {"answers": len(judged)},
            f"none of the {len(judged)} answers that were judged has a score ({cause}), so no policy can be measured; "
            f"fix the rewards or the reference answers",
        )
        yield found.model_copy(update={"severity": "stop"})


def sparse(audited: Audited) -> Iterator[Finding]:
    """Every component is often enough above 0 to be found."""
    for name in audited.weights:
        values = [value for value, one in audited.values(name) if one.own and one.judgement.well_formed]
        zeros = sum(value == 0 for value in values) / len(values) if values else 0.0
        if SPARSE < zeros < 1:
            yield warn_of(
                name,
                audited,
                "sparse",
                {"zeros": zeros, "answers": len(values)},
                f"is 0 for {zeros:.0%} of the well-formed answers, so most groups learn nothing from it; give partial "
                f"credit, or start from a policy that earns it sometimes",
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
            yield warn_of(
                name,
                audited,
                "dominated",
                {"of_weights": of_weight[name], "of_variance": of_variance.get(name, 0.0)},
                f"{_how_much(share)}, so the other components hardly count; weigh them, or remove them",
            )


def _how_much(share: float) -> str:
    """Above 1 where other components fall when it rises: their shares of the variance are negative."""
    if share > 1:
        return "decides the reward against the components that pull the other way"
    return f"makes up {share:.0%} of the reward"


def disagree(audited: Audited) -> Iterator[Finding]:
    """Every component rises with the score."""
    for name in audited.weights if audited.has_gold else ():
        pairs = audited.values(name)
        found = rank_correlation([value for value, _ in pairs], [one.judgement.score for _, one in pairs])
        sign = -1 if audited.weights[name] < 0 else 1
        if found is not None and audited.weights[name] and sign * found < DISAGREE:
            yield warn_of(
                name,
                audited,
                "disagree",
                {"rank_correlation": found, "answers": len(pairs)},
                f"{_leads(sign, sign * found)} with the score (rank correlation {found:+.2f}), so it leads away from "
                f"the task where it can; look at what it pays for",
            )


def _leads(sign: int, agrees: float) -> str:
    """What a component does where the score rises; `sign` is that of its weight."""
    if sign > 0:
        return "falls" if agrees < -DISAGREE else "does not rise"
    return f"has a negative weight and {'rises' if agrees < -DISAGREE else 'does not fall'}"


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
    """Component -> its part of the reward's variance (its covariance with the reward); they add up to 1. Empty where
    the reward is constant, and without a gold, because what only right answers earn does not vary then."""
    complete = [one for one in audited.played if one.reward is not None]
    rewards = [one.reward for one in complete if one.reward is not None]
    variance = _covariance(rewards, rewards)
    if not variance or not audited.has_gold:
        return {}
    parts = {
        name: [weight * (one.judgement.rewards.get(name) or 0.0) for one in complete]
        for name, weight in audited.weights.items()
    }
    return {name: _covariance(values, rewards) / variance for name, values in parts.items()}
