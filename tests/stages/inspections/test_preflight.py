"""What can be known about a stage before an accelerator starts is said then: refused where it cannot work, a warning
where it is probably not meant."""

from __future__ import annotations

import json
import sys

import pytest

from pipeline.registry import Registry
from stages.errors import BadInput
from stages.inspections.format_rules import opened
from stages.inspections.preflight import look_at
from stages.job import Execution, Format, Job, Lora
from stages.policy import models, publishing
from stages.tokens import prefix, token_rows
from stages.tokens.token_rows import TokenRow
from tests.conftest import TINY_BASE, printed_json, run_cli, stage
from tests.models import CHATML, make_model, make_tokenizer, save


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save(tmp_path_factory.mktemp("policy"))


def job(
    policy, config, tmp_path, response_prefix="<think>\n", template=None, system="", per_row=None, data=None, **more
):
    name = config["kind"]
    scheduling = {
        "problem": {"name": "scheduling", "form": "compact"},
        "rows": {"split": "train", "start": 0, "stop": 50, "seed": 0},
    }
    nothing = {"problem": None, "rows": None}
    format = Format(
        prompt="p",
        prompt_digest="",
        system_prompt=system,
        user_template="{{ prompt }}",
        response_prefix=response_prefix,
        chat_template=template,
        per_row=per_row,
    )
    inputs = {"policy": str(policy), **({"data": str(data)} if data else {})}
    return Job(
        kind=config["kind"],
        name=name,
        config={"name": name, "policy": "base", "trl": {}, **config},
        inputs=inputs,
        work=str(tmp_path),
        out=str(tmp_path / "out"),
        **(nothing if data else scheduling),
        format=format,
        seed=0,
        dtype="float32",
        execution=Execution(),
        **more,
    )


SFT, GRPO = {"kind": "sft"}, {"kind": "grpo", "rows": "train[0:50]"}


def rules(findings):
    return [finding.rule for finding in findings]


@pytest.mark.parametrize("config", [SFT, GRPO])
def test_a_stage_with_nothing_to_say_about_it_is_silent(config, tmp_path):
    assert look_at(job(TINY_BASE, config, tmp_path)) == []


def test_prompts_that_carry_most_of_the_loss_are_a_warning(tmp_path):
    """Completions are 1.15 times as long as prompts here, so weight 1 is under one half, and weight 2 over it."""
    (finding,) = look_at(job(TINY_BASE, {**SFT, "prompt_loss_weight": 1.0}, tmp_path))
    assert finding.rule == "generation_ratio" and finding.severity == "warn"
    assert finding.evidence["generation_ratio"] == pytest.approx(1.15, abs=0.03)
    both = look_at(job(TINY_BASE, {**SFT, "prompt_loss_weight": 2.0}, tmp_path))
    assert rules(both) == ["prompt_weight_share", "generation_ratio"]
    assert both[0].evidence["prompt_weight_share"] == pytest.approx(
        0.63, abs=0.02
    ) and "stages.sft.prompt_loss_weight=1" in str(both[0].override)


def test_short_completions_with_a_small_weight_are_what_it_is_for(policy, tmp_path):
    rows = [TokenRow("1", list(range(3, 23)), "t" * 5 + "u" * 10 + "c" * 5)]
    tokenizer = models.load_tokenizer(str(policy))
    format = Format(prompt="p", prompt_digest="", system_prompt="", user_template="{{ prompt }}", response_prefix="")
    token_rows.write(tmp_path / "data", rows, prefix.card(tokenizer, prefix.seen_format(format, tokenizer)))
    assert look_at(job(policy, {**SFT, "prompt_loss_weight": 0.1}, tmp_path, "", data=tmp_path / "data")) == []
    heavy = look_at(job(policy, {**SFT, "prompt_loss_weight": 0.5}, tmp_path, "", data=tmp_path / "data"))
    assert rules(heavy) == ["prompt_weight_share"]
    assert heavy[0].evidence == {
        "generation_ratio": 5 / 15,
        "prompt_weight_share": pytest.approx(7.0 / 12.0),
    }  # 14 prompt tokens are predicted


