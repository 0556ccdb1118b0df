"""A reward of TRL has one name, whichever of its two a recipe or an older log says."""

from __future__ import annotations

import pytest

from stages.data.selection import Keep, candidate, select
from stages.errors import BadInput
from stages.problems.custom.settings import ALIASES, DatasetProblem, by_component
from stages.rewards.compose import Rewards, composed, nothing_seen, weights_of
from tests.pipeline.plan.test_identity import keys


def weights(*names, **more):
    settings = DatasetProblem.model_validate({"dataset": "org/data", "rewards": list(names), **more})
    return {reward.component: reward.weight for reward in settings.components}


def line(rewards):
    return {"ids": [1, 2], "prefix": 0, "text": "t", "finished": True, "failure": None, "score": 1.0, "sample": 0,
            "step": 1, "rewards": rewards}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), ALIASES.items())
def test_both_names_of_a_reward_are_one_component_and_one_key(ours, theirs, settings, tmp_path):
    assert weights(ours) == weights(theirs) == {ours: 1.0}
    seen = [
        keys(settings | {"problem": {"dataset": "org/data", "rewards": [name]}}, tmp_path) for name in (ours, theirs)
    ]
    assert seen[0] == seen[1]
    with pytest.raises(ValueError, match=f"two are called {ours}"):
        weights(ours, theirs)


@pytest.mark.parametrize(("ours", "theirs"), ALIASES.items())
def test_a_log_with_either_name_is_read_under_the_one_there_is(ours, theirs):
    """A rollout that earned 1 is kept, and one that earned 0 is not."""
    for logged in (ours, theirs):
        group = [candidate(line({logged: value}), weights(theirs), lambda score: score >= 1) for value in (1.0, 0.0)]
        assert [one.reward for one in group] == [1.0, 0.0]
        assert [choice.dropped_by for choice in select(group, Keep(min_reward=0.5, dedup="off"))] == [
            None,
            "min_reward",
        ]


def test_a_stage_may_weigh_and_normalise_a_reward_under_either_name():
    import torch

    problem = weights("think_format", "accuracy")
    for name in ("accuracy", "accuracy_reward"):
        settings = Rewards(weights={name: 3.0}, normalise={name: "group"})
        assert weights_of("rl1", settings, problem) == {"think_format": 1.0, "accuracy": 3.0}
        values = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        made = composed(values, list(problem), settings, 2, nothing_seen(2).with_batch(values))
        assert torch.equal(made[:, 0], values[:, 0]) and not torch.equal(made[:, 1], values[:, 1])
    with pytest.raises(BadInput, match="accuracy, accuracy_reward name one reward twice"):
        weights_of("rl1", Rewards(weights={"accuracy": 1.0, "accuracy_reward": 2.0}), problem)


def test_a_component_of_ones_own_keeps_its_name():
    """Also where it is called as a reward of TRL is."""
    assert weights("mine.py:accuracy_reward") == {"accuracy_reward": 1.0}
    assert by_component({"accuracy_reward": 1.0, "other": 2.0}, ["accuracy_reward", "accuracy"]) == {
        "accuracy_reward": 1.0,
        "other": 2.0,
    }
