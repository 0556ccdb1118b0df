"""The kinds of step, and what others ask of each.

Importing this is cheap: torch, transformers and trl are imported inside `run`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stages import evaluate, grpo, rejection, sft
from stages.config import Config
from stages.inspections import inspect, preflight, probe, score
from stages.job import Job, Result
from stages.rewards.audit import audit


@dataclass(frozen=True)
class Stage:
    """A kind of step."""

    config: type[Config]
    run: Callable[[Job], Result]
    version: int
    """Raised when the same config gives another result; part of the key."""
    saves: bool = False
    """It writes checkpoints, from which it is resumed."""
    torch: bool = True
    """It needs torch, which takes seconds to import."""


STAGES: dict[str, Stage] = {
    "sft": Stage(sft.SftConfig, sft.run, 1, saves=True),
    "grpo": Stage(grpo.GrpoConfig, grpo.run, 2, saves=True),
    "rejection": Stage(rejection.RejectionConfig, rejection.run, 3),
    "evaluate": Stage(evaluate.EvaluateConfig, evaluate.run, 3),
    "preflight": Stage(preflight.PreflightConfig, preflight.run, 1),
    "inspect": Stage(inspect.InspectConfig, inspect.run, 1),
    "probe": Stage(probe.ProbeConfig, probe.run, 1),
    "audit": Stage(audit.AuditConfig, audit.run, 1, torch=False),
    "score": Stage(score.ScoreConfig, score.run, 1, torch=False),
}
"""The last five answer questions: what they make is shown, and never published."""
