"""The prefix is one thing: given in sampling, target in SFT, seen by the problem, yielded by the serving template,
never doubled."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from stages.errors import BadInput
from stages.job import Format
from stages.policy import models, publishing
from stages.problems.base import Row
from stages.tokens import chat, prefix
from tests.models import CHATML, make_model, make_tokenizer

ROW = Row("1", "What is 1 + 2?")


def format_with(response_prefix: str = "<think>\n", system: str = "", user: str = "{{ prompt }}") -> Format:
    return Format(
        prompt="p", prompt_digest="d", system_prompt=system, user_template=user, response_prefix=response_prefix
    )


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def test_sampling_is_given_prompt_and_prefix_and_nothing_is_merged_between_them(tokenizer):
    ((ids, roles),) = prefix.prompts(tokenizer, format_with(), [ROW])
    assert tokenizer.decode(ids) == "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert len(roles) == len(ids) and [tokenizer.decode([i for i, r in zip(ids, roles, strict=True) if r == "u"])] == [
        "What is 1 + 2?"
    ]
    assert prefix.prefix_ids(tokenizer, "<think>\n") == tokenizer("<think>\n")["input_ids"]


def test_an_sft_target_starts_with_the_very_ids_that_sampling_is_given(tokenizer):
    """Were prefix and rest one string, the tokenizer would merge across the boundary."""
    text = "<think>\nOkay, so I add the numbers."
    ids = prefix.demonstration(tokenizer, "<think>\nOk", text)[0]
    start = prefix.prefix_ids(tokenizer, "<think>\nOk")
    assert ids[: len(start)] == start and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == text
    assert ids[:-1] != tokenizer(text)["input_ids"]


def test_a_demonstration_that_does_not_start_with_the_prefix_is_refused(tokenizer):
    with pytest.raises(BadInput, match="make them agree"):
        prefix.demonstration(tokenizer, "<think>\n", "Okay.")


def test_the_problem_sees_the_prefix_and_special_tokens_but_not_what_stands_around_a_turn(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>", "<|tool|>"]})
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    said = tokenizer("<|im_start|>Okay.<answer>3</answer><|tool|>")["input_ids"]
    for sampled in (said, [*said, end], [*said, end, pad, pad]):
        text = prefix.completion_text(tokenizer, "<think>\n", sampled, frozenset({end}))
        assert text == "<think>\nOkay.<answer>3</answer><|tool|>"


def test_a_special_tag_that_the_template_opens_is_still_seen(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    sampled = tokenizer("hm<think></think>3")["input_ids"]
    assert prefix.completion_text(tokenizer, "", sampled, frozenset()) == "<think>\nhm<think></think>3"


def test_the_problem_sees_what_the_template_has_opened(tokenizer):
    tokenizer.chat_template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    sampled = [*tokenizer("hm\n</think>\n3")["input_ids"], tokenizer.eos_token_id]
    ends = frozenset({tokenizer.eos_token_id})
    assert prefix.completion_text(tokenizer, "", sampled, ends) == "<think>\nhm\n</think>\n3"
    assert prefix.completion_text(tokenizer, "Ok", sampled, ends) == "<think>\nOkhm\n</think>\n3"


def test_what_the_template_writes_between_an_answer_and_its_end_is_no_part_of_its_text(tokenizer):
    """Cohere's <|END_RESPONSE|>, which is trained and sampled."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    tokenizer.chat_template = CHATML.replace("m['content'] +", "m['content'] + '<|done|>' +")
    ids, _ = prefix.demonstration(tokenizer, "", "Okay.")
    assert tokenizer.decode(ids) == "Okay.<|done|><|im_end|>"
    assert prefix.completion_text(tokenizer, "", ids, frozenset({tokenizer.eos_token_id})) == "Okay."


@pytest.mark.parametrize("response_prefix", ["<think>\n", "", "{{ 'a' }}", '"quoted" \\ {% x %}\n', "\n\n", "🤔 "])
@pytest.mark.parametrize(
    "template", [CHATML, CHATML + "\n", CHATML.replace("{% endif %}", "{%- endif %}\n"), CHATML + "\n  ", CHATML + " "]
)
def test_serving_yields_prompt_and_prefix_and_training_does_not(response_prefix, template, tmp_path, tokenizer):
    tokenizer.chat_template = template
    turn = prefix.messages(format_with(response_prefix), ROW)
    training = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    publishing.save_policy(make_model(tokenizer), tokenizer, format_with(response_prefix), tmp_path)
    served = AutoTokenizer.from_pretrained(tmp_path)
    assert served.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) == training + response_prefix
    assert served.apply_chat_template(turn, add_generation_prompt=False, tokenize=False).count("assistant") == 0
    assert chat.training_template(served) == template
    assert served.decode(prefix.prompt_ids(served, [turn])[0]) == training


def test_the_prefix_is_not_doubled_when_a_policy_is_published_again(tmp_path, tokenizer):
    for generation in range(3):
        publishing.save_policy(make_model(tokenizer), tokenizer, format_with(), tmp_path / str(generation))
        tokenizer = models.load_tokenizer(str(tmp_path / str(generation)))
    text = tokenizer.apply_chat_template(
        prefix.messages(format_with(), ROW), add_generation_prompt=True, tokenize=False
    )
    assert text.count("<think>") == 1


def test_system_prompt_and_user_template_dress_the_row(tokenizer):
    dressed = prefix.messages(format_with(system="Be brief.", user="Task {{ id }}: {{ prompt }}"), ROW)
    assert dressed == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Task 1: What is 1 + 2?"},
    ]


def test_a_user_template_that_asks_for_what_a_row_has_not_is_refused():
    with pytest.raises(BadInput, match="a row has id, prompt"):
        prefix.messages(format_with(user="{{ question }}"), ROW)


def test_a_user_template_cannot_reach_the_machine():
    with pytest.raises(BadInput, match="unsafe"):
        prefix.messages(format_with(user="{{ prompt.__class__.__mro__ }}"), ROW)


def test_a_turn_that_no_token_ends_is_refused(tokenizer):
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>")
    with pytest.raises(BadInput, match="eos token"):
        chat.ending(tokenizer)


def test_a_prefix_that_the_tokenizer_cannot_write_is_refused():
    from tests.conftest import TINY_BASE

    with pytest.raises(BadInput, match="comes back from the tokenizer"):
        prefix.prefix_ids(models.load_tokenizer(str(TINY_BASE)), "<dächte>")


def test_the_digest_of_a_format_moves_with_its_text_and_not_with_its_name(tokenizer):
    seen = prefix.seen_format(format_with(), tokenizer)
    assert len(seen.training_template) == 64
    assert prefix.format_digest(seen) == prefix.format_digest(seen.model_copy(update={"prompt": "other"}))
    assert prefix.format_digest(seen) != prefix.format_digest(seen.model_copy(update={"response_prefix": ""}))
