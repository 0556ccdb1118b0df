"""inspect and probe: questions whose answers are those of training, and that leave nothing behind."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from pipeline.registry import Registry
from stages.tokens import token_rows
from tests.conftest import ROOT, SWITCHBACK, environment, printed_json, run_cli


@pytest.fixture(scope="module")
def made(climbed):
    """(recipe, registry, stage -> artifact)"""
    recipe, registry = climbed
    ids = {one["step"]: one["artifact"] for one in printed_json("plan", recipe, "--registry", registry, "--json")}
    return recipe, registry, {step: Registry(registry).open(id) for step, id in ids.items()}


def test_inspect_shows_the_map_that_the_artifact_holds(made):
    recipe, registry, artifacts = made
    found = printed_json("inspect", recipe, "--stage", "warmup", "--row", "0", "--registry", registry, "--json")
    kept = json.loads((registry / "artifacts" / artifacts["warmup"].id / "loss_map.json").read_text())
    assert list(found) == ["tokens"] and found["tokens"] == kept["tokens"]
    assert set(found["tokens"][0]) == {"text", "id", "role", "weight", "share"}
    assert sum(token["share"] for token in found["tokens"]) == pytest.approx(1.0)
    assert {(token["role"], token["weight"]) for token in found["tokens"][1:]} == {
        ("template", 0.1), ("user", 0.1), ("prefix", 1.0), ("completion", 1.0)
    }  # fmt: skip


def test_inspect_shows_what_was_sampled_where_that_is_what_is_trained(made):
    recipe, registry, artifacts = made
    rows = token_rows.read(registry / "artifacts" / artifacts["harvest"].id / "data")
    found = printed_json("inspect", recipe, "--stage", "distill", "--row", "1", "--registry", registry, "--json")
    assert [token["id"] for token in found["tokens"]] == rows[1].ids


def test_inspect_is_plain_when_piped_and_coloured_on_a_terminal(made):
    recipe, registry, _ = made
    arguments = ["inspect", str(recipe), "--stage", "warmup", "--registry", str(registry)]
    piped = run_cli(*arguments).stdout
    assert "\x1b" not in piped and "R_g 1.1" in piped and "prompt tokens carry" in piped
    for variables, coloured in (
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
    ):
        shown = on_a_terminal(arguments, variables)
        assert "<schedule>" in shown and ("\x1b[" in shown and "48;5;" in shown) == coloured


def on_a_terminal(arguments, variables):
    master, slave = pty.openpty()
    kept = {name: value for name, value in environment().items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [str(SWITCHBACK), *arguments], cwd=ROOT, env={**kept, **variables}, stdout=slave, stderr=slave
    )
    os.close(slave)
    said = b""
    try:
        while part := os.read(master, 65536):
            said += part
    except OSError:
        pass  # the other end is closed
    assert process.wait() == 0
    os.close(master)
    return said.decode()


def test_the_probe_gives_a_line_for_each_policy_prompt_and_prefix(made):
    recipe, registry, artifacts = made
    arguments = [
        "--prompt",
        "plain",
        "--prompt",
        "sorted",
        "--prefix",
        "",
        "--prefix",
        r"<think>\n",
        "--rows",
        "8",
        "--samples",
        "2",
    ]
    after = artifacts["rl1"].id
    lines = printed_json("probe", recipe, *arguments, "--after", after, "--registry", registry, "--json")["lines"]
    assert [(line["policy"], line["prompt"], line["response_prefix"]) for line in lines] == [
        (policy, prompt, start)
        for policy in ("base", after)
        for prompt in ("plain", "sorted")
        for start in ("", "<think>\n")
    ]
    by = {(line["policy"], line["prompt"], line["response_prefix"]): line for line in lines}
    for line in lines:
        assert (line["follow"] is None) == (line["prompt"] == "plain")
        assert line["given"].endswith("<|im_start|>assistant\n" + line["response_prefix"])
        assert line["answered"].startswith(line["response_prefix"])
    assert by["base", "sorted", ""]["follow"] > 0.6, "the base was pre-trained to do this"
    assert by[after, "sorted", ""]["follow"] < 0.3, "and training washed it out"


def test_the_probe_dresses_text_as_training_does(made):
    """The digest is the one of the policy's own Format; the text is what rejection sampling gave the policy."""
    recipe, registry, artifacts = made
    (line,) = printed_json("probe", recipe, "--rows", "4", "--samples", "1", "--registry", registry, "--json")["lines"]
    evaluation = registry / "artifacts" / artifacts["rl1.evaluate"].id / "validation.json"
    assert line["format_digest"] == json.loads(evaluation.read_text())["format_digest"]
    first = json.loads((evaluation.parent / "validation.jsonl").read_text().splitlines()[0])
    assert line["given"] == f"<|im_start|>user\n{first['prompt']}<|im_end|>\n<|im_start|>assistant\n<think>\n"


def test_the_probe_on_a_policy_is_its_evaluation(made):
    """The same rows, decoded as the recipe says, with another seed at most: pass rates agree."""
    recipe, registry, artifacts = made
    policy = artifacts["rl2"].id
    (line,) = printed_json(
        "probe", recipe, "--policy", policy, "--rows", "4", "--samples", "2", "--registry", registry, "--json"
    )["lines"]
    evaluation = json.loads((registry / "artifacts" / artifacts["rl2.evaluate"].id / "validation.json").read_text())
    assert line["policy"] == policy
    assert line["pass_rate"] == pytest.approx(evaluation["pass_at_k"]["1"]) and line["format"] == pytest.approx(
        evaluation["format"]
    )


def test_a_table_for_people(made):
    recipe, registry, _ = made
    done = run_cli("probe", recipe, "--prompt", "sorted", "--prefix", "", "--rows", "4", "--registry", registry)
    assert (
        done.returncode == 0
        and "follows" in done.stdout
        and "sorted, format" in done.stdout
        and "Sorted:<|im_end|>" in done.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "--stage", "rl1"], "rl1 is of kind grpo; inspect shows what an sft stage trains on"),
        (["inspect", "--stage", "nosuch"], "no stage is named nosuch; the sft stages are warmup, distill"),
        (["inspect", "--stage", "warmup", "--row", "512"], "has 512 rows, so there is no row 512"),
        (["probe", "--prompt", "nosuch"], "--prompt: no prompt named 'nosuch'"),
        (["probe", "--prefix", "\\"], "ends in the middle of an escape"),
        (["probe", "--policy", "nosuch"], "there is no artifact nosuch"),
        (["probe", "--prefix", "<dächte>"], "comes back from the tokenizer"),
    ],
)
def test_a_question_that_has_no_answer_is_one_line(arguments, said, made):
    recipe, registry, _ = made
    command, *rest = arguments
    done = run_cli(command, recipe, *rest, "--registry", registry)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_data_that_are_not_made_yet_cannot_be_inspected(made, tmp_path):
    done = run_cli("inspect", made[0], "--stage", "distill", "--registry", tmp_path / "empty")
    assert done.returncode == 2 and "trains on harvest, which has not been made yet" in done.stderr


def test_a_question_leaves_nothing_behind(made, tmp_path):
    run_cli("inspect", made[0], "--stage", "warmup", "--registry", tmp_path / "none", env={"TMPDIR": str(tmp_path)})
    assert [path for path in Path(tmp_path).iterdir() if not path.name.startswith("torchinductor")] == []
