"""The evaluations of a policy, and which of two policies' can be compared: those that were asked the same, of other policies."""

from __future__ import annotations

from typing import Any

from pipeline.registry import Artifact, Registry

OF_THE_POLICY = ("inputs", "format")
"""Fields of an evaluation's identity that differ from policy to policy."""


def of_policy(registry: Registry, policy: Artifact) -> list[Artifact]:
    """The evaluate artifacts of a policy that may be used, newest first."""
    found = (one for one in registry.artifacts() if one.kind == "evaluate" and _is_of(one, policy))
    return [one for one in found if registry.usable(one)][::-1]


def settings(evaluation: Artifact) -> dict[str, Any]:
    """Everything that was asked of an evaluation, but for whom."""
    return {name: value for name, value in evaluation.identity.items() if name not in OF_THE_POLICY}


def _is_of(evaluation: Artifact, policy: Artifact) -> bool:
    source = evaluation.inputs.get("policy")
    return source is not None and source.id == policy.id
