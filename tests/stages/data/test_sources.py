"""What an sft stage trains on: demonstrations, files of conversations, and what was sampled, all as ids with roles."""

from __future__ import annotations

import json

import pytest

from stages.data import sources
from stages.errors import BadInput
from stages.job import Format
from stages.sft import SftConfig
from stages.tokens import loss_map
from tests.conftest import TINY_BASE, run_cli, stage
from tests.models import make_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "<think>\n3"},
    {"role": "user", "content": "3 + 4?"},
    {"role": "assistant", "content": "<think>\n7"},
]
FORMAT = Format(
    prompt="p", prompt_digest="", system_prompt="Add.", user_template="{{ prompt }}", response_prefix="<think>\n"
)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def read(lines, tmp_path, tokenizer, format=FORMAT):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return sources.conversations(path, format, tokenizer)


def test_messages_prompt_and_completion_and_plain_text_are_the_same_row(tokenizer, tmp_path):
    one, two, three = read(
        [
            {"messages": CONVERSATION[:3]},
            {"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:3]},
            {"prompt": "1 + 2?", "completion": "<think>\n3"},
        ],
        tmp_path,
        tokenizer,
    )
    assert one.ids == two.ids == three.ids and one.roles == two.roles == three.roles
    assert [row.row for row in (one, two, three)] == ["1", "2", "3"]


def test_a_key_that_is_null_is_a_missing_key(tokenizer, tmp_path):
    """As `datasets` writes what a line lacks and another has."""
    with_nulls = [{**turn, "name": None, "tool_calls": None} for turn in CONVERSATION]
    one, two, three = read(
        [
            {"messages": CONVERSATION},
            {"messages": with_nulls, "tools": None, "prompt": None, "completion": None},
            {"messages": None, "prompt": with_nulls[:4], "completion": with_nulls[4:], "source": "x"},
        ],
        tmp_path,
        tokenizer,
    )
    assert one.ids == two.ids == three.ids and one.roles == two.roles


def test_every_assistant_turn_is_completion_and_starts_with_the_prefix(tokenizer, tmp_path):
    (row,) = read([{"messages": CONVERSATION}], tmp_path, tokenizer)
    answers = "".join(
        tokenizer.decode([id]) if role in "pc" else "\0" for id, role in zip(row.ids, row.roles, strict=True)
    )
    assert [part for part in answers.split("\0") if part] == ["<think>\n3<|im_end|>", "<think>\n7<|im_end|>"]
    assert row.roles.count("p") == 2 * len(tokenizer("<think>\n")["input_ids"])


def test_a_column_may_give_each_row_its_prefix(tokenizer, tmp_path):
    format = FORMAT.model_copy(update={"response_prefix": "", "per_row": "start"})
    rows = read(
        [
            {"prompt": "1?", "completion": "<think>\n3", "start": "<think>\n"},
            {"prompt": "1?", "completion": "3", "start": ""},
        ],
        tmp_path,
        tokenizer,
        format,
    )
    assert ["p" in row.roles for row in rows] == [True, False]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": CONVERSATION[:4]}, "line 1: a conversation does not end with an assistant turn"),
        ({"prompt": CONVERSATION[:3], "completion": CONVERSATION[4:]}, "line 1: a prompt ends in an assistant turn"),
        (
            {"messages": [*CONVERSATION[:2], {"role": "assistant", "content": "3"}]},
            "line 1: the response prefix is '<think>",
        ),
        ({"text": "1 + 2 = 3"}, 'line 1: found text, expected {"messages": [...]} or'),
        ({"prompt": "\ud83d", "completion": "x"}, "line 1: it holds half of a surrogate pair"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "line 1: messages, turn 1: found 'role: str, content: list'",
        ),
        ({"messages": CONVERSATION, "tools": [{"name": "f"}]}, "line 1: tools are not rendered"),
        ({"messages": CONVERSATION, "completion": "3"}, "line 1: found messages together with prompt or completion"),
        ({"prompt": "?", "completion": "<think>\n3<|im_end|>"}, "line 1: an answer holds '<|im_end|>'"),
        ({"messages": []}, "line 1: found messages, expected"),
        ([1], "line 1: found list, expected"),
        ({"messages": CONVERSATION[2:3]}, "line 1: a conversation starts with an assistant turn"),
        ({"messages": [CONVERSATION[1], {**CONVERSATION[2], "tool_calls": []}]}, "line 1: messages, turn 2: found"),
        (
            {"messages": [{"role": "human", "content": "1?"}, {"role": "gpt", "content": "2"}]},
            "line 1: messages, turn 1: found the role 'human', expected one of system, developer, user, assistant, "
            "tool; rename it to user",
        ),
        (
            {"prompt": CONVERSATION[:2], "completion": [{"role": "gpt", "content": "2"}]},
            "line 1: completion, turn 1: found the role 'gpt', expected one of system, developer, user, assistant, "
            "tool; rename it to assistant",
        ),
        ({"messages": [{"role": "user", "content": None}, CONVERSATION[2]]}, "turn 1: found 'role: str', expected"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(line, said, tokenizer, tmp_path):
    with pytest.raises(BadInput) as refused:
        read([line], tmp_path, tokenizer)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": "<think>\n \n"},
        {"prompt": CONVERSATION[:2], "completion": [{"role": "assistant", "content": ""}]},
        {"messages": [CONVERSATION[1], {"role": "assistant", "content": "<think>\n"}]},
    ],
)
def test_a_line_that_would_only_teach_to_end_the_turn_is_named(line, tokenizer, tmp_path):
    """Also one beside others that are good, and one of a mix, which is read in the same way."""
    with pytest.raises(BadInput, match="line 2: its answer is empty"):
        read([{"messages": CONVERSATION}, line], tmp_path, tokenizer)


