"""The kinds of stage that a recipe is made of, and `evaluate`, which the plan puts after every policy.

Importing this is cheap: torch, transformers and trl are imported inside a kind's `run` and `preflight`.
"""

from __future__ import annotations

from stages import evaluate, grpo, rejection, sft
from stages.config import StageConfig
from stages.stage import Stage

STAGES: dict[str, Stage] = {
    "sft": sft.STAGE,
    "grpo": grpo.STAGE,
    "rejection": rejection.STAGE,
    "evaluate": evaluate.STAGE,
}


def recipe_kinds() -> list[str]:
    """The kinds that a recipe may name."""
    return [kind for kind, stage in STAGES.items() if issubclass(stage.config, StageConfig)]
