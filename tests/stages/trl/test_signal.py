"""Rewards that tell no rollouts apart stop a stage, or are a finding."""

from __future__ import annotations

import random

import pytest
import torch
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig

from stages.errors import NoSignal
from stages.policy import models
from stages.problems.base import Judgement, Row
from stages.rewards.compose import Rewards
from stages.trl.prefill import prefilled
from stages.trl.rewarding import Judging, RewardedGRPOTrainer
from stages.trl.signal import DROUGHT, Signal, speaks
from tests.conftest import run_cli, stage
from tests.models import save

NONE = float("nan")


@pytest.mark.parametrize(
    ("rewards", "told_apart"),
    [
        ([1, 1, 1, 1], False),
        ([1, 1, 0, 0], False),  # two groups, each of one reward
        ([1, 1, 0, 0.1], True),
        ([NONE, 1, 0, NONE], False),  # one reward a group
        ([NONE, NONE, 0, 1], True),
        ([NONE, NONE, NONE, NONE], False),
    ],
)
def test_two_different_rewards_of_one_group_are_a_signal(rewards, told_apart):
    assert speaks(torch.tensor(rewards, dtype=torch.float32), 2) == told_apart


def after(told, limit=50, solved=False):
    """The step at which a stage with these steps stops, and its findings."""
    signal = Signal()
    for step, one in enumerate(told, start=1):
        signal.hear(one, solved, 1)
        try:
            signal.refuse(limit)
        except NoSignal:
            return step, []
        signal = Signal(**signal.held())  # a checkpoint after every step changes nothing
    return None, [(one.rule, one.evidence["silent"], one.advice) for one in signal.findings("rl1")]


def test_a_stage_stops_after_its_first_silent_steps_and_only_then():
    assert after([False] * 60) == (50, [])
    assert after([False] * 60, limit=3) == (3, [])
    assert after([False] * 49 + [True] * 11)[0] is None
    assert after([False] * 60, limit=None)[0] is None
    assert after([False] * 60, solved=True)[0] is None


def test_a_shorter_stage_a_drought_and_solved_rows_are_findings():
    assert after([True] * 60)[1] == []
    ((rule, silent, advice),) = after([False] * 7)[1]
    assert (rule, silent) == ("no_signal", 7) and advice.startswith("no group of its 7 steps had two different rewards")
    ((_, silent, advice),) = after([True, *[False] * DROUGHT, True])[1]
    assert silent == DROUGHT and advice.startswith("for 50 steps in a row no group had")
    assert after([True, *[False] * (DROUGHT - 1), True] * 3)[1] == []
    ((_, _, advice),) = after([False] * 60, solved=True)[1]
    assert advice.endswith("every rollout was solved; give it harder rows")


def test_random_stages_are_counted_as_by_a_loop_over_their_steps():
    rng = random.Random(0)
    for _ in range(300):
        told = [rng.random() < 0.02 for _ in range(rng.randint(1, 200))]
        first = told.index(True) if True in told else len(told)
        stopped, found = after(told)
        if first >= 50:
            assert stopped == 50
            continue
        runs = "".join("x" if one else "." for one in told[first:]).split("x")
        longest = max(map(len, runs)) if first < len(told) else len(told)
        assert stopped is None and bool(found) == (first == len(told) or longest >= DROUGHT)
        assert not found or found[0][1] == longest


class Constant:
    """A reward that says the same of every rollout."""

    def __init__(self) -> None:
        self.outcomes, self.reward_weights, self.asked = ("x",), {"always": 1.0}, 0

    def judge(self, answers):
        self.asked += len(answers)
        return [Judgement(0.0, "x", False, True, {"always": 0.25}) for _ in answers]


def run(tmp_path, policy, problem, resume=None, steps=6, **settings):
    rows = [Row(str(i), f"What is {i} + 1?") for i in range(8)]
    prompts = [prefilled([{"role": "user", "content": row.prompt}], "") for row in rows]
    tokenizer = models.load_tokenizer(str(policy))
    trainer = RewardedGRPOTrainer(
        judging=Judging(problem, rows, problem.reward_weights, Rewards(), frozenset(), None, 4),
        model=models.load_policy(str(policy), "float32"),
        args=GRPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=4,
            max_steps=steps, beta=0.0, bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False,
            disable_tqdm=True, seed=7, logging_steps=1, **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt, "row": i} for i, prompt in enumerate(prompts)]),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_constant_reward_ends_training_at_the_step_that_was_asked_for_resumed_or_not(tmp_path):
    """The count is in the checkpoint of step 3, so the resumed trainer judges one more step, and not four."""
    policy = save(tmp_path / "policy")
    whole = Constant()
    with pytest.raises(NoSignal, match=r"in the first 4 steps no group had two different rewards"):
        run(tmp_path / "a", policy, whole, save_strategy="no")
    assert whole.asked == 4 * 4
    first = run(tmp_path / "b", policy, Constant(), steps=3, save_strategy="steps", save_steps=3)
    assert [one.rule for one in first.signal.findings("rl1")] == ["no_signal"]
    resumed = Constant()
    with pytest.raises(NoSignal):
        run(tmp_path / "b", policy, resumed, resume=str(tmp_path / "b" / "checkpoint-3"), save_strategy="no")
    assert resumed.asked == 4


SILENT = """
REWARDS = {"always": 1.0}
def rows(rng):
    while True:
        yield {"prompt": f"{rng.randrange(1000)} + 1?"}
def rewards(row, completion):
    return {"always": 0.25}
def score(row, completion):
    return 0.0
"""


def test_a_run_whose_rewards_say_nothing_ends_with_3_and_publishes_no_policy(settings, write, tmp_path):
    """What was made before it stays published."""
    (tmp_path / "mine.py").write_text(SILENT)
    settings |= {
        "problem": {"file": str(tmp_path / "mine.py"), "workers": 1},
        "evaluate": {"rows": 3, "samples": 1, "max_completion_length": 2},
        "validation": {"rows": 3},
        "format": {"prompt": "plain", "response_prefix": ""},
    }
    silent = {"steps": 5, "max_completion_length": 4, "audit": False, "stop_without_signal": 2}
    settings["stages"] = [{**stage(settings, "rl1"), **silent, "policy": "base", "rows": "train[0:8]"}]
    done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect")
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1, done
    assert "switchback: rl1: in the first 2 steps no group had two different rewards" in done.stderr
    assert [path.name.split("-")[0] for path in (tmp_path / "r" / "artifacts").iterdir()] == ["base.evaluate"]
