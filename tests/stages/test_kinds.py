"""A kind of stage is one file and one row of STAGES."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_args

import yaml

from pipeline.recipe.recipe import Box
from pipeline.registry import Registry
from stages.kinds import STAGES, recipe_kinds
from tests.conftest import ROOT, SWITCHBACK, environment

NOOP = '''
from typing import Literal
from pathlib import Path
from stages.config import StageConfig, identity, resolved
from stages.errors import BadInput
from stages.job import Finding, Result
from stages.stage import Batch, Inspected, Stage

class NoopConfig(StageConfig):
    """Settings of a `noop` stage."""

    kind: Literal["noop"] = resolved("noop")
    text: str = identity("nothing")
    """What it writes."""

def run(job):
    Path(job.out, "note.txt").write_text(job.config["text"])
    return Result(outputs={"note": "note.txt"}, metrics={"letters": len(job.config["text"])})

def check(config, earlier, seed):
    if not config.text:
        raise BadInput(f"stages.{config.name}.text: found nothing after {', '.join(earlier)}; write something")

def preflight(job, config, tokenizer, path):
    note = Finding(rule="noop", severity="note", stage=job.name, evidence={}, advice="it was inspected")
    return Inspected(findings=[note])

STAGE = Stage(config=NoopConfig, run=run, version=1, torch=False, makes=lambda config: ("note",), check=check,
              preflight=preflight)
'''
ROW = """
import noop
from stages.kinds import STAGES
STAGES["noop"] = noop.STAGE
"""
IN_THE_COMMAND = """
import sys
if sys.argv[0].endswith("switchback"):
    import row
    from pathlib import Path
    from pipeline.launch import serving_worker
    serving_worker.WORKER = [sys.executable, str(Path(__file__).with_name("worker.py"))]
"""
IN_THE_WORKER = """
import sys
import row
from stages.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_configs_that_a_type_checker_sees_are_those_of_the_table():
    assert list(get_args(Box)) == [STAGES[kind].config for kind in recipe_kinds()]


def test_a_kind_of_one_file_and_one_row_is_planned_checked_run_published_and_reused(settings, tmp_path):
    (tmp_path / "noop.py").write_text(NOOP)
    (tmp_path / "row.py").write_text(ROW)
    (tmp_path / "sitecustomize.py").write_text(IN_THE_COMMAND)
    (tmp_path / "worker.py").write_text(IN_THE_WORKER)  # a worker has no PYTHONPATH
    settings["stages"] = [{"name": "idle", "kind": "noop", "policy": "base"}]
    recipe, registry = tmp_path / "recipe.yaml", tmp_path / "r"
    recipe.write_text(yaml.safe_dump(settings))
    env = environment(PYTHONPATH=f"{tmp_path}:{ROOT}")

    def switchback(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SWITCHBACK), *arguments, "--registry", str(registry)]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    checked = switchback("check", str(recipe)).stdout
    assert f"{recipe}: good; 1 stage: idle" in checked and "it was inspected" in checked
    run = ("run", str(recipe), "--no-prefect", "--only", "idle")
    first = switchback(*run)
    assert first.returncode == 0, first.stderr
    (made,) = Registry(registry).artifacts("idle")
    assert made.kind == "noop" and made.metrics == {"letters": 7} and made.outputs == {"note": "note.txt"}
    planned = {step["step"]: step["action"] for step in json.loads(switchback("plan", str(recipe), "--json").stdout)}
    assert planned["idle"] == "reuse"
    assert switchback(*run).returncode == 0 and len(Registry(registry).artifacts("idle")) == 1
    refused = switchback("plan", str(recipe), "--set", "stages.idle.text=''")
    assert refused.returncode == 2 and "stages.idle.text: found nothing after" in refused.stderr, refused.stderr
    unknown = switchback("plan", str(recipe), "--set", "stages.idle.kind=nop")
    assert "did you mean noop?" in unknown.stderr
