"""What is wrong with a reward, told from what it pays for answers whose worth is known.

the lines of an audit, and every answer it played -> findings. Pure: no problem, no files. Shares are of the range of
rewards (`stages.rewards.audit.audit`), 0..1."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from stages.job import Finding
from stages.rewards.audit.baselines import GOLD, HOSTILE
from stages.rewards.audit.component_rules import absent, constant, disagree, dominated, sparse, unscored
from stages.rewards.audit.facts import EXACT, Audited, Line, Played, warn, warn_of

EXPLOITABLE = 0.4
"""Reward share above score share. A training reward may lead the policy in steps (a right form is worth something),
but one that pays nearly half of its range for nothing has a summit of its own: in the reference scheduling task,
copying every event earns .69 for .01, and 36 % of the trained policy's answers still overlap."""
GOLD_MISSES = 0.05
"""Share of the rows on which gold may fail before the run is stopped. Real data sets have a few wrong answers; a wrong
judge or a wrong column fails on many rows."""
GOLD_ROWS = 2
"""Rows on which gold has to fail before the run is stopped, where there are so many: one of a few rows may be odd."""
HOLD_GOLD = (f"{HOSTILE}repeated", f"{HOSTILE}swapped_tags")
"""Texts in which nothing but the right answer stands, so that a judge may well accept them."""
UNEARNED = 0.5
"""Mean score of answers that do not look at their row. A coin does as well on a question with two answers; more is a
task that asks for nothing."""


def findings(audited: Audited) -> list[Finding]:
    """What every rule has to say, what stops a run first."""
    found = [finding for rule in RULES for finding in rule(audited)]
    return sorted(found, key=lambda finding: ("stop", "warn", "note").index(finding.severity))


def gold(audited: Audited) -> Iterator[Finding]:
    """Gold passes, nothing scores more, and nothing that scores less earns more; what scores as much and earns more is
    worth a word, too."""
    pairs = _with_gold(audited)
    golds = [one for one in audited.played if one.name == GOLD]
    fails = {
        "do not pass": {best.row for best in golds if not best.passed},
        "score less than another answer": {best.row for one, best in pairs if _scores_more(one, best)},
        "earn less than an answer with a lower score": {
            best.row for one, best in pairs if _earns_more(one, best) and _scores_more(best, one)
        },
    }
    missed = set[int]().union(*fails.values())
    if not missed:
        fails = {"earn less than an answer that scores as much": {b.row for one, b in pairs if _earns_more(one, b)}}
    if not any(fails.values()):
        return
    rows = len({best.row for best in golds})
    stops = len(missed) > GOLD_MISSES * rows and len(missed) >= min(GOLD_ROWS, rows)
    advice = "look at what is odd about these rows"
    if stops:
        advice = "training would lead away from the task: fix the reward, the score or the gold answers"
    failed = ", ".join(f"{len(of_rows)} {what}" for what, of_rows in fails.items() if of_rows)
    yield Finding(
        rule="gold",
        severity="stop" if stops else "warn",
        stage=audited.stage,
        evidence={"rows": rows, "missed": len(missed), "share": len(missed) / rows},
        advice=f"of {rows} gold answers, {failed}{_most_often(pairs)}; {advice}",
    )


def _with_gold(audited: Audited) -> list[tuple[Played, Played]]:
    """Every other answer, with the gold one of its row."""
    of_row = {one.row: one for one in audited.played if one.name == GOLD}
    return [(one, of_row[one.row]) for one in audited.played if one.name != GOLD and one.row in of_row]


def _most_often(pairs: Sequence[tuple[Played, Played]]) -> str:
    """Which baseline beats gold on the most rows."""
    above = Counter(one.name for one, best in pairs if _scores_more(one, best) or _earns_more(one, best))
    return f" (most often {above.most_common(1)[0][0]})" if above else ""


def _scores_more(one: Played, other: Played) -> bool:
    return one.judgement.score > other.judgement.score + EXACT


def _earns_more(one: Played, other: Played) -> bool:
    """False where no component applies to one of the two."""
    return one.reward is not None and other.reward is not None and one.reward > other.reward + EXACT


def gold_prefix(audited: Audited) -> Iterator[Finding]:
    """The best answer is one that a policy can write."""
    if audited.astray:
        yield warn(
            audited,
            "gold_prefix",
            {"rows": audited.astray},
            f"{audited.astray} gold answers do not start with the response prefix, so no rollout can be like them; "
            f"make format.response_prefix and the answers agree",
        )


def gold_form(audited: Audited) -> Iterator[Finding]:
    """The best answer has the form that is asked for."""
    judged = [one for one in audited.played if one.name == GOLD and one.judgement.failure is None]
    if malformed := sum(not one.judgement.well_formed for one in judged):
        yield warn(
            audited,
            "gold_form",
            {"rows": float(malformed)},
            f"{malformed} of {len(judged)} gold answers do not have the right form (well_formed); fix them, or what "
            f"tells the form",
        )


def exploitable(audited: Audited) -> Iterator[Finding]:
    """No baseline is paid much better than it does."""
    for line in audited.lines:
        if not exploits(line):
            continue
        share = line.share or 0.0
        yield warn_of(
            line.name,
            audited,
            "exploitable",
            {"reward_share": share, "score": line.score, "gap": line.gap},
            f"earns {100 * share:.1f} of 100 reward and {100 * line.score:.1f} of 100 score, so training may settle "
            f"for it; it is {_why_paid(audited, line)}",
            audited.fixes.get(line.name),
        )


def _why_paid(audited: Audited, line: Line) -> str:
    """The components that pay a baseline, and those that cost the worst answer more than they cost it."""
    paid = {name: audited.weights[name] * (value or 0.0) for name, value in line.rewards.items()}
    spared = {name: min(0.0, part) - _least(audited, name) for name, part in paid.items()}
    by = f"paid by {_parts(paid) or 'nothing'}"
    if not _parts(spared):
        return f"{by}: let a broken rule cost more there"
    fix = "let a right answer earn more than these cost"
    if sum(paid.values()) > sum(spared.values()):
        fix = "let a broken rule cost more"
    return f"{by}, and spared what costs other answers ({_parts(spared)}): {fix}"


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
        why = "the score can be had for nothing"
        if line.name == "one_answer":
            why = "one class of rows outweighs the others"
        yield warn_of(
            line.name,
            audited,
            "unearned",
            {"score": line.score, "rows": line.rows},
            f"scores {100 * line.score:.1f} of 100: {why}; balance the rows, or make the score stricter",
        )


def failures(audited: Audited) -> Iterator[Finding]:
    """User code judges whatever it is given."""
    counts = Counter(one.judgement.failure for one in audited.played if one.judgement.failure)
    if counts:
        where = Counter(one.name for one in audited.played if one.judgement.failure)
        said = f"; the first said: {audited.first_failure}" if audited.first_failure else ""
        yield warn(
            audited,
            "failures",
            {**{str(name): float(count) for name, count in counts.items()}, "answers": len(audited.played)},
            f"{sum(counts.values())} of {len(audited.played)} answers could not be judged "
            f"({', '.join(f'{n} {c}' for n, c in counts.items())}; most often {where.most_common(1)[0][0]}); such a "
            f"rollout has no reward{said}",
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
            advice=f"{_no_gold(own)}, and nothing says that the best answer earns most; give it baselines with one "
            f"that is named {GOLD}"
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
    unscored,
    sparse,
    dominated,
    disagree,
    failures,
    no_baselines,
)
