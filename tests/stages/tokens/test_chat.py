"""The chat template: every token of a prompt has a role, over all templates that TRL ships, and a conversation is
trained as it will be served."""

from __future__ import annotations

import pytest

from stages.errors import BadInput
from stages.job import Format
from stages.tokens import chat, conversation, prefix
from stages.tokens.token_rows import TokenRow
from tests.models import CHATML, make_tokenizer
from tests.templates import TEMPLATES, WITHOUT_SYSTEM

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


DROPS_REASONING = CHATML.replace("m['content']", "m['content'].split('</think>')[-1].strip()")
"""Of every answer; qwen3's spares the last."""
SPARES_THE_LAST = CHATML.replace(
    "m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1].strip())"
)
TRIMS = CHATML.replace("m['content']", "(m['content'] if m['role'] == 'system' else m['content'].strip())")
OPENS = CHATML.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>\n' }}{% endif")
ADDS = CHATML.replace(
    "m['content']",
    "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' and '</think>' not in m['content'] else '') + m['content']",
)
ENDS_OTHERWISE = CHATML.replace(
    "'<|im_end|>\n'", "('<|endoftext|>' if m['role'] == 'assistant' and not loop.last else '<|im_end|>') + '\n'"
)


def rendered(tokenizer, turns, start="", given=0):
    ids, roles, notes = conversation.rendered(tokenizer, start, turns, given)
    assert len(ids) == len(roles)
    return tokenizer.decode(ids), said_by("p", ids, roles, tokenizer), said_by("c", ids, roles, tokenizer), notes


def test_every_assistant_turn_of_a_conversation_is_completion(tokenizer):
    """And what stands before each of them is what serving would give for that turn."""
    turns = [*TURNS, {"role": "assistant", "content": "3, user."}]
    text, start, answers, notes = rendered(tokenizer, turns, "3")
    assert (start, answers, notes) == ("33", ".<|im_end|>, user.<|im_end|>", ())
    served = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
    assert text == f"{served}3, user.<|im_end|>"


THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n3."}


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_does_and_says_a_way_out(tokenizer):
    tokenizer.chat_template = SPARES_THE_LAST
    with pytest.raises(BadInput, match=r"writes an earlier assistant turn otherwise.*give each turn a row of its own"):
        conversation.rendered(tokenizer, "", [TURNS[0], THOUGHT, TURNS[2], THOUGHT])
    text, start, answers, _ = rendered(tokenizer, [TURNS[0], THOUGHT, TURNS[2], THOUGHT], "<think>", given=3)
    assert (start, answers) == ("<think>", "\nhm\n</think>\n\n3.<|im_end|>")
    assert text.count("hm") == 1, "the earlier turn is as it will be served"


def test_words_of_an_earlier_answer_without_its_reasoning_are_a_users(tokenizer):
    tokenizer.chat_template = SPARES_THE_LAST
    ((ids, roles),) = chat.with_roles(tokenizer, [chat.pieces(tokenizer, [TURNS[0], THOUGHT, TURNS[2]])])
    assert said_by("u", ids, roles, tokenizer) == f"{USER}3.user"


def test_a_template_that_drops_the_reasoning_of_an_answer_is_refused(tokenizer):
    tokenizer.chat_template = DROPS_REASONING
    with pytest.raises(BadInput, match=r"writes an answer otherwise.*write it as the template does"):
        conversation.rendered(tokenizer, "", [TURNS[0], THOUGHT])


def test_an_answer_is_trimmed_where_the_template_trims_it(tokenizer):
    tokenizer.chat_template = TRIMS
    text, _, answers, notes = rendered(tokenizer, [TURNS[0], {"role": "assistant", "content": " 3.\n"}])
    assert answers == "3.<|im_end|>" and notes == ("blanks",)
    assert tokenizer.apply_chat_template([TURNS[0], {"role": "assistant", "content": " 3.\n"}], tokenize=False) == (
        text + "\n"
    )