def test_one_answer_of_several_may_be_empty(tokenizer, tmp_path):
    silent = [CONVERSATION[1], {"role": "assistant", "content": "<think>\n"}, *CONVERSATION[3:]]
    (row,) = read([{"messages": silent}], tmp_path, tokenizer)
    assert tokenizer.decode(row.ids).endswith("7<|im_end|>")


def test_earlier_assistant_turns_of_a_prompt_are_not_trained(tokenizer, tmp_path):
    """As in TRL: a completion is what comes after the prompt. They need not start with the prefix, either."""
    prompt = [CONVERSATION[1], {"role": "assistant", "content": "WRONG"}, CONVERSATION[3]]
    (row,) = read([{"prompt": prompt, "completion": CONVERSATION[4:]}], tmp_path, tokenizer)
    answered = [id for id, role in zip(row.ids, row.roles, strict=True) if role in "pc"]
    assert tokenizer.decode(answered) == "<think>\n7<|im_end|>" and "WRONG" in tokenizer.decode(row.ids)


def test_a_line_ends_where_jsonl_says_and_nowhere_else(tokenizer, tmp_path):
    (row,) = read([{"prompt": "1 \u2028 2?", "completion": "<think>\n3"}], tmp_path, tokenizer)
    path = tmp_path / "raw.jsonl"
    path.write_text(json.dumps({"prompt": "1 \u2028 2?", "completion": "<think>\n3"}, ensure_ascii=False) + "\n")
    assert sources.conversations(path, FORMAT, tokenizer)[0].ids == row.ids
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="is not UTF-8 text"):
        sources.conversations(path, FORMAT, tokenizer)


def test_a_loss_map_says_what_each_token_decides(tokenizer, tmp_path):
    (row,) = read([{"messages": CONVERSATION}], tmp_path, tokenizer)
    config = SftConfig(name="w", policy="base", prompt_loss_weight=0.1, loss_weights={"system": 0.0, "prefix": 0.5})
    tokens = loss_map.of_row(row, config.weights, tokenizer)["tokens"]
    assert sum(token["share"] for token in tokens) == pytest.approx(1.0)
    assert tokens[0]["weight"] == 0.0, "the first token is never predicted"
    assert {(token["role"], token["weight"]) for token in tokens[1:]} == {
        ("template", 0.1), ("system", 0.0), ("user", 0.1), ("prefix", 0.5), ("completion", 1.0)
    }  # fmt: skip
    assert "".join(token["text"] for token in tokens) == tokenizer.decode(row.ids)


def test_a_file_of_conversations_is_trained_on_and_its_bytes_are_in_the_key(settings, write, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"A {i}\n", "completion": "<think>\nA 1\n</think>\n"}) + "\n" for i in range(40))
    )
    stage(settings, "warmup").update(
        data=str(path), rows=None, packing={"strategy": "bfd", "max_length": 64}, rows_per_step=8
    )
    stage(settings, "warmup").pop("rows")
    recipe, registry = write(settings), tmp_path / "r"
    done = run_cli("run", recipe, "--registry", registry, "--no-prefect", "--only", "warmup")
    assert done.returncode == 0, done.stderr
    (artifact,) = [json.loads(path.read_text()) for path in registry.glob("artifacts/warmup-*/artifact.json")]
    assert artifact["metrics"]["rows"] == 40 and artifact["metrics"]["sequences"] < 20
    assert artifact["inputs"]["data"]["name"] == str(path)
    path.write_text(path.read_text().replace("A 1", "A 2"))
    planned = run_cli("plan", recipe, "--registry", registry, "--only", "warmup")
    assert "input changed: data" in planned.stdout
    missing = run_cli("plan", recipe, "--registry", registry, "--set", "stages.warmup.data=nowhere.jsonl")
    assert missing.returncode == 2 and "stages.warmup.data: nowhere.jsonl is not there" in missing.stderr


def test_the_tiny_bases_demonstrations_have_all_roles_but_system():
    from stages.policy import models
    from stages.problems.scheduling.problem import Scheduling
    from stages.tokens import prefix

    tokenizer = models.load_tokenizer(str(TINY_BASE))
    rows = Scheduling("compact").rows("train", 0, 3, seed=0)
    format = FORMAT.model_copy(update={"system_prompt": ""})
    for ids, roles in prefix.prompts(tokenizer, format, rows):
        assert set(roles) == {"t", "u"} and len(ids) == len(roles)
