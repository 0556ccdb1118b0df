"""A stage that is killed goes on from its newest whole checkpoint, and ends bit for bit where it would have ended."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline.registry import Registry, runs
from stages import checkpoints, randomness
from stages.job import Job
from tests.conftest import LEARNED, ROOT, SWITCHBACK, environment, printed_json, run_cli
from tests.models import save
from tests.test_grpo import trained

LORA = {"r": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"}
SFT = {"rows": "train[0:64]", "epochs": 2.0, "rows_per_step": 16, "save_every": 2}
GRPO = {"steps": 8, "prompts_per_step": 4, "group_size": 4, "temperature": 1.0, "save_every": 2}
MIDDLE = "open checkpoint-6/trainer_state.json"
"""A point in the middle of training: six steps are done, and what they made is being saved."""

SCENARIOS = {
    "sft": {"stage": "warmup", "config": SFT, "micro_batch": 8},
    "sft-lora": {"stage": "warmup", "config": SFT, "lora": LORA},
    "sft-packed": {"stage": "warmup", "config": {**SFT, "packing": {"strategy": "bfd", "max_length": 256}, "epochs": 8.0, "rows_per_step": 4}},
    "grpo": {"stage": "rl1", "config": {**GRPO, "kl": {"beta": 0.05}}, "micro_batch": 8},
    "grpo-no-kl": {"stage": "rl1", "config": {**GRPO, "kl": {"beta": 0.0}}},
    "grpo-iterations": {"stage": "rl1", "config": {**GRPO, "kl": {"beta": 0.05}, "trl": {"num_iterations": 2}, "save_every": 3}, "micro_batch": 4},
    "grpo-lora": {"stage": "rl1", "config": {**GRPO, "kl": {"beta": 0.05}}, "lora": LORA},
    "rejection": {"stage": "harvest", "config": {"samples": 128}},
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(climbed):
    """Stage -> its job.json, of the climb that all tests look at."""
    found = {}
    for path in (climbed[1] / "work").glob("*/job.json"):
        job = Job.model_validate_json(path.read_text())
        found[job.name] = path
    return found


def crash(jobs, directory: Path, *scenarios) -> list[dict]:
    """What came of scenarios (`tests.stage_crashes`)."""
    given = [{"kill": MIDDLE, **one, "job": str(jobs[one["stage"]])} for one in scenarios]
    command = [sys.executable, "-m", "tests.stage_crashes", str(directory)]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(given), capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def middles(jobs, tmp_path_factory):
    """Every scenario, killed in the middle."""
    kills = {name: {"kill": MIDDLE} for name in SCENARIOS}
    kills["rejection"] = {"kill": "os.rename chunks/"}
    scenarios = [{"name": name, **one, **kills[name]} for name, one in SCENARIOS.items()]
    return {one["scenario"]: one for one in crash(jobs, tmp_path_factory.mktemp("middles"), *scenarios)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_stage_killed_in_the_middle_ends_bit_for_bit_where_it_would_have_ended(name, middles):
    one = middles[name]
    assert one["killed"]
    assert one["differs"] == []
    assert one["log"], "the log holds every step once, with the same numbers"


@pytest.mark.slow
def test_it_goes_on_from_its_newest_whole_checkpoint_and_names_the_torn_one(middles):
    torn = "set aside checkpoint-6: it was not finished"
    assert middles["sft"]["said"] == [torn, "resumed from checkpoint-4"]
    assert middles["grpo-iterations"]["said"] == [torn, "resumed from checkpoint-3"]
    assert middles["rejection"]["said"] == ["resumed with 3 batches that were sampled already"]
