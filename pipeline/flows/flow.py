"""The Prefect flow: it reads as the recipe, step after step. One task a step, called in the main thread, so that Ctrl-C
and SIGTERM reach it.

Prefect shows and schedules; it decides nothing. Its caching stays off, because it cannot know that a checkpoint is
gone: the registry decides, and publishing happens in the task's body. A task's result is small JSON.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker, PrefectConsoleHandler
from prefect.states import Completed

from pipeline.plan.plan import Planned
from pipeline.registry import Artifact

PATIENCE = 2.0
"""Seconds that Prefect may take to send its last logs and events."""

RunStep = Callable[[Planned], tuple[Artifact, bool] | None]
"""Makes a step: its artifact and whether it was reused; None where it was not selected."""


def run_flow(run: str, planned: list[Planned], run_step: RunStep) -> None:
    """Run the plan as a Prefect flow named for the run."""

    @task(name="step", task_run_name="{step}", cache_policy=NO_CACHE, persist_result=False)
    def step_task(step: str, inputs: list[dict[str, Any] | None]) -> State[Any]:
        outcome = run_step(by_name[step])
        if outcome is None:
            return Completed(name="NotSelected")
        artifact, reused = outcome
        made = {"step": step, "artifact": artifact.id, "reused": reused}
        return Completed(name="Reused" if reused else "Completed", message=artifact.id, data=made)

    @flow(name="switchback", flow_run_name=run, validate_parameters=False, persist_result=False)
    def run_steps(steps: list[str]) -> None:
        results: dict[str, Any] = {}
        for step in steps:
            reads = [ref.step for ref in by_name[step].step.inputs.values() if ref.step]
            inputs = [results[name] for name in reads]
            state = step_task(step, inputs, return_state=True)  # pyright: ignore[reportCallIssue]
            results[step] = state.result()  # pyright: ignore[reportAttributeAccessIssue]

    by_name = {plan.step.name: plan for plan in planned}
    _leave_the_terminal()
    try:
        run_steps(list(by_name))
    finally:
        _flush()


def _flush() -> None:
    """Send Prefect's remaining logs and events now. At exit its threads would try for a minute to reach a stopped
    server."""
    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=PATIENCE)


def _leave_the_terminal() -> None:
    """Keep Prefect's log off the terminal; it goes to Prefect's server."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, PrefectConsoleHandler)]:
        root.removeHandler(handler)
