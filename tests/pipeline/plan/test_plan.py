"""The plan: what is reused, what is run, and why; known before anything runs."""

from __future__ import annotations

import re

import pytest

from pipeline.plan import plan
from pipeline.plan.steps import steps as steps_of
from pipeline.recipe import recipe
from pipeline.registry import Artifact, Registry
from stages.errors import BadInput
from tests.conftest import stage


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def made(settings, registry, *names):
    """Publish stand-ins for the steps named, or for all of them: a plan looks at keys and manifests alone."""
    for step in steps_of(recipe.Recipe.model_validate(settings), registry):
        if names and step.name not in names:
            continue
        out = registry.store.root / "work" / "out"
        out.mkdir(parents=True)
        (out / "x.json").write_text("{}")
        draft = Artifact(
            id="",
            key=step.key,
            kind=step.kind,
            stage=step.name,
            created="",
            outputs={"policy": ".", "data": "."},
            files=(),
            inputs={},
            format=None,
            config={},
            identity=step.identity,
            metrics={},
            provenance={},
        )
        registry.publish(out, draft, "user")


def planned(settings, registry, **selection):
    loaded = recipe.Recipe.model_validate(settings)
    return {one.step.name: one for one in plan.plan(loaded, registry, plan.Selection(**selection))}


def actions(settings, registry, **selection):
    return {name: one.action for name, one in planned(settings, registry, **selection).items()}


def test_an_empty_registry_runs_everything_as_new(settings, registry):
    found = planned(settings, registry)
    assert list(found) == [
        "base.evaluate",
        "warmup",
        "warmup.evaluate",
        "rl1",
        "rl1.evaluate",
        "harvest",
        "distill",
        "distill.evaluate",
        "rl2",
        "rl2.evaluate",
    ]
    assert {(one.action, one.why) for one in found.values()} == {("run", "new")}
    assert not registry.store.root.exists(), "planning writes nothing"


def test_what_is_there_is_reused_by_name(settings, registry):
    made(settings, registry)
    for name, one in planned(settings, registry).items():
        assert one.action == "reuse" and one.why == one.artifact.id and one.artifact.stage == name


def test_a_changed_field_is_named_with_both_values_and_what_follows_says_input_changed(settings, registry):
    made(settings, registry)
    stage(settings, "rl2")["kl"] = {"beta": 0.1}
    found = planned(settings, registry)
    assert [name for name, one in found.items() if one.action == "run"] == ["rl2", "rl2.evaluate"]
    assert found["rl2"].why.startswith("kl.beta: 0.001 -> 0.1 (against rl2-")
    assert found["rl2.evaluate"].why.startswith("input changed: policy (rl2)")


def test_a_changed_weight_of_a_reward_of_ones_own_is_named_without_the_file_it_is_in(settings, registry, tmp_path):
    (tmp_path / "mine.py").write_text("def right(completions, **kwargs): ...")
    (tmp_path / "rows.jsonl").write_text("{}")
    mine = {"name": f"{tmp_path / 'mine.py'}:right", "weight": 1.0}
    settings["problem"] = {"dataset": str(tmp_path / "rows.jsonl"), "rewards": [mine, "think_format"]}
    settings["stages"] = [stage(settings, "rl1") | {"policy": "base"}]
    made(settings, registry)
    settings["problem"]["rewards"] = [{**mine, "weight": 2.0}, "think_format"]
    assert planned(settings, registry)["rl1"].why.startswith("problem.rewards.0.weight: 1.0 -> 2.0 (against rl1-")
    (tmp_path / "rows.jsonl").write_text("{}\n{}")
    why = planned(settings, registry)["rl1"].why
    assert re.search(r"problem.dataset: '[0-9a-f]{8}' -> '[0-9a-f]{8}'; problem.rewards.0.weight", why)


def test_the_nearest_earlier_artifact_is_the_one_compared_with(settings, registry):
    for steps, rate in ((2, 1e-5), (3, 2e-5)):
        stage(settings, "rl2").update(steps=steps, learning_rate=rate)
        made(settings, registry, "rl2")
    stage(settings, "rl2").update(steps=2, learning_rate=3e-5)
    why = planned(settings, registry)["rl2"].why
    assert "learning_rate: 1e-05 -> 3e-05" in why and "steps" not in why


