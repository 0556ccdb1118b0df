"""The kinds of inspection: jobs whose answer is shown and never published."""

from __future__ import annotations

from stages.inspections import inspect, preflight, probe, rows, score
from stages.rewards.audit import audit
from stages.stage import Stage

INSPECTIONS: dict[str, Stage] = {
    "preflight": Stage(preflight.PreflightConfig, preflight.run, 1),
    "inspect": Stage(inspect.InspectConfig, inspect.run, 1),
    "probe": Stage(probe.ProbeConfig, probe.run, 1),
    "audit": Stage(audit.AuditConfig, audit.run, 1, torch=False),
    "score": Stage(score.ScoreConfig, score.run, 1, torch=False),
    "rows": Stage(rows.RowsConfig, rows.run, 1, torch=False),
}
