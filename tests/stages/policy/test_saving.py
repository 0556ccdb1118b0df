"""Saving cannot fail after training, and what is published is the policy, not how it was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.registry import Registry
from stages import sft
from stages.errors import BadInput
from stages.job import Execution, Format, Job
from stages.policy import models, publishing
from stages.policy.generation_settings import saveable
from tests.conftest import TINY_BASE, run_cli
from tests.models import make_model, save
from tests.templates import save_tokenizer


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({}, ()),
        ({"do_sample": True, "temperature": 0.9}, ()),
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, ("temperature", "top_p")),
        ({"temperature": 0.9, "top_k": 20}, ("temperature", "top_k")),
    ],
)
def test_settings_that_contradict_each_other_are_left_out_until_they_can_be_saved(settings, left_out, tmp_path):
    """And what transformers does by them stays: greedy stays greedy."""
    theirs = GenerationConfig.from_dict({"eos_token_id": [3, 0], "pad_token_id": 0, **settings})
    found = saveable(theirs)
    assert found.left_out == left_out
    found.settings.eos_token_id = [3, 0, 1]  # as training aligns them
    found.settings.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).do_sample == theirs.do_sample
    if left_out:
        theirs.eos_token_id = [3, 0, 1]
        with pytest.raises(ValueError, match=left_out[0]):
            theirs.save_pretrained(tmp_path)


def job(policy, data, tmp_path) -> Job:
    config = {"kind": "sft", "name": "w", "policy": "base", "data": str(data), "epochs": 1, "rows_per_step": 4}
    (tmp_path / "work" / "out").mkdir(parents=True)
    return Job(
        kind="sft",
        name="w",
        config=config,
        inputs={"policy": str(policy), "data": str(data)},
        work=str(tmp_path / "work"),
        out=str(tmp_path / "work" / "out"),
        problem=None,
        rows=None,
        format=Format(prompt="p", prompt_digest="", system_prompt="", user_template="{{ prompt }}", response_prefix=""),
        seed=0,
        dtype="float32",
        execution=Execution(device="cpu", threads=1),
    )


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f"{i + 1}"}) + "\n" for i in range(8)))
    return path


@pytest.fixture
def policy(tmp_path):
    return save(tmp_path / "policy")


def test_a_policy_with_such_settings_is_trained_and_published_as_it_was(policy, data, tmp_path):
    settings = policy / "generation_config.json"
    contradicting = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 0}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **contradicting}))
    made = job(policy, data, tmp_path)
    sft.run(made)
    AutoModelForCausalLM.from_pretrained(made.out)
    tokenizer, ends = AutoTokenizer.from_pretrained(made.out), GenerationConfig.from_pretrained(made.out).eos_token_id
    assert tokenizer.eos_token_id in ends and 0 in ends
    before, after = (
        json.loads((policy / "config.json").read_text()),
        json.loads(Path(made.out, "config.json").read_text()),
    )
    assert after["use_cache"] is True is before["use_cache"]
    assert after.keys() - before.keys() <= {"bos_token_id"}, "nothing of the loader or the trainer is left in it"
    assert not Path(made.work, publishing.TRIAL).exists()


def test_what_cannot_be_written_is_refused_before_the_first_step(policy, data, tmp_path, monkeypatch):
    """Here the tokenizer's own settings hold what JSON cannot."""
    load = models.load_tokenizer

    def unwritable(*arguments):
        tokenizer = load(*arguments)
        tokenizer.init_kwargs["extra"] = object()
        return tokenizer

    monkeypatch.setattr(models, "load_tokenizer", unwritable)
    made = job(policy, data, tmp_path)
    with pytest.raises(BadInput, match="its policy could not be saved after training"):
        sft.run(made)
    log = Path(made.out, "metrics.jsonl")
    assert not log.exists() or log.read_text() == ""


def test_a_whole_policy_keeps_its_cache_and_an_evaluation_names_no_path(climbed):
    _, registry = climbed
    listed = json.loads(run_cli("ls", "--registry", registry, "--json").stdout)
    paths = {one["stage"]: Path(one["path"]) for one in listed}
    for name in ("warmup", "rl2"):
        assert AutoConfig.from_pretrained(paths[name]).use_cache == AutoConfig.from_pretrained(TINY_BASE).use_cache
    ids = {artifact.stage: artifact.id for artifact in Registry(registry).artifacts()}
    said = {
        name: json.loads((paths[f"{name}.evaluate"] / "held_out.json").read_text())["policy"]
        for name in ("base", "rl2")
    }
    assert said == {"base": "tiny-base", "rl2": ids["rl2"]}


def test_a_policy_is_published_with_the_end_of_its_turns_and_stops_at_all_its_ends(data, tmp_path):
    """Phi-3.5's tokenizer names the end of a text, and its template ends a turn with another token."""
    directory = save_tokenizer(tmp_path / "phi", "phi3_5")
    ends = json.loads((directory / "generation_config.json").read_text())
    make_model(AutoTokenizer.from_pretrained(directory)).save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps(ends))
    made = job(directory, data, tmp_path)
    sft.run(made)
    tokenizer, settings = AutoTokenizer.from_pretrained(made.out), GenerationConfig.from_pretrained(made.out)
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert settings.eos_token_id[0] == tokenizer.eos_token_id and set(settings.eos_token_id) == set(
        ends["eos_token_id"]
    )
    last = json.loads(Path(made.out, "loss_map.json").read_text())["tokens"][-1]
    assert last["text"] == "<|end|>" and last["weight"] == 1.0
