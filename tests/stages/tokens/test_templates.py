"""What is trained is what the chat template renders, token for token, over all text templates that TRL ships, each with
the special tokens, eos token and generation settings of the model it is from.

The oracle is `apply_chat_template` of the tokenizer as it was saved, which switchback's own loader has not touched. A
conversation may be refused; then the advice is followed, here by `FOLLOWED`, until a row passes."""

# ruff: noqa: RUF001, the names of tokens are what they are

from __future__ import annotations

import ast
import json
import random
import re

import pytest
from transformers import AutoTokenizer

from stages.data import sources
from stages.errors import BadInput
from stages.job import Format
from stages.policy import models
from stages.tokens import chat, conversation, prefix
from stages.tokens.turns import opened
from tests.conftest import ROOT
from tests.models import CHATML
from tests.templates import ADDS, DIRECTORY, OPENS, TEMPLATES, VISION, save_tokenizer

FORMAT = Format(prompt="p", prompt_digest="", system_prompt="", user_template="{{ prompt }}", response_prefix="")
WORDS = ("yes", "no", "42.", "über", "漢字", "🤔", "a\nb", "1 + 2 = 3", "<b>", "{{ x }}", "'quoted'", "\u2028", "user")
BLANKS = ("", "", "", " ", "\n", "\n\n", "  ")
REASONING = ("", "", "<think>\nhm, 1\n</think>\n\n", "<think>hm</think>", "<think>\n\n</think>\n\n", "hm\n</think>\n")
DROPS_ITS_OWN_REASONING = ("deepseek_r1_distill", "deepseekv3")
"""They leave reasoning out of the last answer too, where TRL's training versions of them keep it, at least of R1."""
READS_A_FIELD_ONLY = ("qwen3_8",)
"""They know reasoning only where it has a field of its own."""
ENDS_WITH_NEXT = {"glm4moe": "<|user|>"}
"""Their turns end with the token that begins the next one."""


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Template -> (the tokenizer as it was saved, the one that stages load)."""
    loaded = {}

    def load(name):
        if name not in loaded:
            directory = save_tokenizer(tmp_path_factory.mktemp(name), name)
            loaded[name] = AutoTokenizer.from_pretrained(directory), models.load_tokenizer(str(directory))
        return loaded[name]

    return load


def said(draw: random.Random, role: str) -> str:
    words = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 3)))
    reasoning = draw.choice(REASONING) if role == "assistant" else ""
    return draw.choice(BLANKS) + reasoning + words + draw.choice(BLANKS)


def a_conversation(draw: random.Random, end: str) -> dict:
    """A line of a file, good or bad, with all that lines have been seen to have."""
    roles = ["system"] * draw.choice((0, 0, 1)) + ["user", "assistant"] * draw.randint(1, 3)
    if draw.random() < 0.15:
        roles[-1:] = ["assistant", "tool", "assistant"]
    if draw.random() < 0.1:
        roles.insert(draw.randrange(len(roles)), draw.choice(("user", "assistant", "system", "developer", "human")))
    if draw.random() < 0.05:
        roles.append("user")
    turns = [{"role": role, "content": said(draw, role)} for role in roles]
    one = draw.choice(turns)
    oddity = draw.random()
    if oddity < 0.05:
        one["content"] = ""
    elif oddity < 0.1:
        one["content"] += end
    elif oddity < 0.15:
        one |= {"name": None, "tool_calls": None}
    elif oddity < 0.2:
        one["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    line = {"messages": turns}
    if draw.random() < 0.3 and roles[-2:] == ["user", "assistant"]:
        line = {"prompt": turns[:-1], "completion": turns[-1:]}
    if draw.random() < 0.1:
        line["tools"] = draw.choice((None, [{"type": "function", "function": {"name": "f"}}]))
    return line


def turns_of(line):
    return line.get("messages") or [*line["prompt"], *line["completion"]]


def given(line):
    return len(line.get("prompt", ()))


def with_turns(line, change):
    """The line, with every turn what `change` makes of (its number, the turn); None leaves it out."""
    turns = turns_of(line)
    changed = [change(i, turn) for i, turn in enumerate(turns)]
    parts = {"messages": changed} if "messages" in line else {
        "prompt": changed[: given(line)], "completion": changed[given(line) :]
    }  # fmt: skip
    return {**line, **{name: [turn for turn in part if turn is not None] for name, part in parts.items()}}


def answers_changed(line, change):
    return with_turns(
        line,
        lambda i, turn: (
            {**turn, "content": change(turn["content"])} if turn["role"] == "assistant" and i >= given(line) else turn
        ),
    )


def alternating(line):
    """Only questions and answers, in turn; a system prompt where it is first."""
    kept = []
    for turn in turns_of(line):
        before = kept[-1]["role"] if kept else None
        wanted = ("user",) if before in (None, "assistant", "system") else ("assistant",)
        if turn["role"] in wanted:
            kept.append(turn)
    return {"messages": kept if kept[-1]["role"] == "assistant" else kept[:-1]}


def last_turn_alone(line, *_):
    turns = turns_of(line)
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def without_reasoning(text):
    return re.split(r"</think>", text)[-1].lstrip()


def without_reasoning_or_joined(line, *_):
    changed = answers_changed(line, without_reasoning)
    return changed if changed != line else alternating(line)


def begun(line, match, _):
    with_tag = ast.literal_eval(match[1])
    return answers_changed(line, lambda text: text if "</think>" in text else with_tag + text)


def renamed(line, match, _):
    return with_turns(line, lambda i, turn: {**turn, "role": match[2]} if turn["role"] == match[1] else turn)


def into_the_users(line, match, _):
    """A system prompt or a tool's words, moved into the user's turn beside it."""
    turns, moved = turns_of(line), []
    words = [turn["content"] for turn in turns if turn["role"] == match[1]]
    for turn in turns:
        if turn["role"] == "user" and words:
            moved.append({**turn, "content": "\n".join([*words, turn["content"]])})
            words = []
        elif turn["role"] != match[1]:
            moved.append(turn)
    return alternating({"messages": moved})


def as_the_template_does(line, match, tokenizer):
    """The last answer, cut out of what the template renders."""
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in turns_of(line)]
    prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    written = whole[len(prompt) :].partition(chat.ending(tokenizer))[0]
    return with_turns(line, lambda i, turn: {**turn, "content": written} if i == len(turns) - 1 else turn)


def in_other_words(line, *_):
    """No template looks into these."""
    return with_turns(
        line, lambda i, turn: turn if turn["role"] == "assistant" else {**turn, "content": "What is 1 + 2?"}
    )


FOLLOWED = [
    (r"tools are not rendered.*remove them", lambda line, *_: {k: v for k, v in line.items() if k != "tools"}),
    (
        r"write what the turn says into content, and remove the rest",
        lambda line, *_: with_turns(line, lambda i, turn: {"role": turn["role"], "content": turn["content"]}),
    ),
    (r"found the role '(\w+)'.*rename it to (\w+)", renamed),
    (r"give each turn a row of its own", last_turn_alone),
    (r"begin the answer with ('.*?'), or set", begun),
    (r"leave its reasoning out", without_reasoning_or_joined),
    (r"remove what comes after the last one", lambda line, *_: {"messages": turns_of(line)[:-1]}),
    (r"start it with the user's", lambda line, *_: {"messages": turns_of(line)[1:]}),
    (r"leave out the turns that it has no place for", lambda line, *_: alternating(line)),
    (r"drops the (\w+) message; move its words into the user's", into_the_users),
    (r"a prompt ends in an assistant turn", lambda line, *_: alternating(line)),
    (
        r"which ends a turn.*remove it",
        lambda line, _, tokenizer: answers_changed(line, lambda text: text.replace(chat.end_token(tokenizer), "")),
    ),
    (r"its answer is empty", lambda line, *_: answers_changed(line, lambda text: text + "yes")),
    (r"write it as the template does", as_the_template_does),
    (r"changes the words of a message", in_other_words),
]
"""What a refusal says -> the line after its advice was followed."""


def row_of(line, tokenizer, directory):
    """(the row, the line it is of), after as many refusals as it takes."""
    path = directory / "line.jsonl"
    seen = []
    for _ in range(8):
        path.write_text(json.dumps(line))
        try:
            return sources.conversations(path, FORMAT, tokenizer)[0], line
        except BadInput as error:
            seen.append(str(error).partition("line 1: ")[2])
        match, follow = next(
            ((match, follow) for advice, follow in FOLLOWED if (match := re.search(advice, seen[-1], re.S))),
            (None, None),
        )
        assert match, f"no advice to follow in {seen[-1]!r}, for {line}"
        line = follow(line, match, tokenizer)
    raise AssertionError(f"the advice leads nowhere: {seen}, {line}")


def canonical(name, turns, raw, first):
    """Answers that go on from an opened tag, with the tag: both are one answer."""
    turns = [*turns]
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant" or i < first:
            continue
        tag = opened(raw.apply_chat_template(turns[:i], add_generation_prompt=True, tokenize=False))
        if not tag or "</think>" not in turn["content"]:
            continue
        words = re.sub(r"\A\s*<think>\n?", "", turn["content"])
        turns[i] = {**turn, "content": tag + words}
        if name in READS_A_FIELD_ONLY:
            reasoning, _, rest = words.partition("</think>")
            turns[i] = {**turn, "reasoning_content": reasoning, "content": rest}
    return turns


def check(name, row, line, raw, tokenizer):
    """The row is what the template renders, with the ids of the prompts that serving gives."""
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in turns_of(line)]
    text = raw.decode(row.ids)
    training = name in DROPS_ITS_OWN_REASONING and "</think>" in turns[-1]["content"]
    template = (DIRECTORY / f"{DROPS_ITS_OWN_REASONING[0]}_training.jinja").read_text() if training else None
    shown = canonical(name, turns, raw, given(line))
    whole = raw.apply_chat_template(shown, chat_template=template, tokenize=False)
    if training:
        served = raw.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
        whole = served + shown[-1]["content"].removeprefix(opened(served)) + raw.eos_token
    end = ENDS_WITH_NEXT.get(name, "")
    assert whole.startswith(text.removesuffix(end)), (line, text, whole)
    after = whole[len(text.removesuffix(end)) :]
    assert not after.replace(str(raw.eos_token), "").strip(), (line, after)
    assert text.endswith(chat.ending(tokenizer))
    assert row.ids[: last_answer(row)] == served_ids(shown, raw) or earlier_merges(row, line, raw, shown)
    assert len(row.ids) == len(row.roles)


def last_answer(row):
    """Where it begins."""
    return max(i for i, role in enumerate(row.roles) if role not in "pc") + 1


def served_ids(turns, raw):
    return raw.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]


def earlier_merges(row, line, raw, turns):
    """The text is the one that is served, but a token would have lain across the start of an earlier answer."""
    trained_before = sum(turn["role"] == "assistant" for turn in turns[given(line) : -1])
    served = raw.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
    return trained_before and raw.decode(row.ids[: last_answer(row)]) == served


def compare(name, count, tokenizers, directory):
    raw, tokenizer = tokenizers(name)
    for i in range(count):
        line = a_conversation(random.Random(f"{name}-{i}"), chat.end_token(tokenizer))
        row, line = row_of(line, tokenizer, directory)
        check(name, row, line, raw, tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_is_what_the_template_renders(name, tokenizers, tmp_path):
    compare(name, 6, tokenizers, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_is_what_the_template_renders_in_fifty_conversations(name, tokenizers, tmp_path):
    compare(name, 50, tokenizers, tmp_path)


@pytest.mark.parametrize("name", VISION)
def test_a_template_of_a_vision_model_is_refused_in_one_line(name, tokenizers, tmp_path):
    _, tokenizer = tokenizers("qwen2_5")
    path = tmp_path / "line.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 2?", "completion": "3"}))
    template = (DIRECTORY / f"{name}.jinja").read_text()
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        with pytest.raises(BadInput, match=r"vision|drops the user message") as refused:
            sources.conversations(path, FORMAT, tokenizer)
    finally:
        tokenizer.chat_template = before
    assert "\n" not in str(refused.value)


ENDINGS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "llama3": "<|eot_id|>",
    "muse_glimmer": "<|eot|>",
    "phi3": "<|end|>",
}
"""Beginning of a template's name -> the end of its turns, written down by hand; the longest that fits counts, and
<|im_end|> where none does."""


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_ends_as_the_template_ends_it_and_that_stops_the_sampling(name, tokenizers):
    raw, tokenizer = tokenizers(name)
    wanted = ENDINGS.get(max((start for start in ENDINGS if name.startswith(start)), key=len, default=""), "<|im_end|>")
    assert chat.ending(tokenizer) == wanted
    assert wanted.endswith(str(tokenizer.eos_token)) and chat.end_token(tokenizer) == tokenizer.eos_token
    assert tokenizer.pad_token_id == raw.pad_token_id
    assert prefix.demonstration(tokenizer, "", "</think>3")[0] == raw.encode("</think>3" + wanted)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_page_of_templates_says_what_is_so(name, tokenizers):
    _, tokenizer = tokenizers(name)
    page = (ROOT / "docs" / "templates.md").read_text()
    (line,) = [line for line in page.splitlines() if re.search(rf"`{name}`", line.partition("| `<")[0])]
    assert f"`{chat.ending(tokenizer)}`" in line
    assert ("opens `<think>`" in line) == bool(chat.opened(tokenizer)) == (name in OPENS)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "3"}]
    if name not in OPENS:
        assert ("puts" in line) == (conversation.ADDED in conversation.rendered(tokenizer, "", turns).notes)
        assert ("puts" in line) == (name in ADDS)


def test_a_template_without_a_token_that_ends_a_turn_is_refused_until_one_is_written(tokenizers):
    _, tokenizer = tokenizers("qwen2_5")
    before, turns = tokenizer.chat_template, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "3"}]
    try:
        tokenizer.chat_template = CHATML.replace("<|im_end|>", "")
        with pytest.raises(BadInput, match=r"ends an assistant turn with '\\n'.*set format.chat_template"):
            conversation.rendered(tokenizer, "", turns)
        tokenizer.chat_template = CHATML
        assert tokenizer.decode(conversation.rendered(tokenizer, "", turns).ids).endswith("3<|im_end|>")
    finally:
        tokenizer.chat_template = before