@pytest.mark.parametrize("system", ["Be brief.", "Be brief.\n", " Be brief."])
@pytest.mark.parametrize("user", ["Hi", "Hi\n", " Hi "])
def test_trimming_is_judged_for_each_message(system, user, tokenizer):
    """Gemma 3 trims the user's words and not the system prompt's."""
    tokenizer.chat_template = TRIMS
    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    ((ids, roles),) = chat.with_roles(tokenizer, [chat.pieces(tokenizer, turns)])
    assert ids == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert said_by("s", ids, roles, tokenizer) == system and said_by("u", ids, roles, tokenizer) == user.strip()


@pytest.mark.parametrize("said", ["<think>\nhm\n</think>\n3.", "hm\n</think>\n3."])
def test_what_the_template_has_opened_is_trained_once_whether_the_answer_has_it_or_not(said, tokenizer):
    tokenizer.chat_template = OPENS
    text, _, answers, notes = rendered(tokenizer, [TURNS[0], {"role": "assistant", "content": said}])
    assert text.endswith("<|im_start|>assistant\n<think>\nhm\n</think>\n3.<|im_end|>")
    assert answers == "hm\n</think>\n3.<|im_end|>"
    assert notes == (("starts_with_opened",) if said.startswith("<") else ())
    assert prefix.demonstration(tokenizer, "", said)[0] == tokenizer.encode("hm\n</think>\n3.<|im_end|>")


def test_an_answer_that_leaves_open_what_the_template_has_opened_is_refused_and_its_advice_works(tokenizer):
    tokenizer.chat_template = OPENS
    with pytest.raises(BadInput, match=r"begin the answer with '<think>\\n\\n</think>\\n\\n'"):
        conversation.rendered(tokenizer, "", [TURNS[0], {"role": "assistant", "content": "3."}])
    followed = [TURNS[0], {"role": "assistant", "content": "<think>\n\n</think>\n\n3."}]
    assert rendered(tokenizer, followed)[2] == "\n</think>\n\n3.<|im_end|>"


def test_a_prefix_that_opens_again_what_the_template_has_opened_is_refused_in_the_data_too(tokenizer):
    tokenizer.chat_template = OPENS
    with pytest.raises(BadInput, match="would open it again"):
        conversation.rendered(tokenizer, "<think>\n", [TURNS[0], THOUGHT])


def test_what_the_template_puts_before_an_answer_is_trained_with_it(tokenizer):
    tokenizer.chat_template = ADDS
    turns = [TURNS[0], {"role": "assistant", "content": "3."}]
    text, _, answers, notes = rendered(tokenizer, turns)
    assert tokenizer.apply_chat_template(turns, tokenize=False) == text + "\n"
    assert answers == "<think>\n\n</think>\n\n3.<|im_end|>" and notes == ("added",)


def test_a_template_that_ends_earlier_turns_otherwise_is_refused(tokenizer):
    tokenizer.chat_template = ENDS_OTHERWISE
    assert chat.ending(tokenizer) == "<|im_end|>", (
        "gpt-oss ends a conversation with <|return|>, and a turn with <|end|>"
    )
    turns = [*TURNS, {"role": "assistant", "content": "3."}]
    with pytest.raises(BadInput, match="writes an earlier assistant turn otherwise"):
        conversation.rendered(tokenizer, "", turns)
    assert rendered(tokenizer, turns, given=3)[2] == "3.<|im_end|>"


def test_a_conversation_that_does_not_end_with_an_assistant_turn_is_refused(tokenizer):
    with pytest.raises(BadInput, match="does not end with an assistant turn"):
        conversation.rendered(tokenizer, "", TURNS)


def test_a_single_turn_is_the_same_as_demonstration_and_as_conversation(tokenizer):
    format = Format(
        prompt="p", prompt_digest="", system_prompt="", user_template="{{ prompt }}", response_prefix="<think>\n"
    )
    ((ids, roles),) = prefix.prompts(tokenizer, format, [{"prompt": USER}])
    target, letters = prefix.demonstration(tokenizer, "<think>\n", "<think>\n3.")
    turns = [TURNS[0], {"role": "assistant", "content": "<think>\n3."}]
    assert conversation.rendered(tokenizer, "<think>\n", turns) == (ids + target, roles + letters, ())


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
    turns = [TURNS[0], {"role": "assistant", "content": "The answer is 42."}]
    ids, roles, _ = conversation.rendered(tokenizer, start, turns)
    assert prefix.merges_at_boundary(tokenizer, TokenRow("1", ids, roles)) == merges
