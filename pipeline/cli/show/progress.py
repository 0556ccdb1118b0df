"""Progress of a run: a live line per stage on a terminal, a plain line every few seconds when piped.

rl1        30/50 | 12.1 s | eta 8 s | reward 0.614 | kl 0.3121 | entropy 0.112
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from rich.live import Live
from rich.text import Text

from pipeline.cli.show.tables import SEVERITY_STYLE
from pipeline.cli.show.terminal import console
from pipeline.plan.steps import Step
from pipeline.registry import Artifact
from pipeline.results.evaluations import Difference
from stages.job import Evaluation, Finding

EVERY = 10.0
"""Seconds between two plain lines of one step."""
SHOWN = {"loss": "loss", "completion_loss": "completion loss", "reward": "reward", "kl": "kl", "entropy": "entropy"}
"""Metric -> its name on the terminal."""


class Progress:
    """An Observer (`pipeline.run.observer`) that prints, and owns the terminal's live line while it lasts."""

    def __init__(self) -> None:
        self._console = console()
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._width = 18
        self._printed = 0.0
        self._last: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def found(self, finding: Finding) -> None:
        """Print a finding of a preflight."""
        override = f" (--set {finding.override})" if finding.override else ""
        self._console.print(
            Text(
                f"{finding.stage:<{self._width}} {finding.severity}: {finding.advice}{override}",
                SEVERITY_STYLE[finding.severity],
            )
        )

    def noted(self, text: str) -> None:
        """Print something about the run itself."""
        self._console.print(text, soft_wrap=True)

    def reused(self, step: Step, artifact: Artifact) -> None:
        """Print that a step reuses an artifact."""
        self._line(step, f"reuse {artifact.id}", "green")

    def skipped(self, step: Step) -> None:
        """Print that a step is not selected."""
        self._line(step, "skip, not selected", "dim")

    def waiting(self, step: Step, pid: str) -> None:
        """Print that another run is making a step."""
        process = f"process {pid}" if pid else "another process"
        self._line(step, f"waits for {process}, which is making it", "dim")

    def started(self, step: Step, why: str) -> None:
        """Print that a job begins, and which settings have changed since the nearest artifact."""
        self._printed, self._last = time.monotonic(), {}
        if " -> " in why:
            self._line(step, f"runs, because {why}", "dim")
        if self._live:
            self._live.update(Text(f"{step.name:<{self._width}} starting"), refresh=True)

    def said(self, step: Step, text: str) -> None:
        """Print a message of a job."""
        self._console.print(f"{step.name}: {text}", soft_wrap=True)

    def logged(self, step: Step, line: dict[str, Any]) -> None:
        """Show a line of a job's metrics log."""
        self._last = line
        if self._live:
            self._live.update(Text(f"{step.name:<{self._width}} {progress_line(line)}"), refresh=True)
        elif time.monotonic() - self._printed > EVERY:
            self._printed = time.monotonic()
            self._line(step, progress_line(line))

    def finished(self, step: Step, artifact: Artifact) -> None:
        """Print that a job's artifact is published, with its last metrics."""
        seconds = artifact.provenance.get("seconds", 0.0)
        facts = [f"done in {seconds:.1f} s, {artifact.id}", *(metrics(self._last) or kept(artifact))]
        self._line(step, " | ".join(facts), "bold")

    def evaluated(self, step: Step, found: Evaluation, before: str, gain: Difference | None) -> None:
        """Print the score of a policy, and its gain on the policy before it."""
        if found.mean is None or found.interval is None:
            self._line(step, f"mean -, because none of {found.rows} rows has a score")
            return
        text = f"mean {100 * found.mean:.1f} ({_between(found.interval, '.1f')})"
        if found.unscored:
            text += f" over {found.rows - found.unscored} of {found.rows} rows, the others have no score"
        if gain is not None:
            text += f", {100 * gain.difference:+.1f} on {before} ({_between(gain.interval, '+.1f')})"
        self._line(step, text)

    def asked(self, name: str) -> Callable[[dict[str, Any]], None]:
        """A function that shows the metrics of an inspection while it runs."""

        def show(line: dict[str, Any]) -> None:
            if self._live:
                self._live.update(Text(f"{name:<{self._width}} {progress_line(line)}"), refresh=True)

        return show

    def _line(self, step: Step, text: str, style: str = "") -> None:
        self._console.print(Text.assemble(f"{step.name:<{self._width}} ", (text, style)), soft_wrap=True)
        if self._live:
            self._live.update(Text(""), refresh=True)


def kept(artifact: Artifact) -> list[str]:
    """The rollouts that a rejection stage kept, and the rules that dropped some; empty for another stage."""
    left = [(name.partition("/")[2], count) for name, count in artifact.metrics.items() if name.startswith("funnel/")]
    if not left:
        return []
    text = f"kept {left[-1][1]:.0f} of {left[0][1]:.0f} rollouts"
    rules = [f"{rule} left {count:.0f}" for (_, before), (rule, count) in pairwise(left) if count < before]
    if rules:
        text += f" ({', '.join(rules)})"
    return [text]


def _between(interval: tuple[float, float], form: str) -> str:
    """95 % interval of a share, x 100."""
    return " to ".join(f"{100 * end:{form}}" for end in interval)


def progress_line(line: dict[str, Any]) -> str:
    """A line of the metrics log as text: step/total, seconds, time to go, the shown metrics."""
    step, total, seconds = line["step"], line["total"], line["seconds"]
    to_go = seconds / step * (total - step) if step else 0.0
    return " | ".join([f"{step:>6}/{total}", f"{seconds:.1f} s", f"eta {to_go:.0f} s", *metrics(line)])


def metrics(line: dict[str, Any]) -> list[str]:
    """The shown metrics of a line."""
    shown = dict(SHOWN)
    if "reward" in line or "completion_loss" in line:
        del shown["loss"]  # GRPO's is about 0 by construction; SFT's mixes prompt and completion
    return [f"{name} {line[metric]:.4g}" for metric, name in shown.items() if line.get(metric) is not None]
