"""Training rows that ask what policies are evaluated on: counted in every kind of data, refused above 5 %, and left out
where the recipe says so."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace

import pytest

from stages.data import overlap, sources
from stages.data.mix import Mix
from stages.errors import BadInput
from stages.grpo import GrpoConfig
from stages.inspections.preflight import look_at
from stages.job import Evaluated, RowRange
from stages.policy import models
from stages.problems.arithmetic import Arithmetic
from stages.sft import SftConfig, row_metrics
from stages.tokens import prefix, token_rows
from stages.tokens.token_rows import TokenRow
from tests.conftest import run_cli
from tests.models import make_tokenizer, save
from tests.pipeline.plan.test_identity import keys
from tests.stages.inspections.test_preflight import GRPO, SFT, job, rules

PROBLEM = Arithmetic()
HELD_OUT, VALIDATION, TRAIN = (PROBLEM.rows(split, 0, 60, 0) for split in ("held_out", "validation", "train"))
RANGES = (
    RowRange(split="validation", start=0, stop=20, seed=0),
    RowRange(split="held_out", start=0, stop=40, seed=0),
)
EVALUATED = Evaluated(problem={"name": "arithmetic"}, ranges=RANGES)
TEMPLATE = "Work it out: {{ prompt }}"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save(tmp_path_factory.mktemp("policy"))


def looked_at(policy, config, tmp_path, evaluated=EVALUATED, **inputs):
    """A preflight's job of a stage whose policy is evaluated on arithmetic, with a user template around prompts."""
    one = job(policy, config, tmp_path, "", data=inputs.pop("data", None))
    return one.model_copy(
        update={
            "evaluated": evaluated,
            "format": one.format.model_copy(update={"user_template": TEMPLATE}),
            "inputs": {**one.inputs, **{role: str(path) for role, path in inputs.items()}},
        }
    )


