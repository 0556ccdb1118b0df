"""The Format contract: declared once, inherited, and never changed in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.plan.steps import steps as steps_of
from pipeline.recipe import recipe
from pipeline.recipe.formats import different
from pipeline.registry import Registry
from stages.errors import BadInput
from tests.conftest import TINY_BASE, run_cli, stage


def formats(settings, registry):
    return {step.name: step.format for step in steps_of(recipe.Recipe.model_validate(settings), registry)}


def test_every_step_has_the_recipes_format(settings, tmp_path):
    found = formats(settings, Registry(tmp_path))
    assert {format.response_prefix for format in found.values()} == {"<think>\n"} and len(found) == 10


def test_what_a_stage_changes_is_inherited_from_there_on(settings, tmp_path):
    stage(settings, "warmup")["format"] = {"response_prefix": "", "prompt": "sorted"}
    found = formats(settings, Registry(tmp_path))
    assert found["base.evaluate"].response_prefix == "<think>\n"
    rest = [format for name, format in found.items() if name != "base.evaluate"]
    assert {(format.response_prefix, format.prompt) for format in rest} == {("", "sorted")}
    assert all("Sorted:" in format.user_template for format in rest)


def test_data_of_another_format_than_the_policys_are_refused_until_the_stage_says_which(settings, write, tmp_path):
    stage(settings, "rl1")["format"] = {"response_prefix": "Okay"}
    done = run_cli("plan", write(settings), "--registry", tmp_path / "r")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "its policy has response_prefix '<think>\\n', but its data (harvest) was made with 'Okay'" in done.stderr
    assert "set stages.distill.format.response_prefix" in done.stderr
    for silent in ({}, {"prompt": "plain"}):
        stage(settings, "distill")["format"] = silent
        with pytest.raises(BadInput, match="its policy has response_prefix"):
            formats(settings, Registry(tmp_path))
    stage(settings, "distill")["format"] = {"response_prefix": "Okay"}
    assert run_cli("plan", write(settings), "--registry", tmp_path / "r").returncode == 0
    found = formats(settings, Registry(tmp_path))
    assert found["rl2"].response_prefix == "Okay" and found["warmup.evaluate"].response_prefix == "<think>\n"


@pytest.fixture(scope="module")
def warmup(climbed):
    """(registry, the warm-up's artifact)"""
    registry = Registry(climbed[1])
    return registry, next(artifact for artifact in registry.artifacts() if artifact.stage == "warmup")


@pytest.mark.parametrize("place", ["artifact", "path", "copy"])
def test_a_trained_policy_brings_its_format_along(place, warmup, settings, tmp_path):
    """As an artifact, as the path of one, and as a copy of it somewhere else."""
    registry, artifact = warmup
    path = registry.path(artifact)
    if place == "copy":
        path = Path(shutil.copytree(path, tmp_path / "copy"))
    settings["model"] = {"artifact": artifact.id} if place == "artifact" else {"path": str(path)}
    del settings["format"]
    assert {format.response_prefix for format in formats(settings, registry).values()} == {"<think>\n"}
    settings["format"] = {"response_prefix": "<think>\n", "prompt": "plain"}
    assert {format.response_prefix for format in formats(settings, registry).values()} == {"<think>\n"}
    for wrong in ({"response_prefix": ""}, {"prompt": "sorted"}, {"per_row": "start"}):
        settings["format"] = wrong
        with pytest.raises(BadInput, match="the base policy was trained with"):
            formats(settings, registry)
    settings["format"] = {}
    stage(settings, "warmup")["format"] = {"response_prefix": ""}
    found = formats(settings, registry)
    assert found["base.evaluate"].response_prefix == "<think>\n" and found["rl2"].response_prefix == ""


def test_a_chat_template_can_be_changed_and_is_part_of_the_key(settings, tmp_path):
    template = tmp_path / "other.jinja"
    template.write_text((TINY_BASE / "chat_template.jinja").read_text() + "{# other #}")
    plain = steps_of(recipe.Recipe.model_validate(settings), Registry(tmp_path))
    settings["format"]["chat_template"] = str(template)
    changed = steps_of(recipe.Recipe.model_validate(settings), Registry(tmp_path))
    assert not {step.key for step in plain} & {step.key for step in changed}
    assert different(plain[0].format, changed[0].format) == ["chat_template"]
    assert changed[0].format.chat_template == template.read_text()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"response_prefix": "x", "per_row": "start"}, "format: per_row gives each row a prefix of its own"),
        ({"chat_template": "nowhere.jinja"}, "format.chat_template: nowhere.jinja is not there"),
        ({"prompt": "nosuch"}, "format.prompt: no prompt named 'nosuch'"),
        ({"prefix": "x"}, "unknown key 'prefix'; did you mean response_prefix?"),
    ],
)
@pytest.mark.parametrize("where", ["recipe", "stage"])
def test_what_is_wrong_with_a_format_is_one_line(where, wrong, said, settings, write, tmp_path):
    if where == "recipe":
        settings["format"] = wrong
    else:
        stage(settings, "warmup")["format"] = wrong
        said = said.replace("format", "stages.warmup.format", 1)
    done = run_cli("plan", write(settings), "--registry", tmp_path / "r")
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_every_artifact_says_its_format_and_the_evaluation_its_digest(climbed):
    registry = Registry(climbed[1])
    digests = set()
    for artifact in registry.artifacts():
        assert artifact.format is not None and artifact.format.response_prefix == "<think>\n"
        assert len(artifact.format.training_template or "") == 64
        if artifact.kind == "evaluate":
            digests.add(json.loads((registry.path(artifact) / "validation.json").read_text())["format_digest"])
    assert len(digests) == 1, "all policies of a climb are evaluated in the same dress"


def test_a_run_in_which_a_stage_changes_the_prefix(climbed, settings, write, tmp_path):
    """From a policy that was trained with another one; the stages after it inherit the change, and nothing is refused
    on the way."""
    registry = Registry(Path(shutil.copytree(climbed[1], tmp_path / "r")))
    settings["model"] = {
        "artifact": next(artifact.id for artifact in registry.artifacts() if artifact.stage == "warmup")
    }
    settings["stages"] = [
        {**stage(settings, "rl1"), "policy": "base", "format": {"response_prefix": "<think>\nA"}},
        {**stage(settings, "harvest"), "samples": 1},
    ]
    done = run_cli("run", write(settings), "--registry", registry.store.root, "--no-prefect")
    assert done.returncode == 0, done.stderr
    made = registry.artifacts()[-1]
    assert made.kind == "rejection" and made.format is not None and made.format.response_prefix == "<think>\nA"
    for line in (registry.path(made) / "rollouts" / "rollouts.jsonl").read_text().splitlines():
        assert json.loads(line)["text"].startswith("<think>\nA")
