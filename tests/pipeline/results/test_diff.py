"""Two artifacts side by side: what was asked, what came of it, and where their answers part."""

from __future__ import annotations

import json
import shutil

import pytest

from pipeline.cli import exit_code
from tests.conftest import printed_json, run_cli


@pytest.fixture(scope="module")
def made(climbed, tmp_path_factory):
    """(registry, step -> id) of a copy of the climb, with a second harvest and an evaluation with more samples in
    it."""
    recipe, source = climbed
    registry = tmp_path_factory.mktemp("diff") / "registry"
    shutil.copytree(source, registry, ignore=shutil.ignore_patterns("work"))
    ids = {one["step"]: one["artifact"] for one in printed_json("plan", recipe, "--registry", registry, "--json")}
    other = ["--set", "stages.harvest.replicate=7", "--set", "stages.harvest.temperature=1.5"]
    assert run_cli("run", recipe, "--registry", registry, "--no-prefect", "--only", "harvest", *other).returncode == 0
    again = printed_json("plan", recipe, "--registry", registry, "--json", *other)
    return registry, {**ids, "harvest 2": next(one["artifact"] for one in again if one["step"] == "harvest")}


def test_only_what_was_asked_differently_is_listed(made):
    registry, ids = made
    found = printed_json("diff", ids["rl1"], ids["rl2"], "--registry", registry, "--json")
    assert found["ids"] == [ids["rl1"], ids["rl2"]]
    assert set(found["asked"]) == {"inputs.policy.key", "rows.start", "rows.stop"}
    assert found["asked"]["rows.start"] == [512, 528] and found["execution"] == {} and found["format"] == {}
    assert found["metrics"]["steps"] == [2.0, 2.0]


def test_an_artifact_does_not_differ_from_itself(made):
    registry, ids = made
    found = printed_json("diff", ids["rl1"], ids["rl1"], "--registry", registry, "--json")
    assert found["asked"] == found["execution"] == found["format"] == {} and found["samples"] == []
    assert (
        "no validation row has another greedy score"
        in run_cli("diff", ids["rl1"], ids["rl1"], "--registry", registry).stdout
    )


def test_policies_are_shown_with_the_scores_of_both_evaluations(made):
    registry, ids = made
    found = printed_json("diff", ids["warmup"], ids["rl2"], "--registry", registry, "--json")
    for split in ("validation", "held_out"):
        for i, step in enumerate(("warmup", "rl2")):
            kept = json.loads((registry / "artifacts" / ids[f"{step}.evaluate"] / f"{split}.json").read_text())
            assert found["scores"][split][i] == kept
    assert found["comparable"]


def test_samples_are_the_first_validation_rows_whose_greedy_score_differs(made):
    registry, ids = made
    for a, b in (("base", "rl1"), ("warmup", "rl2"), ("rl1", "rl2")):
        found = printed_json("diff", ids[f"{a}.evaluate"], ids[f"{b}.evaluate"], "--registry", registry, "--json")
        rows = [
            [
                json.loads(line)
                for line in (registry / "artifacts" / ids[f"{one}.evaluate"] / "validation.jsonl")
                .read_text()
                .splitlines()
            ]
            for one in (a, b)
        ]
        expected = [
            {
                "row": one["row"],
                "scores": [one["greedy"]["score"], two["greedy"]["score"]],
                "answers": [[one["greedy"]["text"]], [two["greedy"]["text"]]],
            }
            for one, two in zip(*rows, strict=True)
            if one["greedy"]["score"] != two["greedy"]["score"]
        ][:3]
        assert found["samples"] == expected
    assert expected, "the last pair differs somewhere, or this test sees nothing"


def test_two_harvests_are_compared_by_what_they_kept(made):
    registry, ids = made
    found = printed_json("diff", ids["harvest"], ids["harvest 2"], "--registry", registry, "--json")
    assert (
        found["asked"]["config.temperature"] == [1.0, 1.5]
        and found["asked"]["replicate"] == [0, 7]
        and found["scores"] == {}
    )
    lines = [
        json.loads(line)
        for line in (registry / "artifacts" / ids["harvest 2"] / "rollouts" / "rollouts.jsonl").read_text().splitlines()
    ]
    assert 0 < len(found["samples"]) <= 3
    for sample in found["samples"]:
        kept = [line["text"] for line in lines if line["row"] == sample["row"] and line["kept"]]
        assert sample["answers"][1] == kept != sample["answers"][0]


def test_a_policy_beside_what_is_no_policy_has_its_scores_alone(made):
    registry, ids = made
    found = printed_json("diff", ids["rl1"], ids["harvest"], "--registry", registry, "--json")
    assert found["scores"]["validation"][0] and found["scores"]["validation"][1] is None
    assert not found["comparable"] and found["samples"] == [] and found["asked"]["kind"] == ["grpo", "rejection"]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("rl1", "rl2"),
        ("warmup", "rl1"),
        ("harvest", "harvest 2"),
        ("rl1.evaluate", "harvest"),
        ("base.evaluate", "rl2.evaluate"),
    ],
)
def test_it_can_be_read_in_80_columns_and_piped(a, b, made):
    registry, ids = made
    done = run_cli("diff", ids[a], ids[b], "--registry", registry)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"A: {ids[a]}", f"B: {ids[b]}"] and "what was asked:" in lines
    assert max(map(len, lines)) <= 80 and all(line.isprintable() for line in lines)


def test_an_answer_cannot_move_the_cursor_of_a_terminal(made, tmp_path, capsys):
    registry, ids = made
    path = registry / "artifacts" / ids["rl2.evaluate"] / "validation.jsonl"
    before = path.read_text()
    lines = [json.loads(line) for line in before.splitlines()]
    for line in lines:
        line["greedy"] = {"text": "\x1b[2J\x07" + line["greedy"]["text"], "score": 1.0, "outcome": "valid"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        assert exit_code(["diff", ids["rl1"], ids["rl2"], "--registry", str(registry)]) == 0
    finally:
        path.write_text(before)
    said = capsys.readouterr().out
    assert r"\x1b[2J" in said and "\x1b" not in said and "\x07" not in said


@pytest.mark.parametrize("content", ["{", "[]\n", '{"row": 1}\n', "9" * 5000 + "\n", "[" * 100_000])
def test_rows_that_are_no_longer_what_was_published_are_one_line(content, made, capsys):
    registry, ids = made
    path = registry / "artifacts" / ids["rl2.evaluate"] / "validation.jsonl"
    before = path.read_text()
    path.write_text(content)
    try:
        assert exit_code(["diff", ids["rl1"], ids["rl2"], "--registry", str(registry)]) == 2
    finally:
        path.write_text(before)
    said = capsys.readouterr().err
    assert (
        f"{ids['rl2.evaluate']} is no longer what was published; run switchback verify" in said
        and len(said.splitlines()) == 1
    )
