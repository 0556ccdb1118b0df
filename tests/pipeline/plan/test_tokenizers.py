"""The rules by which tokens are made are in the keys of those steps for which they differ, and of no others."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from pipeline.plan import tokenizers
from pipeline.plan.steps import steps
from pipeline.recipe.recipe import Recipe
from pipeline.registry import Registry
from stages.kinds import STAGES
from stages.policy import models
from stages.sft import SftConfig
from stages.tokens import chat
from tests.conftest import TINY, TINY_BASE
from tests.models import CHATML, make_tokenizer, save
from tests.templates import OPENS, TEMPLATES, save_tokenizer


def tokens_of(directory, tmp_path, template=None, **warmup):
    """Step -> what of its identity its tokens add."""
    settings = json.loads(json.dumps(TINY))
    settings["model"] = {"path": str(directory), "dtype": "float32"}
    if template:
        (tmp_path / "own.jinja").write_text(template)
        settings["format"]["chat_template"] = str(tmp_path / "own.jinja")
    next(stage for stage in settings["stages"] if stage["name"] == "warmup").update(warmup)
    planned = steps(Recipe.model_validate(settings), Registry(tmp_path / "r"))
    return {step.name: step.identity.get("tokens") for step in planned}


def test_the_tiny_base_has_none_since_all_rules_gave_it_the_same(tmp_path):
    assert set(tokens_of(TINY_BASE, tmp_path).values()) == {None}


def test_a_hub_model_cannot_be_read_here_so_its_steps_have_the_version_of_the_rules(tmp_path):
    settings = {**TINY, "model": {"hub": "org/name", "revision": "abc", "dtype": "float32"}}
    planned = steps(Recipe.model_validate(settings), Registry(tmp_path / "r"))
    assert all(step.identity["tokens"] == {"rules": 2} for step in planned)


@pytest.fixture
def directory(tmp_path):
    return save(tmp_path / "policy")


def test_special_tokens_move_the_steps_whose_rewards_and_scores_see_them(directory, tmp_path):
    assert set(tokens_of(directory, tmp_path).values()) == {None}
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>"]})
    tokenizer.save_pretrained(directory)
    found = tokens_of(directory, tmp_path)
    seen = {"control_tokens": "seen"}
    assert found == {name: None if name in ("warmup", "distill") else seen for name in found}


def test_another_turn_end_moves_the_steps_that_train_and_those_that_would_have_sampled_beyond_it(directory, tmp_path):
    ends_otherwise = CHATML.replace("<|im_end|>", "<|endoftext|>")
    found = tokens_of(directory, tmp_path, ends_otherwise)
    assert found["warmup"] == found["rl1"] == {"turn_end": "<|endoftext|>"} == found["rl1.evaluate"]
    settings = directory / "generation_config.json"
    ends = [make_tokenizer().eos_token_id, make_tokenizer().pad_token_id]
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": ends}))
    found = tokens_of(directory, tmp_path, ends_otherwise)
    assert found["warmup"] == found["rl1"] == {"turn_end": "<|endoftext|>"} and found["rl1.evaluate"] is None


def test_an_opened_tag_moves_all_and_answers_that_are_rewritten_only_the_readers_of_conversations(directory, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    opens = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    assert tokens_of(directory, tmp_path, opens)["base.evaluate"] == {"opened": "<think>\n"}
    trims = CHATML.replace("m['content']", "m['content'] | trim")
    assert set(tokens_of(directory, tmp_path, trims).values()) == {None}
    found = tokens_of(directory, tmp_path, trims, data=str(data), rows=None)
    assert found["warmup"] == {"answers": "as rendered"} and found["rl1"] is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_plan_finds_what_the_stages_find(name, tmp_path):
    """It renders templates without transformers."""
    directory = save_tokenizer(tmp_path, name)
    read = tokenizers.of_directory(directory)
    assert read is not None
    sft = SftConfig(name="w", policy="base", data="rows.jsonl")
    found = tokenizers.identity(read, None, STAGES["sft"], sft)
    raw, loaded = AutoTokenizer.from_pretrained(directory), models.load_tokenizer(str(directory))
    ending = chat.ending(loaded)
    assert found.get("turn_end", raw.eos_token) == ending
    assert found.get("opened", "") == chat.opened(loaded) == ("<think>\n" if name in OPENS else "")


def test_a_tokenizer_that_cannot_be_read_has_the_version_of_the_rules(directory, tmp_path):
    (directory / "tokenizer.json").unlink()
    assert tokens_of(directory, tmp_path)["warmup"] == {"rules": 2}


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages[7].x }}", "{% for i in range(10 ** 9) %}{% endfor %}"]
)
def test_a_template_that_takes_no_probe_does_not_stop_a_plan(template, directory, tmp_path):
    assert tokens_of(directory, tmp_path, template)["warmup"] is None


def test_a_policy_in_an_object_store_is_read_as_one_on_a_disk(server, climbed, tmp_path):
    """So that a recipe with `model.artifact` has one key wherever its registry lies."""
    local = Registry(climbed[1])
    artifact = next(one for one in local.artifacts() if one.kind == "sft")
    remote = Registry("s3://bucket/registry")
    shutil.copytree(local.path(artifact), tmp_path / "out")
    (tmp_path / "out" / "artifact.json").unlink()
    there = remote.publish(tmp_path / "out", artifact.model_copy(update={"id": ""}), "a run").artifact
    found = tokenizers.read(lambda name: remote.content(there, "policy", name))
    assert found is not None and found == tokenizers.of_directory(local.path(artifact))
