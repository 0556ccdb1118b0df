"""A Run: everything that lives as long as one invocation of `switchback run`, and what its steps do with it.

Entering a Run starts it in the registry's log of runs and holds the base model. Its steps put artifacts into `made`.
Leaving it ends the launcher with all processes, and writes the run's last event: done, failed or stopped. A run that
is done releases its artifacts; any other keeps them held, so that it can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.launch.local import Launcher
from pipeline.plan.plan import ALL, Planned, Selection, described
from pipeline.plan.steps import Step
from pipeline.recipe.recipe import Recipe, dump
from pipeline.registry import Artifact, Registry, runs
from pipeline.registry.stores.store import Store
from pipeline.results import findings
from pipeline.run.mirror import open_mirror
from pipeline.run.observer import Observer
from stages.errors import BadInput
from stages.job import Execution, Finding


class Run:
    """One run of a recipe; a context manager."""

    def __init__(
        self,
        recipe: Recipe,
        planned: Sequence[Planned],
        registry: Registry,
        observer: Observer,
        selection: Selection = ALL,
        resumes: str | None = None,
    ) -> None:
        """`selection` is what was requested of the plan; `resumes` is the run that this one continues."""
        self.recipe, self.planned, self.registry, self.observer = recipe, planned, registry, observer
        self.launcher = Launcher(recipe.launch.threads)
        self.mirror: Store | None = None
        """Gets a copy of the resume checkpoints; None: none."""
        self.made: dict[str, Artifact] = {}
        """Step -> its artifact."""
        self.id = ""
        """Known once it is entered."""
        self._selection, self._resumes = selection, resumes
        self._base: list[Artifact] = []

    @property
    def execution(self) -> Execution:
        """How its jobs are run."""
        return self.recipe.launch

    def __enter__(self) -> Run:
        planned = {
            "base": self.planned[0].step.inputs["policy"].source,
            "steps": [described(one) for one in self.planned],
            "selection": self._selection._asdict(),
            "directory": str(Path.cwd()),
        }
        self.id = runs.start(self.registry, self.recipe.name, dump(self.recipe), planned, self._resumes)
        with self._recording_its_end():
            self._hold_base()
            self.mirror = open_mirror(self.recipe.work.mirror)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            try:
                self.launcher.close()
            finally:
                self._record_end(error)
            return
        with self._recording_its_end():
            self.launcher.close()
            for artifact in (*self._base, *self.made.values()):
                self.registry.release(artifact.id, self.id)
        self.record("done")

    def record(self, event: str, **what: Any) -> None:
        """Write an event of the run's log."""
        runs.record(self.registry, self.id, event, **what)

    def report(self, found: Sequence[Finding]) -> None:
        """Show findings and record them. Raises Refused for one on which the run must not train."""
        for finding in findings.merged(found):
            self.observer.found(finding)
        if found:
            self.record("findings", findings=[finding.model_dump(mode="json") for finding in found])
        findings.refuse(found)

    def say(self, step: Step, text: str) -> None:
        """Show and record a message of a step's job."""
        self.observer.said(step, text)
        with self._best_effort(step):
            self.record("said", step=step.name, text=text)

    def beat(self, step: Step) -> None:
        """Record that the run lives, so that garbage collection leaves its artifacts alone."""
        with self._best_effort(step):
            runs.beat(self.registry, self.id)

    @contextmanager
    def _best_effort(self, step: Step) -> Iterator[None]:
        """A registry that cannot take a message of a run does not end the run."""
        try:
            yield
        except (BadInput, OSError) as error:
            self.observer.said(step, f"could not be remembered: {error}; the stage goes on")

    @contextmanager
    def _recording_its_end(self) -> Iterator[None]:
        """An exception in this block is the run's end."""
        try:
            yield
        except BaseException as error:
            self._record_end(error)
            raise

    def _record_end(self, error: BaseException) -> None:
        state = "failed" if isinstance(error, Exception) else "stopped"
        self.record(state, message=str(error) or type(error).__name__)

    def _hold_base(self) -> None:
        """Hold the base model, where it is an artifact. Raises BadInput when it is void."""
        base = self.planned[0].step.inputs["policy"].artifact
        if base is None:
            return
        artifact = self.registry.open(base)
        if not self.registry.hold(artifact, self.id):
            raise BadInput(f"model.artifact: {base} is void; choose another, or run its recipe to make it again")
        self._base.append(artifact)
