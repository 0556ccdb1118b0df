"""A policy that did not move is a finding of its stage."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.job import Execution, Format, Job
from stages.policy.publishing import _unmoved
from tests.models import save

FORMAT = Format(prompt="p", prompt_digest="", system_prompt="", user_template="{{ prompt }}", response_prefix="")


def found(before, after):
    job = Job(
        kind="sft", name="warmup", config={}, inputs={"policy": str(before)}, work="", out=str(after), problem=None,
        rows=None, format=FORMAT, seed=0, dtype="float32", execution=Execution(),
    )  # fmt: skip
    return [one.rule for one in _unmoved(job)]


@pytest.fixture
def policies(tmp_path):
    before = save(tmp_path / "before")
    shutil.copytree(before, tmp_path / "after")
    return before, tmp_path / "after"


def rewritten(policy, change):
    weights = load_file(policy / "model.safetensors")
    (policy / "model.safetensors").unlink()
    for number, part in enumerate(change(weights)):
        save_file(part, policy / f"model-{number}.safetensors")


def test_a_policy_with_the_weights_it_came_from_is_a_finding(policies):
    assert found(*policies) == ["policy_did_not_move"]


def test_one_weight_that_moved_by_the_least_step_is_a_move(policies):
    def nudged(weights):
        name = sorted(weights)[-1]
        weights[name].view(-1)[-1] = torch.nextafter(weights[name].view(-1)[-1], torch.tensor(torch.inf))
        return [weights]

    rewritten(policies[1], nudged)
    assert found(*policies) == []


def test_other_files_and_another_precision_are_no_move(policies):
    """bfloat16 of the same weights, in two files."""

    def split(weights):
        names = sorted(weights)
        halves = names[::2], names[1::2]
        return [{name: weights[name].to(torch.bfloat16) for name in half} for half in halves]

    rewritten(policies[1], split)
    assert found(*policies) == ["policy_did_not_move"]


def test_what_cannot_be_compared_is_not_said_to_stand_still(policies):
    rewritten(policies[0], lambda weights: [])
    assert found(*policies) == []
