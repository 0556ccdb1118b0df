"""The process that shows a run in Prefect: a flow with a task a step, which reads as the recipe.

Lines of JSON come in on stdin from the run (`pipeline.flows.report`): first the plan, then what became of each step,
in its order. A task is a step's time from the end of the one before to its own line. Out go at most three lines: that
Prefect is imported, whether its server takes us, and how it ended.

Prefect shows and decides nothing: no step is made here, so nothing that a server does can hold one up or fail it.
Prefect's caching stays off, because it cannot know that a checkpoint is gone. The run ends this process whenever it
has no more use for it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import IO, Any

from stages.runtime.process import die_with_parent

FLUSH = 10.0
"""Seconds that Prefect's threads may take to send their last logs and events."""


def main(parent: int) -> None:
    """Show the run of process `parent`."""
    die_with_parent(parent)  # signals stay blocked, as it was started: those to the whole process tree are for the run
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(**line: Any) -> None:
        print(json.dumps(line), file=answers)

    try:
        from pipeline.flows.health import complaint

        answer(imported=True)
        answer(complaint=complaint())
        shown = json.loads(sys.stdin.readline() or "null")
        if shown:
            show(shown["run"], shown["steps"], sys.stdin)
        answer(lost=None)
    except BaseException as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        answer(lost=re.sub(r"//[^/@ ]+@", "//", text)[:200])
    os._exit(0)  # Prefect's threads would wait for a server that is gone


def show(run: str, steps: dict[str, list[str]], lines: IO[str]) -> None:
    """Show a run as a flow: `steps` are its steps, each with those that it reads from, `lines` say what became of
    them."""
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE
    from prefect.client.schemas.objects import State

    @task(name="step", task_run_name="{step}", cache_policy=NO_CACHE, persist_result=False)
    def step_task(step: str, inputs: list[dict[str, Any]]) -> State[Any]:
        became.append(_state(step, json.loads(lines.readline() or '{"state": "Stopped"}')))
        return became[-1]

    @flow(name="switchback", flow_run_name=run, validate_parameters=False, persist_result=False)
    def run_steps(steps: list[str]) -> State[Any] | None:
        results: dict[str, Any] = {}
        for step in steps:
            inputs = [results[name] for name in reads[step]]
            state = step_task(step, inputs, return_state=True)  # pyright: ignore[reportCallIssue]
            if not state.is_completed():  # pyright: ignore[reportAttributeAccessIssue]
                return State(type=became[-1].type, name=became[-1].name, message=became[-1].message)
            results[step] = state.result()  # pyright: ignore[reportAttributeAccessIssue]
        return None

    reads, became = steps, list[State[Any]]()
    ended = run_steps(list(steps), return_state=True)
    _flush()
    if ended.type != (became[-1].type if became else ended.type):
        raise RuntimeError(f"the flow ended as {ended.name}: {ended.message}")


def _state(step: str, became: dict[str, str]) -> Any:
    """The state of a task whose step became this. An interrupted step crashes its task, and with it the flow."""
    from prefect.states import Completed, Crashed, Failed

    name, text = became["state"], became.get("text", "")
    if name == "Failed":
        return Failed(message=text)
    if name == "Stopped":
        return Crashed(message=text or "The run has ended.")
    return Completed(name=name, message=text, data={"step": step, "artifact": text, "reused": name == "Reused"})


def _flush() -> None:
    """Send Prefect's remaining logs and events."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=FLUSH)


if __name__ == "__main__":
    main(int(sys.argv[1]))
