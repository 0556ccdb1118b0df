"""Where an artifact comes from, down to the bytes of the base model and the data, told truthfully when some of it is
gone."""

from __future__ import annotations

import hashlib
import json

import pytest

from pipeline.cli import exit_code
from pipeline.registry import Artifact, Registry, Source
from pipeline.registry.keys import digest_model, key_of
from pipeline.registry.lineage import lineage, mermaid
from tests.conftest import TINY_BASE, printed_json, run_cli, tensors


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


@pytest.fixture
def make(registry, tmp_path):
    """Publish an artifact made from others."""

    def make(name, *, identity=None, **inputs):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(tensors(name))
        identity = {"name": name, **(identity or {})}
        sources = {role: read(one) if isinstance(one, Artifact) else one for role, one in inputs.items()}
        draft = Artifact(
            id="",
            key=key_of(identity),
            kind="sft",
            stage=name,
            created="",
            outputs={"policy": "."},
            files=(),
            inputs=sources,
            format=None,
            config={},
            identity=identity,
            metrics={},
            provenance={},
        )
        return registry.publish(tmp_path / name, draft, "user").artifact

    return make


def read(artifact):
    return Source(id=artifact.id, output="policy", key=artifact.key, name=artifact.stage, digest=artifact.digest)


BASE = Source(id=None, output="policy", key=key_of({"hub": "org/model", "revision": "abc"}), name="hf://org/model@abc")


def clean(registry, artifact, reason="older than 24 h"):
    """What a clean-up leaves."""
    tombstone = {"artifact": artifact.model_dump(mode="json"), "at": "2026-11-22T10:00:00+00:00", "why": reason}
    registry.store.put_new(f"tombstones/{artifact.id}.json", tombstone)
    registry.store.append(f"keys/{artifact.key}", {"void": artifact.id, "reason": "cleaned"})
    registry.store.remove_tree(f"artifacts/{artifact.id}", "artifact.json")


def test_a_climb_goes_back_to_the_bytes_of_its_base_and_to_its_rows(climbed):
    recipe, registry = climbed
    ids = {one["step"]: one["artifact"] for one in printed_json("plan", recipe, "--registry", registry, "--json")}
    tree = printed_json("lineage", ids["rl2"], "--registry", registry, "--json")
    distill, rows = tree["inputs"]
    warmup, harvest = distill["inputs"]
    base, demonstrations = warmup["inputs"]
    assert [one["id"] for one in (tree, distill, warmup, harvest)] == [
        ids[name] for name in ("rl2", "distill", "warmup", "harvest")
    ]
    assert (base["kind"], base["key"], base["name"]) == ("base", digest_model(TINY_BASE), str(TINY_BASE))
    assert rows["name"] == "train[528:544] of scheduling version 2 form compact overlap remove reward_overlap strict"
    assert demonstrations["name"].startswith("train[0:512] of scheduling")
    rl1 = harvest["inputs"][0]
    assert rl1["inputs"][0]["note"] == "its inputs are shown above" and rl1["inputs"][0]["id"] == ids["warmup"]
    shown = run_cli("lineage", ids["rl2"], "--registry", registry).stdout
    assert f"base, digest {digest_model(TINY_BASE)[:12]}" in shown and "\x1b" not in shown