def test_a_change_upstream_runs_exactly_what_depends_on_it(settings, registry):
    made(settings, registry)
    stage(settings, "harvest")["samples"] = 4
    assert [name for name, action in actions(settings, registry).items() if action == "run"] == [
        "harvest", "distill", "distill.evaluate", "rl2", "rl2.evaluate",
    ]  # fmt: skip


def test_name_deadline_and_worker_settings_run_nothing(settings, registry):
    made(settings, registry)
    settings |= {"name": "other", "deadline": 60.0, "launch": {"threads": 2, "micro_batch": 8, "device": "cpu"}}
    stage(settings, "rl1")["deadline"] = 5.0
    assert set(actions(settings, registry).values()) == {"reuse"}


def test_a_renamed_stage_is_reused(settings, registry):
    made(settings, registry)
    stage(settings, "rl2")["name"] = "second"
    assert set(actions(settings, registry).values()) == {"reuse"}


def test_only_from_and_until_choose_what_may_run(settings, registry):
    made(settings, registry, "warmup", "rl1")
    chosen = {
        "only": [name for name, action in actions(settings, registry, only="harvest").items() if action == "run"],
        "from": [name for name, action in actions(settings, registry, start="harvest").items() if action == "run"],
        "until": [name for name, action in actions(settings, registry, until="rl1").items() if action == "run"],
    }
    assert chosen == {
        "only": ["harvest"],
        "from": ["harvest", "distill", "distill.evaluate", "rl2", "rl2.evaluate"],
        "until": ["base.evaluate", "warmup.evaluate", "rl1.evaluate"],
    }


def test_a_stage_whose_input_is_neither_there_nor_selected_is_refused(settings, registry):
    with pytest.raises(BadInput, match="rl1 reads warmup, which is neither in"):
        plan.plan(recipe.Recipe.model_validate(settings), registry, plan.Selection(only="rl1"))


def test_from_after_until_is_refused(settings, registry):
    with pytest.raises(BadInput, match="comes after"):
        plan.plan(recipe.Recipe.model_validate(settings), registry, plan.Selection(start="rl2", until="rl1"))


def test_fresh_takes_the_next_replicate_that_the_registry_does_not_have(settings, registry):
    made(settings, registry)
    loaded = plan.freshen(recipe.Recipe.model_validate(settings), registry, "rl1")
    assert [one.replicate for one in loaded.stages] == [0, 1, 0, 0, 0]
    runs = [one.step.name for one in plan.plan(loaded, registry) if one.action == "run"]
    assert runs == ["rl1", "rl1.evaluate", "harvest", "distill", "distill.evaluate", "rl2", "rl2.evaluate"]
    stage(settings, "rl1")["replicate"] = 1
    made(settings, registry, "rl1")
    stage(settings, "rl1")["replicate"] = 0
    assert plan.freshen(recipe.Recipe.model_validate(settings), registry, "rl1").stages[1].replicate == 2


def test_a_replicate_has_another_seed_and_the_same_rows(settings, registry):
    stage(settings, "rl1")["replicate"] = 1
    first, second = (
        next(step for step in steps_of(recipe.Recipe.model_validate(s), registry) if step.name == "rl1")
        for s in (settings, settings | {"seed": 0})
    )
    assert first.seed == second.seed != 0 and first.rows.seed == 0


def test_rejection_takes_the_rows_of_its_policy(settings, registry):
    steps = {step.name: step for step in steps_of(recipe.Recipe.model_validate(settings), registry)}
    assert steps["harvest"].rows == steps["rl1"].rows
    stage(settings, "harvest")["policy"] = "warmup"
    with pytest.raises(BadInput, match="say which rows to sample"):
        plan.plan(recipe.Recipe.model_validate(settings), registry)


def test_a_policy_of_the_registry_can_be_the_base(settings, registry):
    made(settings, registry, "rl1", "base.evaluate")
    rl1 = next(artifact for artifact in registry.artifacts() if artifact.stage == "rl1")
    settings["model"] = {"artifact": rl1.id, "dtype": "float32"}
    step = steps_of(recipe.Recipe.model_validate(settings), registry)[1]
    assert step.inputs["policy"].key == rl1.key and step.inputs["policy"].source == str(registry.path(rl1))
    settings["model"]["artifact"] = "none-1"
    with pytest.raises(BadInput, match="there is no artifact none-1"):
        plan.plan(recipe.Recipe.model_validate(settings), registry)
