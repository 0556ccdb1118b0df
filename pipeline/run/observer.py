"""What a run tells while it goes: an Observer hears each event of each step, and decides nothing."""

from __future__ import annotations

from typing import Any, Protocol

from pipeline.plan.steps import Step
from pipeline.registry import Artifact
from pipeline.results.evaluations import Difference
from stages.job import Evaluation, Finding


class Observer(Protocol):
    """Hears what happens to steps, to show it."""

    def found(self, finding: Finding) -> None:
        """A preflight has something to say."""

    def noted(self, text: str) -> None:
        """Something about the run itself, such as where it can be watched."""

    def reused(self, step: Step, artifact: Artifact) -> None:
        """It was there."""

    def skipped(self, step: Step) -> None:
        """It was not selected."""

    def waiting(self, step: Step, pid: str) -> None:
        """Another run, process `pid` ("" where that is not known), is making it."""

    def started(self, step: Step, why: str) -> None:
        """Its job begins, and why it has to."""

    def said(self, step: Step, text: str) -> None:
        """Its job has something to say, such as where it goes on."""

    def logged(self, step: Step, line: dict[str, Any]) -> None:
        """Its job has written a line of metrics."""

    def finished(self, step: Step, artifact: Artifact) -> None:
        """It has been published."""

    def evaluated(self, step: Step, found: Evaluation, before: str, gain: Difference | None) -> None:
        """What an evaluation found on held-out rows, and how much better that is than `before`, the policy that the
        stage started from. None: there is none, or it cannot be compared."""
