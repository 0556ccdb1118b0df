"""The prompt probe: prompts x response prefixes, on a policy as it is, before anything is trained; and on another one
after, to see what survived.

policy (and a later one) + Formats -> a line each: how often the policy passes, keeps the form and does what the prompt
asks for, and how long it takes. The functions that training uses render the text that a model is given, and
its digest is the Format's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from stages.config import Config, FromList, identity
from stages.job import Format, Job, Result, RowRange
from stages.problems.base import passes

if TYPE_CHECKING:
    from stages.data.rollouts import Player

FILE = "probe.json"
ROLES = ("policy", "after")
"""Inputs: the policy, and optionally one to compare it with."""


class Variant(Config):
    """One line of the probe."""

    format: Format = identity()
    follow: str | None = identity(None)
    """A regular expression that is found in a completion that does what the prompt says. Off: not asked."""


class ProbeConfig(Config):
    """What to try."""

    variants: Annotated[tuple[Variant, ...], FromList] = identity()
    """Formats, each with its prompt's rule."""
    rows: int = identity(64, ge=2)
    """Validation rows."""
    samples: int = identity(4, ge=1)
    """Completions per row."""
    temperature: float = identity(1.0, gt=0)
    """Of the sampling."""
    max_completion_length: int = identity(512, ge=1)
    """Tokens a completion may have, the prefix not counted."""


def run(job: Job) -> Result:
    """Write `probe.json`: {"lines": [...]}, a line a variant and policy."""
    from stages.data import rollouts
    from stages.runtime import ranks
    from stages.runtime.metrics import MetricsLog

    config, log, lines = ProbeConfig.model_validate(job.config), MetricsLog(Path(job.out)), list[dict[str, Any]]()
    policies = [role for role in ROLES if role in job.inputs]
    total = len(policies) * len(config.variants)
    for role in policies:
        for variant in config.variants:
            of_variant = job.model_copy(update={"format": variant.format, "inputs": {"policy": job.inputs[role]}})
            lines.append({"policy": role, **_line(rollouts.player(of_variant), config, variant)})
            log.write(len(lines), total)
    if ranks.first():
        Path(job.out, FILE).write_text(json.dumps({"lines": lines}), encoding="utf-8")
    return Result(outputs={"probe": FILE}, metrics={"lines": len(lines)})


def _line(player: Player, config: ProbeConfig, variant: Variant) -> dict[str, Any]:
    """The numbers of one Format; shares are of all samples, those of rows without a score (`unscored`) left out where
    passing is asked, intervals 95 % over rows."""
    import numpy as np

    from stages.data.rollouts import has_score
    from stages.estimates import bootstrap_interval
    from stages.sampling import Decoding
    from stages.tokens import prefix

    rows = player.rows(RowRange(split="validation", start=0, stop=config.rows, seed=0))
    decoding = Decoding(config.temperature, config.max_completion_length, config.samples)
    groups = player.play(rows, decoding, lambda done: None)
    scored = [group for group in groups if has_score(group)]
    passed = np.array([[passes(player.problem, one.judgement) for one in group] for group in scored], dtype=float)
    every = [one for group in groups for one in group]
    rule = re.compile(variant.follow) if variant.follow else None
    followed = (
        np.array([[bool(rule.search(one.text)) for one in group] for group in groups], dtype=float) if rule else None
    )
    given = [*groups[0][0].prompt[0], *prefix.prefix_ids(player.tokenizer, prefix.of_row(player.format, rows[0]))]
    return {
        "prompt": variant.format.prompt,
        "response_prefix": variant.format.response_prefix,
        "rows": len(rows),
        "samples": config.samples,
        "unscored": len(groups) - len(scored),
        "pass_rate": float(passed.mean()) if scored else None,
        "interval": bootstrap_interval(passed.mean(axis=1)) if scored else None,
        "format": float(np.mean([one.judgement.well_formed for one in every])),
        "follow": None if followed is None else float(followed.mean()),
        "follow_interval": None if followed is None else bootstrap_interval(followed.mean(axis=1)),
        "tokens": float(np.mean([len(one.answer[0]) for one in every])),
        "given": player.tokenizer.decode(given),
        "answered": every[0].text,
        "format_digest": prefix.format_digest(player.seen_format()),
    }