def test_a_prefix_that_does_not_survive_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(BadInput, match="comes back from the tokenizer"):
        look_at(job(TINY_BASE, GRPO, tmp_path, "<dächte>"))


def test_a_prefix_that_ends_in_a_space_is_a_warning(policy, tmp_path):
    assert rules(look_at(job(policy, GRPO, tmp_path, "The answer is "))) == ["prefix_ends_in_space"]


THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")


@pytest.mark.parametrize("start", ["<think>\n", "<think>", "<think>\nOkay", "\n<think>\n"])
def test_a_prefix_that_the_template_already_opens_is_refused(start, policy, tmp_path):
    with pytest.raises(BadInput, match="would open it again"):
        look_at(job(policy, GRPO, tmp_path, start, template=THINKING))
    assert rules(look_at(job(policy, GRPO, tmp_path, start))) == ["prefix_merges_with_prompt"] * start.startswith("\n")


@pytest.mark.parametrize("start", ["", "Okay", "The <think>", "a", "\n"])
def test_another_prefix_after_an_open_template_is_fine(start, policy, tmp_path):
    assert rules(look_at(job(policy, GRPO, tmp_path, start, template=THINKING))) == ["prefix_merges_with_prompt"] * (
        start == "\n"
    )


def test_what_opens_a_prompt_again_is_told_from_what_only_looks_like_it():
    assert opened("assistant\n<think>\n", "<think>\n") and opened("x [INST]", "[INST] a")
    assert (
        not opened("assistant\n", "the answer")
        and not opened("assistant\n", "")
        and not opened("<think>\n", "<thinking>")
    )


@pytest.mark.parametrize("config", [SFT, GRPO])
def test_a_template_that_drops_or_refuses_the_system_prompt_is_refused(config, policy, tmp_path):
    drops = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    for template, said in ((drops, "drops the system message"), (refuses, "no system role")):
        with pytest.raises(BadInput, match=said):
            look_at(job(policy, config, tmp_path, template=template, system="Be brief."))
        assert rules(look_at(job(policy, GRPO, tmp_path, template=template))) == []


