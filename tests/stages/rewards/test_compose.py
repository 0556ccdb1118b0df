"""Rewards: what becomes of a problem's components before TRL makes advantages of them, by hand."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.registry import Registry
from stages.errors import BadInput
from stages.rewards.compose import (
    LengthPenalty,
    RepetitionPenalty,
    Rewards,
    composed,
    nothing_seen,
    penalties,
    weighted_sum,
    weights_of,
)
from stages.tokens import token_rows
from tests.conftest import LEARNED, run_cli, stage

NAN = float("nan")
PROBLEM = {"format": 0.1, "score": 0.9}


def close(a: torch.Tensor, b: list) -> bool:
    return torch.allclose(a, torch.tensor(b, dtype=a.dtype), atol=1e-3, equal_nan=True)


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


def test_two_components_of_one_name_are_refused():
    own = Rewards(repetition_penalty=RepetitionPenalty())
    with pytest.raises(
        BadInput, match=r"stages\.rl1\.rewards\.repetition_penalty: the problem has a component of this"
    ):
        weights_of("rl1", own, {"repetition_penalty": 0.5})


def test_a_stage_replaces_weights_and_adds_its_penalties():
    own = Rewards(weights={"format": 0.0}, length_penalty=LengthPenalty(weight=0.5, start=1, end=2))
    assert weights_of("rl1", Rewards(), PROBLEM) == PROBLEM
    assert weights_of("rl1", own, PROBLEM) == {"format": 0.0, "score": 0.9, "length_penalty": 0.5}


@pytest.mark.parametrize("own", [{"weights": {"fromat": 1.0}}, {"normalise": {"fromat": "group"}}])
def test_a_component_that_there_is_not_is_one_line(own):
    with pytest.raises(
        BadInput, match=r"stages\.rl1\.rewards\.\w+: there is no component fromat; there is format, score"
    ):
        weights_of("rl1", Rewards.model_validate(own), PROBLEM)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"clip": [1.0, 0.0]}, "expected the least and the greatest"),
        ({"length_penalty": {"start": 9, "end": 9}}, "expected less than end"),
        ({"normalise": "rows"}, "none"),
        ({"weigths": {}}, "did you mean weights?"),
        ({"weights": {"score": 1e300}}, "less than or equal to 1000000"),
    ],
)
def test_settings_that_mean_nothing_are_refused(own, said):
    with pytest.raises(ValidationError, match=said):
        Rewards.model_validate(own)


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0.0), (10, 0.0), (11, -0.1), (15, -0.5), (20, -1.0), (21, -1.0), (500, -1.0)]
)
def test_a_long_completion_loses_linearly_between_start_and_end(length, expected):
    own = Rewards(length_penalty=LengthPenalty(start=10, end=20))
    assert penalties(own, [7] * length) == {"length_penalty": pytest.approx(expected)}


@pytest.mark.parametrize(
    ("ids", "ngram", "expected"),
    [([1, 2, 3], 1, 0.0), ([1, 1, 1, 1], 1, -0.75), ([1, 2, 1, 2, 1], 2, -0.5), ([1, 2], 3, 0.0), ([], 1, 0.0)],
)
def test_repetition_is_the_share_of_pieces_that_were_said_before(ids, ngram, expected):
    own = Rewards(repetition_penalty=RepetitionPenalty(ngram=ngram))
    assert penalties(own, ids) == {"repetition_penalty": pytest.approx(expected)}


def test_components_are_centred_and_scaled_within_the_group_or_the_batch():
    values = table([1.0, 2.0], [3.0, 2.0], [10.0, 4.0], [14.0, 8.0])
    none = nothing_seen(2)
    by_group = composed(values, ["a", "b"], Rewards(normalise="group"), 2, none)
    half = 1 / math.sqrt(2)
    assert close(by_group, [[-half, 0.0], [half, 0.0], [-half, -half], [half, half]])
    by_batch = composed(values, ["a", "b"], Rewards(normalise={"a": "batch"}), 2, none)
    deviation = math.sqrt(sum((x - 7) ** 2 for x in (1, 3, 10, 14)) / 3)
    assert close(by_batch, [[(x - 7) / deviation, y] for x, y in ((1, 2), (3, 2), (10, 4), (14, 8))])
    clipped = composed(values, ["a", "b"], Rewards(normalise={"a": "batch"}, clip=(-0.5, 3.0)), 2, none)
    assert close(
        clipped, [[-0.5, 2.0], [-0.5, 2.0], [3 / deviation, 3.0], [3.0 if deviation < 7 / 3 else 7 / deviation, 3.0]]
    )


def test_what_could_not_be_judged_takes_no_part_in_any_mean():
    values = table([1.0], [NAN], [3.0], [NAN])
    assert close(
        composed(values, ["a"], Rewards(normalise="group"), 4, nothing_seen(1)),
        [[-0.7071], [NAN], [0.7071], [NAN]],
    )
    assert close(composed(values, ["a"], Rewards(normalise="group"), 2, nothing_seen(1)), [[0.0], [NAN], [0.0], [NAN]])


def test_a_sum_leaves_out_what_does_not_apply_and_is_nothing_where_nothing_does():
    values = table([1.0, NAN], [0.5, 2.0], [NAN, NAN])
    assert close(weighted_sum(values, torch.tensor([1.0, 10.0])), [1.0, 20.5, NAN])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.one_of(st.floats(-100, 100), st.just(NAN)), min_size=1, max_size=9), min_size=1, max_size=6)
)
def test_running_statistics_are_those_of_everything_seen(batches):
    running = nothing_seen(1)
    for batch in batches:
        running = running.with_batch(torch.tensor(batch, dtype=torch.float64)[:, None])
    seen = torch.tensor([value for batch in batches for value in batch if not math.isnan(value)], dtype=torch.float64)
    if len(seen):
        assert torch.allclose(running.mean, seen.mean(), atol=1e-9) and running.seen == len(seen)
    if len(seen) > 1:
        assert torch.allclose(running.deviation, seen.std(), atol=1e-8)


def test_running_components_are_scaled_by_their_own_past_and_clipped():
    """Two batches and two components of different spread; one value is missing."""
    first, second = table([1.0, 100.0], [2.0, 300.0]), table([6.0, 100.0], [NAN, 500.0])
    running = nothing_seen(2).with_batch(first).with_batch(second)
    made = composed(second, ["a", "b"], Rewards(normalise="running", clip=(-3, 0.5)), 2, running)
    a, b = statistics.stdev([1, 2, 6]), statistics.stdev([100, 300, 100, 500])
    assert close(made, [[min(0.5, 3 / a), -150 / b], [NAN, min(0.5, 250 / b)]]) and 3 / a > 0.5 < 250 / b


def test_statistics_stay_on_the_cpu_and_meet_rewards_on_an_accelerator():
    """Nothing is computed here, but every device is checked as torch checks it."""
    with FakeTensorMode():
        values = torch.empty(8, 2, device="cuda")
        running = nothing_seen(2).with_batch(values)
        assert {part.device.type for part in running} == {"cpu"}
        made = composed(values, ["a", "b"], Rewards(normalise={"a": "running"}, clip=(-1, 1)), 4, running)
        assert made.device.type == "cuda"


@pytest.fixture(scope="module")
def rewarded(climbed, tmp_path_factory) -> Registry:
    """The tiny climb's rl1 again, with everything that a stage can do to rewards."""
    import copy
    import shutil

    import yaml

    directory = tmp_path_factory.mktemp("rewarded")
    shutil.copytree(climbed[1], directory / "registry")
    changed = copy.deepcopy(LEARNED)
    changed["stages"] = changed["stages"][:2]
    stage(changed, "rl1")["rewards"] = {
        "weights": {"sorted": 0.3}, "normalise": {"score": "running", "format": "group"}, "clip": [-3, 3],
        "length_penalty": {"weight": 0.2, "start": 5, "end": 30}, "repetition_penalty": {"weight": 0.1, "ngram": 2},
    }  # fmt: skip
    (directory / "recipe.yaml").write_text(yaml.safe_dump(changed))
    done = run_cli("run", directory / "recipe.yaml", "--registry", directory / "registry", "--no-prefect")
    assert done.returncode == 0, done.stderr
    return Registry(directory / "registry")


