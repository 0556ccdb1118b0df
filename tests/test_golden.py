"""What a version computes is written down: a change of keys or results has to be made knowingly, by raising a version.

A key that moves makes every user's finished steps be run again. A result that moves under the same key makes the
registry lie. If one of these tests fails: for a changed result, raise the kind's version in its `STAGE` (or the
problem's in `stages/problems/catalog.py`); then write the new values here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.plan.steps import steps as steps_of
from pipeline.recipe import recipe
from pipeline.registry import Registry
from stages.inspections.kinds import INSPECTIONS
from stages.kinds import STAGES
from stages.problems.catalog import PROBLEMS
from stages.problems.scheduling.problem import Scheduling
from tests.conftest import TINY, run_cli

VERSIONS = {
    "sft": 1,
    "grpo": 2,
    "rejection": 3,
    "evaluate": 3,
    "preflight": 1,
    "inspect": 1,
    "probe": 1,
    "audit": 1,
    "score": 1,
    "rows": 1,
}
KEYS = {
    "base.evaluate": "9186a7c5340b",
    "warmup": "d8de2b588961",
    "warmup.evaluate": "c07e572dbbe2",
    "rl1": "ac117e8749fd",
    "rl1.evaluate": "b0c9fde5558c",
    "harvest": "5468cc55c3c5",
    "distill": "4888a31e68c4",
    "distill.evaluate": "345a4b5b9145",
    "rl2": "59a75f39527b",
    "rl2.evaluate": "2dc4816f7275",
}
ROWS = {
    "train": ["a1ecee30ad0816a8", "cad011498c5cc972"],
    "validation": ["03b33ef6bd16cd0b", "6f96748ac3db1f27"],
    "held_out": ["142ed2c7f2c5621f", "ae103d136461d60d"],
}
RESULTS = {("warmup", "completion_loss"): 0.1369, ("distill", "completion_loss"): 0.3343, ("rl1", "entropy"): 0.3331}
"""(step, metric) -> value, equal to 5 %: rounding differs between machines and may turn a sampled token. Sampling,
selection and estimates are held exactly by tests of their own."""


def test_keys_are_those_of_this_version(tmp_path):
    settings = {**TINY, "model": {"hub": "org/name", "revision": "abc", "dtype": "float32"}}
    steps = steps_of(recipe.Recipe.model_validate(settings), Registry(tmp_path / "r"))
    assert {step.name: step.key[:12] for step in steps} == KEYS


def test_rows_are_those_of_this_version():
    assert {name: one.version for name, one in PROBLEMS.items()} == {
        "scheduling": "2",
        "arithmetic": "1",
        "countdown": "1",
    }
    problem = Scheduling("compact")
    assert {split: [row.id for row in problem.rows(split, 0, 2, seed=0)] for split in ROWS} == ROWS


def test_results_are_those_of_this_version(climbed):
    assert {kind: stage.version for kind, stage in {**STAGES, **INSPECTIONS}.items()} == VERSIONS
    _, registry = climbed
    listed = json.loads(run_cli("ls", "--registry", registry, "--json").stdout)
    first = {one["stage"]: Path(one["path"]) for one in reversed(listed)}
    found = {
        (step, metric): json.loads((first[step] / "artifact.json").read_text())["metrics"][metric]
        for step, metric in RESULTS
    }
    assert found == pytest.approx(RESULTS, rel=0.05)