def test_the_rate_at_which_the_boundary_is_forced_is_measured(policy, tmp_path):
    """The tokenizer knows "Okay" as one token, so a prefix "Ok" ends inside it; in one row of four it does not."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "?", "completion": text}) + "\n" for text in ("Okay.", "Okay, so", "Ok.", "Okay"))
    )
    findings = look_at(job(policy, SFT, tmp_path, "Ok", data=path))
    assert rules(findings) == ["prefix_boundary"] and findings[0].evidence == {"rate": 0.75, "rows": 4}
    path.write_text(json.dumps({"prompt": "?", "completion": "<think>\nOkay."}) + "\n")
    assert look_at(job(policy, SFT, tmp_path, "<think>\n", data=path)) == []


def test_a_published_policy_without_its_manifest_still_shows_its_prefix(policy, tmp_path):
    tokenizer = make_tokenizer()
    format = Format(
        prompt="p", prompt_digest="", system_prompt="", user_template="{{ prompt }}", response_prefix="<think>\n"
    )
    publishing.save_policy(make_model(tokenizer), tokenizer, format, tmp_path / "published")
    assert look_at(job(tmp_path / "published", GRPO, tmp_path)) == []
    with pytest.raises(BadInput, match="was trained with another response prefix than ''"):
        look_at(job(tmp_path / "published", GRPO, tmp_path, ""))
    assert look_at(job(tmp_path / "published", {**GRPO, "format": {"response_prefix": ""}}, tmp_path, "")) == []


def test_a_file_of_rows_is_looked_at_as_a_problems_rows_are(policy, tmp_path):
    """The template that opens <think>, and rows with a system prompt that is not the Format's."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "?", "completion": "<think>\nOkay."}) + "\n")
    with pytest.raises(BadInput, match="would open it again"):
        look_at(job(policy, SFT, tmp_path, "<think>\n", template=THINKING, data=path))
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Okay"}]
    lines = [{"messages": [{"role": "system", "content": "Be kind."}, *turns]}, {"messages": turns}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (finding,) = look_at(job(policy, SFT, tmp_path, "", system="Be kind.", data=path))
    assert finding.rule == "other_system_prompt" and finding.evidence == {"rate": 0.5, "rows": 2}


def test_weights_that_leave_nothing_to_learn_are_refused(tmp_path):
    nothing = {"prompt_loss_weight": 0.0, "completion_loss_weight": 0.0, "loss_weights": {"system": 1.0}}
    with pytest.raises(BadInput, match="no token of its 50 rows has a weight above 0"):
        look_at(job(TINY_BASE, {**SFT, **nothing}, tmp_path))


def test_a_tokenizer_that_puts_a_blank_before_every_text_is_refused(tmp_path):
    """As Llama 2's and Mistral's first ones do: what is trained after the prefix would not be what is served."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = ["<|im_start|>", "<|im_end|>", "▁", *map(chr, range(32, 127)), "\n"]
    core = Tokenizer(kinds.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "p")
    (tmp_path / "p" / "config.json").write_text((TINY_BASE / "config.json").read_text())
    with pytest.raises(BadInput, match="otherwise than inside another"):
        look_at(job(tmp_path / "p", GRPO, tmp_path, "Okay"))


def test_a_template_with_todays_date_is_a_warning(policy, tmp_path):
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    assert rules(look_at(job(policy, GRPO, tmp_path, template=dated))) == ["template_has_a_date"]


@pytest.mark.parametrize(
    ("targets", "said"), [(("q_prj",), "q_prj"), (("embed_tokens",), "an adapter on the embeddings")]
)
def test_targets_that_cannot_be_adapted_are_refused(targets, said, policy, tmp_path):
    assert look_at(job(policy, GRPO, tmp_path, lora=Lora(targets=("q_proj", "v_proj")))) == []
    with pytest.raises(BadInput, match=said):
        look_at(job(policy, GRPO, tmp_path, lora=Lora(targets=targets)))


def test_a_policy_with_its_manifest_shows_all_it_was_trained_with(climbed, tmp_path):
    registry = Registry(climbed[1])
    path = registry.path(next(artifact for artifact in registry.artifacts() if artifact.stage == "warmup"))
    assert look_at(job(path, GRPO, tmp_path)) == []
    with pytest.raises(BadInput, match="was trained with another system_prompt"):
        look_at(job(path, GRPO, tmp_path, system="A"))
    assert look_at(job(path, {**GRPO, "format": {"prompt": "a"}}, tmp_path, system="A")) == []
    assert look_at(job(path, GRPO, tmp_path, system="A"), policy_is_there=False) == [], (
        "an ancestor may have had another"
    )


def test_rows_of_another_tokenizer_or_template_are_refused(policy, tmp_path):
    tokenizer = models.load_tokenizer(str(policy))
    format = Format(prompt="p", prompt_digest="", system_prompt="", user_template="{{ prompt }}", response_prefix="")
    token_rows.write(
        tmp_path / "data", [TokenRow("1", [3, 4], "uc")], prefix.card(tokenizer, prefix.seen_format(format, tokenizer))
    )
    assert look_at(job(policy, SFT, tmp_path, "", data=tmp_path / "data")) == []
    with pytest.raises(BadInput, match="another tokenizer"):
        look_at(job(TINY_BASE, SFT, tmp_path, "", data=tmp_path / "data"))
    with pytest.raises(BadInput, match="another chat template"):
        look_at(job(policy, SFT, tmp_path, "", template=THINKING, data=tmp_path / "data"))
    said = {**SFT, "format": {"chat_template": "thinking.jinja"}}
    assert look_at(job(policy, said, tmp_path, "", template=THINKING, data=tmp_path / "data")) == []


def test_four_bits_without_bitsandbytes_and_vision_models_are_refused(policy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # Python's own way to say that it is not installed
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(BadInput, match="nf4 needs bitsandbytes, which is not installed"):
        look_at(job(policy, GRPO, tmp_path, lora=Lora(quantize="nf4")))
    config = json.loads((policy / "config.json").read_text())
    vision = tmp_path / "vision"
    vision.mkdir()
    for file in policy.iterdir():
        (vision / file.name).write_bytes(file.read_bytes())
    (vision / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_vl", "vision_config": {}}))
    with pytest.raises(BadInput, match="qwen2_vl is a vision model"):
        look_at(job(vision, {**SFT}, tmp_path, data=tmp_path / "none.jsonl"))


def test_a_row_that_packing_would_cut_is_refused(policy, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "what? " * 50, "completion": "Okay"}) + "\n")
    with pytest.raises(BadInput, match="bfd would cut it"):
        look_at(job(policy, {**SFT, "packing": {"max_length": 32}}, tmp_path, "", data=path))
    assert (
        look_at(job(policy, {**SFT, "packing": {"max_length": 32, "strategy": "bfd_split"}}, tmp_path, "", data=path))
        == []
    )


def test_a_prefix_of_each_row_needs_the_column(tmp_path):
    with pytest.raises(BadInput, match="there is no column 'start'; a row has id, prompt"):
        look_at(job(TINY_BASE, GRPO, tmp_path, "", per_row="start"))


def test_a_run_is_refused_before_anything_trains_and_warns_of_stages_it_will_run_only(settings, write, tmp_path):
    settings["format"]["response_prefix"] = "<dächte>"
    done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect")
    assert (
        done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "comes back from the tokenizer" in done.stderr
    )
    assert printed_json("ls", "--registry", tmp_path / "r", "--json") == []
    settings["format"]["response_prefix"] = "<think>\n"
    stage(settings, "warmup")["prompt_loss_weight"] = 3.0
    first = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect", "--only", "warmup")
    assert (
        "warn: prompt tokens carry" in first.stdout and "(--set stages.warmup.prompt_loss_weight=1.5)" in first.stdout
    )
    again = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect", "--only", "warmup")
    assert "warn" not in again.stdout


def test_a_prompt_that_is_the_same_for_every_row_is_refused(tmp_path):
    one = job(TINY_BASE, GRPO, tmp_path)
    for template in ("{events}", ""):
        same = one.model_copy(update={"format": one.format.model_copy(update={"user_template": template})})
        with pytest.raises(BadInput, match="says the same for every row"):
            look_at(same)


def test_a_prefix_that_ends_the_turn_it_starts_is_refused(policy, tmp_path):
    with pytest.raises(BadInput, match="which ends the turn it would start"):
        look_at(job(policy, GRPO, tmp_path, "<|im_end|>"))


def test_rows_longer_than_the_model_has_positions_are_a_warning(policy, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "what? " * 300, "completion": "Okay"}) + "\n")
    found = look_at(job(policy, {**SFT, "epochs": 100.0}, tmp_path, "", data=path))
    assert rules(found) == ["row_longer_than_positions"] and found[0].evidence["positions"] == 512


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        ({**GRPO, "steps": 1}, True),
        ({**GRPO, "steps": 1, "warmup_steps": 0.0}, False),
        ({**GRPO, "steps": 2}, False),
        ({**GRPO, "steps": 5, "warmup_steps": 5.0}, True),
        ({**SFT, "epochs": 1.0, "rows_per_step": 64}, True),
        ({**SFT, "epochs": 1.0, "rows_per_step": 32}, False),
    ],
)
def test_a_stage_that_is_nothing_but_warm_up_is_a_warning(config, warned, tmp_path):
    """Its first step has a learning rate of 0: one step alone publishes the policy it started from."""
    assert rules(look_at(job(TINY_BASE, config, tmp_path))) == ["only_warm_up"] * warned