def test_rows_from_a_file_are_named_by_the_digest_of_its_bytes(registry, make, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    made = make("warmup", policy=BASE, data=Source(id=None, output="rows", key=digest, name=str(file)))
    base, data = lineage(registry, made).inputs
    assert (base.kind, base.name) == ("base", "hf://org/model@abc")
    assert (data.kind, data.key, data.name) == ("data", digest, str(file))


def test_a_problem_of_ones_own_is_shown_by_the_start_of_its_digest_and_told_by_all_of_it(registry, make, capsys):
    made = make("rl1", identity={"problem": {"file": "ab" * 32, "time_limit": 10.0}}, policy=BASE)
    assert exit_code(["lineage", made.id, "--registry", registry.url]) == 0
    shown = capsys.readouterr().out + mermaid(lineage(registry, made))
    assert shown.count("file abababab (problem") == 2 and "ab" * 32 not in shown
    assert lineage(registry, made).inputs[-1].name == f"file {'ab' * 32}"


def test_what_was_cleaned_is_shown_with_what_it_was_made_from(registry, make):
    first = make("warmup", policy=BASE)
    second = make("rl1", policy=first)
    third = make("rl2", policy=second)
    clean(registry, second)
    (gone,) = lineage(registry, third).inputs
    assert (gone.id, gone.kind, gone.whole) == (second.id, "sft", False)
    assert gone.note == "cleaned 2026-11-22: older than 24 h"
    assert (
        gone.inputs[0].id == first.id and gone.inputs[0].whole and gone.inputs[0].inputs[0].name == "hf://org/model@abc"
    )


def test_what_is_gone_without_a_trace_is_said(registry, make):
    first = make("warmup", policy=BASE)
    second = make("rl1", policy=first)
    registry.store.remove_tree(f"artifacts/{first.id}", "artifact.json")
    (gone,) = lineage(registry, second).inputs
    assert (gone.id, gone.kind, gone.whole, gone.note) == (first.id, "gone", False, "is gone")


def test_an_input_that_is_not_what_was_read_is_said(registry, make):
    first = make("warmup", policy=BASE)
    second = make("rl1", policy=read(first).model_copy(update={"digest": "0" * 64}))
    third = make("rl2", policy=read(first).model_copy(update={"key": "1" * 64}))
    (input,) = lineage(registry, second).inputs
    assert not input.whole and input.note == "has other files than those that were read"
    (input,) = lineage(registry, third).inputs
    assert not input.whole and input.note == "is another artifact than the one that was read"


def test_an_input_that_is_void_is_said(registry, make):
    first = make("warmup", policy=BASE)
    second = make("rl1", policy=first)
    registry.void(first, "failed verification")
    (input,) = lineage(registry, second).inputs
    assert not input.whole and input.note == "void: failed verification" and input.inputs


def test_an_input_whose_manifest_is_none_is_said(registry, make):
    first = make("warmup", policy=BASE)
    second = make("rl1", policy=first)
    (registry.path(first) / "artifact.json").write_text("[]")
    (input,) = lineage(registry, second).inputs
    assert not input.whole and input.note == "its manifest is not one"


def test_an_artifact_that_says_it_is_its_own_ancestor_ends(registry, make):
    first = make("warmup", policy=BASE)
    second = make("rl1", policy=first)
    path = registry.path(first) / "artifact.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "inputs": {"policy": read(second).model_dump()}}))
    tree = lineage(registry, second)
    assert tree.inputs[0].inputs[0].id == second.id and tree.inputs[0].inputs[0].inputs == ()


def test_a_very_long_climb_is_followed_so_far_and_then_says_so(registry, make, capsys):
    made = make("s0", policy=BASE)
    for i in range(1, 205):
        made = make(f"s{i}", policy=made)
    assert exit_code(["lineage", made.id, "--registry", registry.url]) == 0
    assert "its inputs are not followed" in capsys.readouterr().out
    assert exit_code(["lineage", made.id, "--json", "--registry", registry.url]) == 0


@pytest.mark.parametrize("tombstone", [[], {}, {"artifact": {}}, {"artifact": 1, "at": "", "reason": ""}, 1, "x"])
def test_a_tombstone_that_is_none_is_refused(tombstone, registry, make, capsys):
    first = make("warmup", policy=BASE)
    second = make("rl1", policy=first)
    registry.store.remove_tree(f"artifacts/{first.id}", "artifact.json")
    registry.store.put_new(f"tombstones/{first.id}.json", tombstone)
    assert exit_code(["lineage", second.id, "--registry", registry.url]) == 2
    said = capsys.readouterr().err
    assert (
        f"tombstones/{first.id}.json: " in said and "not written by switchback" in said and len(said.splitlines()) == 1
    )


def test_the_graph_has_each_artifact_once_and_an_arrow_for_each_input(registry, make, capsys):
    first = make("warmup", policy=BASE)
    second = make("rl1", policy=first)
    third = make("distill", policy=first, data=second)
    clean(registry, second)
    assert exit_code(["lineage", third.id, "--mermaid", "--registry", registry.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    nodes = {line.split("[")[0].strip(): line.split('"')[1].split(" ")[0] for line in lines if '["' in line}
    arrows = [line.split() for line in lines if "|" in line]
    assert lines[0] == "graph TD" and sorted(nodes.values()) == sorted(
        [first.id, second.id, third.id, "hf://org/model@abc"]
    )
    assert sorted((nodes[a], arrow, nodes[b]) for a, arrow, b in arrows) == sorted(
        [
            ("hf://org/model@abc", "-->|policy|", first.id),
            (first.id, "-->|policy|", second.id),
            (first.id, "-->|policy|", third.id),
            (second.id, "-.->|data|", third.id),
        ]
    )


def test_text_that_means_something_to_mermaid_is_not_taken_for_it(registry, make):
    made = make("warmup", policy=BASE.model_copy(update={"name": 'x"]; click n0 href "javascript:a" --> <b>|'}))
    lines = mermaid(lineage(registry, made)).splitlines()
    assert len(lines) == 4 and not any(mark in lines[2].split('["')[1][:-2] for mark in '"<>|')