def logs_of(registry: Registry, artifact) -> tuple[list[dict], list[dict]]:
    """(rollouts, metrics)"""
    place = registry.path(artifact)
    names = (Path("rollouts", "rollouts.jsonl"), Path("metrics.jsonl"))
    rollouts, metrics = ([json.loads(line) for line in (place / name).read_text().splitlines()] for name in names)
    return rollouts, metrics


def test_what_is_logged_of_a_component_is_what_it_was_whatever_is_made_of_it(rewarded):
    artifact = max((one for one in rewarded.artifacts() if one.stage == "rl1"), key=lambda one: one.created)
    rollouts, metrics = logs_of(rewarded, artifact)
    weights = {"format": 0.1, "sorted": 0.3, "score": 0.7, "length_penalty": 0.2, "repetition_penalty": 0.1}
    for line in metrics:
        mine = [one["rewards"] for one in rollouts if one["step"] == line["step"]]
        assert len(mine) == 8 and all(set(one) == set(weights) for one in mine)
        for name in weights:
            assert line[f"rewards/{name}/mean"] == pytest.approx(sum(one[name] for one in mine) / 8, abs=1e-6)
        reward = sum(sum(weight * one[name] for name, weight in weights.items()) for one in mine) / 8
        assert line["reward"] == pytest.approx(reward, abs=1e-6) and line["rewards/failed"] == 0
    assert any(one["rewards"]["length_penalty"] < 0 for one in rollouts)


def test_every_training_rollout_is_logged_as_it_was_sampled(climbed):
    registry = Registry(climbed[1])
    for artifact in (one for one in registry.artifacts() if one.kind == "grpo"):
        rollouts, _ = logs_of(registry, artifact)
        assert [(one["step"], one["sample"]) for one in rollouts] == [
            (s, g) for s in (1, 2) for _ in range(2) for g in range(4)
        ]
        assert len({one["row"] for one in rollouts}) == 4, "two rows a step"
        assert all(one["prefix"] == 2 and one["ids"][:2] == rollouts[0]["ids"][:2] for one in rollouts)
        assert all(one["text"].startswith("<think>\n") and one["failure"] is None for one in rollouts)
        assert all(len(one["ids"]) == 38 or one["finished"] for one in rollouts)
        card = json.loads((registry.path(artifact, "rollouts") / token_rows.CARD).read_text())
        assert card["format"]["response_prefix"] == "<think>\n" and card["sampling"]["temperature"] == 1.0