def file_of(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


SHAPES = {
    "a prompt of plain text": lambda text: {"prompt": text, "completion": "1"},
    "other white space": lambda text: {"prompt": f" {text.replace(' ', chr(10))} ", "completion": "1"},
    "messages with the prompt itself": lambda text: {"messages": turns(text, "1")},
    "messages as the Format makes them": lambda text: {"messages": turns(f"Work it out: {text}", "1")},
    "the last question of several": lambda text: {"messages": turns("Hello", "Hi", text, "1")},
    "an earlier question of several": lambda text: {"messages": turns(text, "1", "Thanks", "Welcome")},
    "prompt and completion of messages": lambda text: {"prompt": turns(text), "completion": turns("", "1")[1:]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_a_file_that_ask_what_is_evaluated_are_counted_in_every_shape(shape, policy, tmp_path):
    """Two of 40 held-out rows are 5 %, a third is more. Rows beyond those that are evaluated do not count."""
    for held_out, severity in ((2, "warn"), (3, "stop")):
        asked = [*HELD_OUT[:held_out], HELD_OUT[50], VALIDATION[7], VALIDATION[30], *TRAIN[:20]]
        data = file_of(tmp_path / "chat.jsonl", [SHAPES[shape](row.prompt) for row in asked])
        (found,) = look_at(looked_at(policy, {**SFT, "data": str(data)}, tmp_path, data=data))
        assert (found.rule, found.severity) == ("trains_on_evaluated_rows", severity)
        assert found.evidence == {"validation": 1, "held_out": held_out, "share": max(0.05, held_out / 40)}
        assert f"chat.jsonl asks 1 of the 20 validation and {held_out} of the 40 held_out rows" in found.advice
        assert repr(VALIDATION[7].prompt) in found.advice or repr(HELD_OUT[0].prompt) in found.advice
        assert found.override == "stages.sft.drop_overlap=true"


def test_a_question_that_is_only_given_and_not_answered_is_not_counted(policy, tmp_path):
    """In a prompt of messages the earlier answers are not trained."""
    given = [*turns(HELD_OUT[0].prompt, "1"), {"role": "user", "content": "And 1 + 1?"}]
    data = file_of(tmp_path / "chat.jsonl", [{"prompt": given, "completion": turns("", "2")[1:]}])
    assert look_at(looked_at(policy, SFT, tmp_path, data=data)) == []


def test_sampled_rows_are_compared_by_their_ids(policy, tmp_path):
    """A harvest has no text of its prompts."""
    tokenizer = models.load_tokenizer(str(policy))
    one = looked_at(policy, {**SFT, "data": "harvest"}, tmp_path, data=tmp_path / "data")
    rows = [*HELD_OUT[:4], *TRAIN[:30]]
    made = [
        TokenRow(row.id, [*ids, *tokenizer("7")["input_ids"]], roles + "c")
        for row, (ids, roles) in zip(rows, prefix.prompts(tokenizer, one.format, rows), strict=True)
    ]
    token_rows.write(tmp_path / "data", made, prefix.card(tokenizer, prefix.seen_format(one.format, tokenizer)))
    (found,) = look_at(one)
    assert found.evidence == {"validation": 0, "held_out": 4, "share": 0.1}
    assert found.advice.startswith("harvest asks 4 of the 40 held_out rows")
    dropped = sources.load(one, one.format, tokenizer, None, drop_overlap=True)
    assert [row.row for row in dropped.own] == [row.id for row in TRAIN[:30]] and dropped.dropped == 4


def test_demonstrations_of_train_rows_ask_nothing_that_is_evaluated(policy, tmp_path):
    one = looked_at(policy, SFT, tmp_path)
    one = one.model_copy(update={"problem": {"name": "arithmetic"}, "rows": one.rows})
    assert rules(look_at(one)) == []
    shifted = EVALUATED.model_copy(update={"ranges": (one.rows,)})
    (found,) = look_at(one.model_copy(update={"evaluated": shifted}))
    assert found.evidence == {"train": 50, "share": 1.0} and found.advice.startswith("data asks 50 of the 50 train")


def general(path, leaked):
    """80 lines, of which some ask held-out rows."""
    lines = [{"prompt": f"What is the {i}th word?", "completion": "It is that one."} for i in range(80 - leaked)]
    return file_of(path, [*lines, *({"prompt": row.prompt, "completion": "1"} for row in HELD_OUT[:leaked])])


def test_general_rows_are_counted_where_they_are_drawn(policy, tmp_path):
    path = general(tmp_path / "general.jsonl", 40)
    data = file_of(tmp_path / "chat.jsonl", [{"prompt": row.prompt, "completion": "1"} for row in TRAIN[:60]])
    mix = {"data": str(path), "share": 0.25}
    one = looked_at(policy, {**SFT, "mix": mix}, tmp_path, data=data, mix=path)
    drawn = sources.load(one, one.format, make_tokenizer(), Mix.model_validate(mix)).general
    leaked = sum(int(row.row.removeprefix("mix:")) > 40 for row in drawn)
    (found,) = look_at(one)
    assert 0 < leaked < 20 == len(drawn) and found.evidence["held_out"] == leaked
    assert found.advice.startswith(f"general.jsonl asks {leaked} of the 40 held_out rows")
    both = file_of(tmp_path / "chat.jsonl", [{"prompt": row.prompt, "completion": "1"} for row in HELD_OUT[:60]])
    (found,) = look_at(looked_at(policy, {**SFT, "mix": mix}, tmp_path, data=both, mix=path))
    assert found.advice.startswith("data and general.jsonl ask") and found.evidence["held_out"] == 40


def test_what_is_dropped_leaves_what_a_file_without_it_would_give(policy, tmp_path):
    """Own rows and general ones, the draw included."""
    tokenizer = make_tokenizer()
    rows = [row for pair in zip(TRAIN[:30], HELD_OUT[:30], strict=True) for row in pair]
    mix = general(tmp_path / "general.jsonl", 25)
    data = file_of(tmp_path / "chat.jsonl", [{"prompt": row.prompt, "completion": "1"} for row in rows])
    config = {**SFT, "mix": {"data": str(mix), "share": 0.25}, "drop_overlap": True}
    one = looked_at(policy, config, tmp_path, data=data, mix=mix)
    found = sources.load(one, one.format, tokenizer, Mix(data=str(mix), share=0.25), drop_overlap=True)
    assert look_at(one) == [], "nothing is left to warn of"

    clean = file_of(tmp_path / "clean.jsonl", [{"prompt": row.prompt, "completion": "1"} for row in TRAIN[:30]])
    clean_mix = file_of(tmp_path / "clean_mix.jsonl", [json.loads(line) for line in mix.read_text().splitlines()[:55]])
    by_hand = looked_at(policy, SFT, tmp_path, data=clean, mix=clean_mix)
    wanted = sources.load(by_hand, by_hand.format, tokenizer, Mix(data=str(clean_mix), share=0.25))
    assert [row.ids for row in found.own] == [row.ids for row in wanted.own]
    assert [replace(row, questions=()) for row in found.general] == [
        replace(row, questions=()) for row in wanted.general
    ]
    assert found.dropped == 30 + 25 and wanted.dropped == 0


def test_data_of_which_nothing_is_left_is_refused(policy, tmp_path):
    data = file_of(tmp_path / "chat.jsonl", [{"prompt": row.prompt, "completion": "1"} for row in HELD_OUT[:5]])
    with pytest.raises(BadInput, match="each of its 5 rows asks what is evaluated"):
        look_at(looked_at(policy, {**SFT, "drop_overlap": True}, tmp_path, data=data))


def test_the_mix_of_a_grpo_stage_is_counted_and_dropped_too(policy, tmp_path):
    path = general(tmp_path / "general.jsonl", 60)
    mix = {"data": str(path), "share": 0.5}
    config = {**GRPO, "steps": 4, "prompts_per_step": 5, "mix": mix, "warmup_steps": 0.0}
    (found,) = look_at(looked_at(policy, config, tmp_path, mix=path))
    assert found.severity == "stop" and found.advice.startswith("general.jsonl asks")
    assert look_at(looked_at(policy, {**config, "drop_overlap": True}, tmp_path, mix=path)) == []
    one = looked_at(policy, config, tmp_path, mix=path)
    left = sources.general_of_steps(one, one.format, make_tokenizer(), 5, 4, drop_overlap=True)
    drawn = {int(row.row.removeprefix("mix:")) for row in left}
    assert len(drawn) == 20 and not drawn & {*range(21, 61)}, "lines 21 to 60 ask the 40 evaluated rows"
    with pytest.raises(ValueError, match="drop_overlap has no effect without mix"):
        GrpoConfig.model_validate({**config, "name": "rl", "policy": "base", "mix": None, "drop_overlap": True})


def test_check_ends_with_3_where_a_file_of_conversations_holds_the_held_out_questions(policy, write, tmp_path):
    """A file that was made of a dataset's rows without a look at their splits, and the way out that the line names."""
    lines = [{"prompt": f"What is {i} + {i * 7}?", "answer": str(8 * i)} for i in range(120)]
    (tmp_path / "r.py").write_text("def one(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    file_of(tmp_path / "rows.jsonl", lines)
    data = file_of(tmp_path / "chat.jsonl", [{"prompt": r["prompt"], "completion": r["answer"]} for r in lines[:80]])
    recipe = write(
        {
            "name": "leaks",
            "model": {"path": str(policy), "dtype": "float32"},
            "problem": {"dataset": str(tmp_path / "rows.jsonl"), "rewards": [f"{tmp_path / 'r.py'}:one"]},
            "format": {"prompt": "plain", "response_prefix": ""},
            "evaluate": {"rows": 20, "samples": 1, "max_completion_length": 4},
            "validation": {"rows": 20},
            "stages": [{"name": "warmup", "kind": "sft", "policy": "base", "data": str(data)}],
        }
    )
    refused = run_cli("check", recipe, "--registry", tmp_path / "r")
    assert refused.returncode == 3 and len(refused.stderr.splitlines()) == 1, refused
    assert "switchback: warmup: chat.jsonl asks " in refused.stderr
    assert refused.stderr.endswith("leave them out (--set stages.warmup.drop_overlap=true)\n")


def test_how_many_rows_were_left_out_is_a_metric():
    rows = sources.Rows([TokenRow("1", [1, 2], "uc")], [], dropped=7)
    assert row_metrics(rows, SftConfig(name="a", policy="base").weights)["overlap_dropped"] == 7
    assert "overlap_dropped" not in row_metrics(rows._replace(dropped=0), SftConfig(name="a", policy="base").weights)


def test_a_row_asks_the_turn_before_each_of_its_answers():
    """Against the definition, turn by turn, for random conversations."""
    rng = random.Random(0)
    for _ in range(200):
        who = [rng.choice(["user", "assistant", "system"]) for _ in range(rng.randint(1, 9))]
        said = [{"role": role, "content": str(i)} for i, role in enumerate(who)]
        given = rng.randrange(len(said) + 1)
        wanted = []
        for i, turn in enumerate(said):
            before = [other["content"] for other in said[:i] if other["role"] == "user"]
            if turn["role"] == "assistant" and i >= given and before and before[-1] not in wanted:
                wanted.append(before[-1])
        assert list(overlap.of_turns(said, given)) == wanted


def test_a_key_knows_what_is_evaluated_exactly_where_rows_are_dropped(settings, tmp_path):
    before = keys(settings, tmp_path)
    off = copy.deepcopy(settings)
    off["stages"][0]["drop_overlap"] = False
    assert keys(off, tmp_path) == before
    dropping = copy.deepcopy(settings)
    dropping["stages"][0]["drop_overlap"] = True
    on = keys(dropping, tmp_path)
    assert on[0] == before[0] and not set(on[1:]) & set(before[1:])
    for part in ("evaluate", "validation"):
        other = copy.deepcopy(dropping)
        other[part]["rows"] += 1
        assert keys(other, tmp_path)[1] != on[1], part
        plain = copy.deepcopy(settings)
        plain[part]["rows"] += 1
        assert keys(plain, tmp_path)[1] == before[1]
