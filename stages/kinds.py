"""The kinds of step, and what others ask of each.

Importing this is cheap: torch, transformers and trl are imported inside `run`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from stages import audit, evaluate, grpo, inspect, preflight, probe, rejection, score, sft
from stages.config import Config
from stages.job import Job, Result


class Stage(NamedTuple):
    """A kind of step."""

    config: type[Config]
    run: Callable[[Job], Result]
    version: int
    """Raised when the same config gives another result; part of the key."""
    torch: bool = True
    """It needs torch, which takes seconds to import."""


STAGES: dict[str, Stage] = {
    "sft": Stage(sft.SftConfig, sft.run, 1),
    "grpo": Stage(grpo.GrpoConfig, grpo.run, 2),
    "rejection": Stage(rejection.RejectionConfig, rejection.run, 3),
    "evaluate": Stage(evaluate.EvaluateConfig, evaluate.run, 3),
    "preflight": Stage(preflight.PreflightConfig, preflight.run, 1),
    "inspect": Stage(inspect.InspectConfig, inspect.run, 1),
    "probe": Stage(probe.ProbeConfig, probe.run, 1),
    "audit": Stage(audit.AuditConfig, audit.run, 1, torch=False),
    "score": Stage(score.ScoreConfig, score.run, 1, torch=False),
}
"""The last five answer questions: what they make is shown, and never published."""
