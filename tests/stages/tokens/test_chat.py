"""The chat template: every token of a prompt has a role, over all templates that TRL ships, and a conversation is
trained as it will be served."""

from __future__ import annotations

import pytest

from stages.errors import BadInput
from stages.job import Format
from stages.tokens import chat, prefix
from stages.tokens.token_rows import TokenRow
from tests.models import CHATML, make_tokenizer
from tests.templates import ADDS_TO_TURNS, NO_TURN_END, REWRITES, TEMPLATES, WITHOUT_SYSTEM, tokenizer_of

SYSTEM, USER = "Be brief.", "What is 1 + 2?"
TURNS = [{"role": "user", "content": USER}, {"role": "assistant", "content": "3."}, {"role": "user", "content": "user"}]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def said_by(letter, ids, roles, tokenizer):
    return tokenizer.decode([id for id, role in zip(ids, roles, strict=True) if role == letter])


@pytest.mark.parametrize("name", TEMPLATES)
def test_roles_are_whose_words_they_are_and_the_ids_are_apply_chat_templates(name, tokenizer):
    tokenizer.chat_template = TEMPLATES[name]
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    turns = turns[1:] if name in WITHOUT_SYSTEM else turns
    ((ids, roles),) = chat.with_roles(tokenizer, [chat.pieces(tokenizer, turns)])
    assert ids == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert said_by("u", ids, roles, tokenizer) == USER
    if name not in WITHOUT_SYSTEM:
        assert said_by("s", ids, roles, tokenizer) == SYSTEM


def test_words_that_look_like_the_template_are_still_the_users(tokenizer):
    turns = [{"role": "user", "content": "user\nassistant"}]
    ((ids, roles),) = chat.with_roles(tokenizer, [chat.pieces(tokenizer, turns)])
    assert said_by("u", ids, roles, tokenizer) == "user\nassistant"
    assert said_by("t", ids, roles, tokenizer) == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", WITHOUT_SYSTEM)
def test_a_template_that_refuses_system_messages_is_refused_in_one_line(name, tokenizer):
    tokenizer.chat_template = TEMPLATES[name]
    with pytest.raises(BadInput, match="refuses a conversation of system, user"):
        chat.pieces(tokenizer, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}])


def test_a_template_that_drops_system_messages_is_refused_in_one_line(tokenizer):
    tokenizer.chat_template = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
    )
    with pytest.raises(BadInput, match="drops the system message"):
        chat.pieces(tokenizer, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}])


def test_a_template_that_changes_words_is_refused_in_one_line(tokenizer):
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | upper")
    with pytest.raises(BadInput, match="changes the words"):
        chat.pieces(tokenizer, [{"role": "user", "content": USER}])


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in (*REWRITES, *ADDS_TO_TURNS)])
@pytest.mark.parametrize("start", ["", "3"])
def test_every_assistant_turn_of_a_conversation_is_completion(name, start):
    """And what stands before each of them is what serving would give for that turn."""
    tokenizer = tokenizer_of(name)
    turns = [*TURNS, {"role": "assistant", "content": "3, user."}]
    ids, roles = prefix.conversation(tokenizer, start, turns)
    row = TokenRow("1", ids, roles)
    assert len(row.ids) == len(row.roles)
    eos = tokenizer.eos_token
    assert (
        said_by("c", ids, roles, tokenizer) == f"{'3.'.removeprefix(start)}{eos}{'3, user.'.removeprefix(start)}{eos}"
    )
    assert said_by("p", ids, roles, tokenizer) == start * 2
    last = max(i for i, role in enumerate(roles) if role not in "pc")
    served = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(ids[: last + 1]) == served


@pytest.mark.parametrize("name", [name for name in REWRITES if name not in NO_TURN_END])
def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_does(name):
    tokenizer = tokenizer_of(name)
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n3."}
    with pytest.raises(BadInput, match="writes an earlier assistant turn otherwise"):
        prefix.conversation(tokenizer, "", [TURNS[0], thought, TURNS[2], thought])
    ids, roles = prefix.conversation(tokenizer, "<think>", [TURNS[0], thought])
    assert said_by("p", ids, roles, tokenizer) == "<think>"


@pytest.mark.parametrize("name", ADDS_TO_TURNS)
def test_a_template_that_adds_to_earlier_turns_is_refused(name):
    turns = [*TURNS, {"role": "assistant", "content": "3."}]
    with pytest.raises(BadInput, match="writes an earlier assistant turn otherwise"):
        prefix.conversation(tokenizer_of(name), "", turns)


@pytest.mark.parametrize("name", NO_TURN_END)
def test_a_template_without_a_turn_end_is_refused(name):
    with pytest.raises(BadInput, match="does not hold the tokenizer's eos token"):
        prefix.conversation(tokenizer_of(name), "", [TURNS[0], {"role": "assistant", "content": "3."}])


def test_a_conversation_that_does_not_end_with_an_assistant_turn_is_refused(tokenizer):
    with pytest.raises(BadInput, match="does not end with an assistant turn"):
        prefix.conversation(tokenizer, "", TURNS)


def test_a_single_turn_is_the_same_as_demonstration_and_as_conversation(tokenizer):
    format = Format(
        prompt="p", prompt_digest="", system_prompt="", user_template="{{ prompt }}", response_prefix="<think>\n"
    )
    ((ids, roles),) = prefix.prompts(tokenizer, format, [{"prompt": USER}])
    target, letters = prefix.demonstration(tokenizer, "<think>\n", "<think>\n3.")
    assert prefix.conversation(tokenizer, "<think>\n", [TURNS[0], {"role": "assistant", "content": "<think>\n3."}]) == (
        ids + target,
        roles + letters,
    )


def test_blanks_that_a_tokenizer_leaves_out_of_its_offsets_are_still_the_users(tokenizer):
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = [{"role": "user", "content": "  What  is 1  ?"}]
    ((ids, roles),) = chat.with_roles(tokenizer, [chat.pieces(tokenizer, turns)])
    assert said_by("u", ids, roles, tokenizer) == "  What  is 1  ?"


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(("start", "merges"), [("The answer is", False), ("The answer", False), ("The ans", True)])
def test_a_prefix_merges_with_the_answer_only_where_a_token_lies_across_its_end(start, merges, trim, tokenizer):
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    ids, roles = prefix.conversation(
        tokenizer, start, [TURNS[0], {"role": "assistant", "content": "The answer is 42."}]
    )
    assert prefix.merges_at_boundary(tokenizer, TokenRow("1", ids, roles)) == merges
