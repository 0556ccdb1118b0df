"""General rows beside the rollouts of a grpo stage: trained by likelihood, by hand, however the step is cut into
pieces."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file

from pipeline.registry import Registry
from stages.data import mix
from stages.errors import BadInput
from stages.grpo import GrpoConfig
from stages.job import Job
from tests.conftest import LEARNED, ROOT, environment, run_cli, stage
from tests.mixed import COEFFICIENT, RATE, ROWS, trained
from tests.models import make_model, make_tokenizer
from tests.one_and_two import one_and_two
from tests.pipeline.plan.test_identity import keys
from tests.stages.data.test_mix import general
from tests.stages.trl.test_resume import MIDDLE

IN_PIECES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 4}


def by_hand(rows):
    """(mean loss, its gradient) of the completion tokens, row by row, without padding."""
    model = make_model(make_tokenizer())
    losses = []
    for row in rows:
        log_p = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        losses += [-log_p[i - 1, row.ids[i]] for i in range(1, len(row.ids)) if row.roles[i] == "c"]
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def apart(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("a_step", [3, 4])
@pytest.mark.parametrize("pieces", [{}, IN_PIECES], ids=["whole", "in pieces"])
def test_the_mix_adds_its_coefficient_times_the_gradient_of_the_mean_loss(a_step, pieces, tmp_path):
    """Over what the same rollouts do without it; with 3 rows for 4 micro-steps, one of them has none."""
    _, alone = trained(tmp_path, general=False, **pieces)
    trainer, together = trained(tmp_path, a_step=a_step, **pieces)
    loss, gradient = by_hand(ROWS[:a_step])
    assert apart(alone, dict(make_model(make_tokenizer()).named_parameters())) > 1e-3
    moved = {name: (alone[name] - together[name]) / (RATE * COEFFICIENT) for name in alone}
    assert apart(moved, gradient) < 1e-4 * max(one.abs().max().item() for one in gradient.values())
    logged = [line["mix/loss"] for line in trainer.state.log_history if "mix/loss" in line]
    assert logged == [pytest.approx(loss, rel=1e-5)]


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    """With rewards that are all alike, so that sampling, which differs, moves nothing."""
    one_and_two("tests.mixed", tmp_path)
    start = dict(make_model(make_tokenizer()).named_parameters())
    for name in ("3.safetensors", "4.safetensors"):
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert apart(one, start) > 1e-3 and apart(one, two) < 1e-5 * apart(one, start)


def test_a_resumed_stage_trains_on_the_rows_that_it_would_have_had(tmp_path):
    _, whole = trained(tmp_path / "a", steps=3, save_strategy="steps", save_steps=1)
    _, resumed = trained(tmp_path / "a", steps=3, resume=str(tmp_path / "a" / "checkpoint-1"))
    assert apart(whole, resumed) == 0.0


def test_every_row_is_taken_once_before_one_is_taken_again():
    rows = list(range(10))
    taken = [mix.of_step(rows, 3, step, 0) for step in range(6)]
    assert taken[:3] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert max(Counter(row for step in taken[3:] for row in step).values()) == 1 and taken[3:] != taken[:3]
    assert taken[3:] != [mix.of_step(rows, 3, step, 1) for step in range(3, 6)]


@pytest.mark.parametrize(
    ("share", "own", "rows"), [(0.1, 9, 1), (0.1, 10, 2), (0.07, 93, 7), (0.5, 16, 16), (0.001, 2, 1)]
)
def test_a_step_has_at_least_the_share(share, own, rows):
    assert mix.count_of_step(own, share) == rows


def test_a_step_that_would_take_a_row_twice_is_one_line():
    with pytest.raises(BadInput, match=r"stages\.rl1\.mix: every step takes 4 rows, but its data have 3; add rows"):
        mix.drawn_by_steps("rl1", [1, 2, 3], 4, 9, 0)
    first = mix.drawn_by_steps("rl1", list(range(50)), 4, 2, 0)
    assert len(first) == 8 and mix.drawn_by_steps("rl1", list(range(50)), 4, 3, 0)[:8] == first


def test_a_coefficient_of_0_is_refused():
    with pytest.raises(ValidationError, match="greater than 0"):
        GrpoConfig.model_validate(
            {**stage(LEARNED, "rl1"), "mix": {"data": "general.jsonl", "share": 0.1, "coefficient": 0}}
        )


def test_the_coefficient_is_identity(settings, tmp_path):
    mixed = stage(settings, "rl1")["mix"] = {"data": str(general(tmp_path / "general.jsonl")), "share": 0.2}
    before = keys(settings, tmp_path)
    mixed["coefficient"] = 0.7
    after = keys(settings, tmp_path)
    assert before[:3] == after[:3] and before[3] != after[3]


@pytest.fixture(scope="module")
def mixed(climbed, tmp_path_factory):
    """(recipe, registry) of the tiny climb's rl1 again, beside general rows."""
    directory = tmp_path_factory.mktemp("mixed")
    shutil.copytree(climbed[1], directory / "registry")
    file = general(directory / "general.jsonl")
    boxes = [LEARNED["stages"][0], {**stage(LEARNED, "rl1"), "mix": {"data": str(file), "share": 0.5}}]
    (directory / "recipe.yaml").write_text(yaml.safe_dump({**LEARNED, "stages": boxes}))
    done = run_cli("run", directory / "recipe.yaml", "--registry", directory / "registry", "--no-prefect")
    assert done.returncode == 0, done.stderr
    return directory / "recipe.yaml", directory / "registry"


def test_a_stage_logs_what_its_mix_costs(mixed):
    registry = Registry(mixed[1])
    (made,) = [one for one in registry.artifacts() if one.stage == "rl1" and "mix/loss" in one.metrics]
    lines = [json.loads(line) for line in (registry.path(made) / "metrics.jsonl").read_text().splitlines()]
    assert [line["mix/loss"] > 0 for line in lines] == [True, True]
    assert made.metrics["mix/loss"] == lines[-1]["mix/loss"]


def test_a_general_row_that_cannot_be_used_is_found_before_anything_runs(mixed, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1 + 1?", "completion": "2"}\n' * 9)
    settings = yaml.safe_load(mixed[0].read_text())
    settings["stages"][1]["mix"]["data"] = str(bad)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    done = run_cli("run", tmp_path / "recipe.yaml", "--registry", tmp_path / "r", "--no-prefect")
    assert done.returncode == 2 and f"{bad}, line " in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(Registry(tmp_path / "r").artifacts())


@pytest.mark.slow
def test_a_stage_with_a_mix_that_is_killed_ends_bit_for_bit_where_it_would_have_ended(mixed, tmp_path):
    jobs = [(path, Job.model_validate_json(path.read_text())) for path in (mixed[1] / "work").glob("*/job.json")]
    ((path, job),) = [(path, job) for path, job in jobs if "mix" in job.inputs]
    config = {
        "steps": 8,
        "save_every": 3,
        "mix": {**job.config["mix"], "share": 0.8},
    }  # 8 of 40 rows a step: two passes
    scenario = {"name": "mix", "stage": "rl1", "job": str(path), "config": config, "micro_batch": 4, "kill": MIDDLE}
    done = subprocess.run(
        [sys.executable, "-m", "tests.stage_crashes", str(tmp_path)],
        cwd=ROOT, input=json.dumps([scenario]), capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one = json.loads(done.stdout)
    assert one["killed"] and one["differs"] == [] and one["log"] and one["kept"]
