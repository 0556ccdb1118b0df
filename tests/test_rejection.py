"""The rejection stage: its dataset, where each row comes from, its control, and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset

from pipeline.registry import Registry
from stages import tokens
from tests.conftest import LEARNED, run_cli, stage


def newest(registry: Registry, name: str):
    return max((one for one in registry.artifacts() if one.stage == name), key=lambda one: one.created)


def lines_of(registry: Registry, artifact) -> list[dict]:
    return [
        json.loads(line) for line in (registry.path(artifact, "rollouts") / "rollouts.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def harvested(climbed, tmp_path_factory) -> tuple[Path, Registry]:
    """The tiny climb once more, from its rl1, with a control and a policy distilled on that."""
    import copy
    import shutil

    import yaml

    directory = tmp_path_factory.mktemp("harvested")
    shutil.copytree(climbed[1], directory / "registry")
    settings = copy.deepcopy(LEARNED)
    stage(settings, "harvest").update(control="random", keep={"min_score": 0.3, "per_prompt": 2, "dedup": "normalised"})
    distill = {**stage(settings, "distill"), "name": "distill-control", "data": "harvest:control"}
    settings["stages"] = [*settings["stages"][:3], distill]
    (directory / "recipe.yaml").write_text(yaml.safe_dump(settings))
    done = run_cli("run", directory / "recipe.yaml", "--registry", directory / "registry", "--no-prefect")
    assert done.returncode == 0, done.stderr
    return directory / "recipe.yaml", Registry(directory / "registry")


def test_the_dataset_is_read_by_datasets_and_says_where_each_row_comes_from(harvested, tmp_path):
    _, registry = harvested
    artifact, policy = newest(registry, "harvest"), newest(registry, "rl1")
    place = registry.path(artifact, "data")
    rows = load_dataset(str(place), split="train", cache_dir=str(tmp_path))
    said = {(line["row"], line["sample"]): line for line in lines_of(registry, artifact) if line["kept"]}
    assert len(rows) == len(said) == artifact.metrics["kept"] > 0
    for row in rows:
        line = said[row["row"], row["sample"]]
        assert row["ids"][row["roles"].index("p") :] == line["ids"] and len(row["ids"]) == len(row["roles"])
        assert (row["text"], row["score"], row["outcome"]) == (line["text"], line["score"], line["outcome"])
        assert {name: row[f"reward_{name}"] for name in line["rewards"]} == line["rewards"]
        weights = {"format": 0.1, "sorted": 0.2, "score": 0.7}
        assert row["reward"] == pytest.approx(sum(weights[name] * line["rewards"][name] for name in weights))
        told = (row["policy"], row["prefix"], row["temperature"], row["seed"], row["step"])
        assert told == (policy.id, "<think>\n", 1.0, 0, None)
        assert row["rule"] in ("best 1 of 1", "best 1 of 2", "best 2 of 2") and row["rule"][5] == str(row["rank"])


def test_the_funnel_on_the_card_and_in_the_metrics_is_that_of_the_rollouts(harvested):
    _, registry = harvested
    artifact = newest(registry, "harvest")
    lines = lines_of(registry, artifact)
    funnel = tokens.read_card(registry.path(artifact, "data"))["funnel"]
    dropped = Counter(line["dropped_by"] for line in lines)
    left = len(lines)
    assert funnel["sampled"] == left
    for rule in (
        "judged",
        "pass_rate",
        "finished",
        "min_score",
        "min_reward",
        "max_length",
        "dedup",
        "max_similarity",
        "per_prompt",
    ):
        left -= dropped[rule]
        assert funnel[rule] == left == artifact.metrics[f"funnel/{rule}"]
    assert funnel["kept"] == left == sum(line["kept"] for line in lines)
    assert f"| min_score | {funnel['min_score']} |" in (registry.path(artifact, "data") / "README.md").read_text()


def test_the_control_has_as_many_rollouts_of_each_row_whatever_they_scored(harvested):
    _, registry = harvested
    artifact = newest(registry, "harvest")
    kept, drawn = (tokens.read(registry.path(artifact, output)) for output in ("data", "control"))
    assert Counter(row.row for row in kept) == Counter(row.row for row in drawn)
    lines = {(line["row"], line["sample"]): line for line in lines_of(registry, artifact)}
    mine = [lines[row.row, row.provenance["sample"]] for row in drawn]
    assert all(line["finished"] for line in mine) and len({(line["row"], line["sample"]) for line in mine}) == len(mine)
    assert {row.provenance["rule"] for row in drawn} == {"random"}
    assert sum(line["score"] for line in mine) < sum(row.provenance["score"] for row in kept)
    assert tokens.read_card(registry.path(artifact, "control"))["control"] == "random"


def test_a_stage_trains_on_the_control_by_its_name(harvested):
    _, registry = harvested
    harvest, trained = newest(registry, "harvest"), newest(registry, "distill-control")
    assert (trained.inputs["data"].id, trained.inputs["data"].output) == (harvest.id, "control")
    assert trained.metrics["rows"] == harvest.metrics["kept"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"distill": {"data": "harvest:control"}}, "stages.distill.data: there is no harvest:control; a rejection stage with control: random makes one"),
        ({"distill": {"data": "harvest:rollouts"}}, "stages.distill.data: found harvest:rollouts, but a stage trains on harvest or harvest:control"),
        ({"harvest": {"control": "best"}}, "stages.harvest.control: found 'best'"),
        ({"harvest": {"source": "both", "policy": "warmup", "rows": "train[0:9]"}}, "its policy warmup is no grpo stage"),
        ({"harvest": {"source": "both", "format": {"response_prefix": ""}}}, "dressed in its own Format; remove format"),
        ({"harvest": {"source": "training"}}, "samples has no effect with source: training"),
        ({"harvest": {"source": "both", "training_steps": [3, 4]}}, "stages.harvest.training_steps: found [3, 4], but rl1 has 2 steps"),
        ({"harvest": {"training_steps": [1, 2]}}, "training_steps belongs to source: training or both"),
        ({"harvest": {"source": "both", "training_steps": [3, 2]}}, "training_steps: found [3, 2]"),
        ({"harvest": {"keep": {"pass_rate": [0.9, 0.1]}}}, "pass_rate: found [0.9, 0.1]"),
        ({"harvest": {"keep": {"dedup": "semantic"}}}, "stages.harvest.keep.dedup: found 'semantic'"),
    ],
)  # fmt: skip
def test_what_cannot_be_harvested_is_one_line(change, said, settings, write):
    for name, fields in change.items():
        stage(settings, name).update(fields)
    done = run_cli("check", write(settings))
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.fixture(scope="module")
def reused(harvested, tmp_path_factory) -> tuple[Registry, dict]:
    """The rollouts of rl1's training harvested, alone, the last step's only, and pooled with fresh ones."""
    import copy

    import yaml

    directory = tmp_path_factory.mktemp("reused")
    settings = copy.deepcopy(LEARNED)
    mine = {"kind": "rejection", "policy": "rl1", "keep": {"min_score": 0.0, "per_prompt": 9}}
    fresh = {"samples": 2, "max_completion_length": 36}
    settings["stages"] = [
        *settings["stages"][:2],
        {**mine, "name": "logged", "source": "training"},
        {**mine, "name": "last", "source": "training", "training_steps": [2, 2]},
        {**mine, **fresh, "name": "pooled", "source": "both", "control": "random"},
        {**stage(LEARNED, "distill"), "name": "relearnt", "data": "pooled"},
    ]  # fmt: skip
    (directory / "recipe.yaml").write_text(yaml.safe_dump(settings))
    registry = harvested[1]
    done = run_cli("run", directory / "recipe.yaml", "--registry", registry.store.root, "--no-prefect")
    assert done.returncode == 0, done.stderr
    return registry, {name: newest(registry, name) for name in ("rl1", "logged", "last", "pooled", "relearnt")}


def test_what_training_sampled_is_harvested_as_it_was_sampled(reused):
    registry, made = reused
    log = [
        json.loads(line)
        for line in (registry.path(made["rl1"], "rollouts") / "rollouts.jsonl").read_text().splitlines()
    ]
    by_place = {(line["row"], line["step"], line["sample"]): line for line in log}
    rows = tokens.read(registry.path(made["logged"], "data"))
    assert made["logged"].metrics["rollouts"] == len(log) == 16 and len(rows) > 0
    sampling = tokens.read_card(registry.path(made["logged"], "data"))["sampling"]
    assert sampling["fresh"] is None and sampling["training"]["policy"] == made["rl1"].id
    assert made["logged"].metrics["kept_from_training"] == made["logged"].metrics["kept"] == len(rows)
    fresh = tokens.read(registry.path(newest(registry, "harvest"), "data"))
    prompts = {row.row: row.ids[: row.roles.index("p")] for row in fresh}
    for row in rows:
        told, start = row.provenance, row.roles.index("p")
        assert row.ids[start:] == by_place[row.row, told["step"], told["sample"]]["ids"]
        assert row.ids[:start] == prompts.get(row.row, row.ids[:start]), "dressed as for any other stage"
        assert (told["policy"], told["temperature"], told["max_completion_length"]) == (made["rl1"].id, 1.0, 36)


def test_only_the_steps_that_were_asked_for_are_taken(reused):
    registry, made = reused
    assert {line["step"] for line in lines_of(registry, made["last"])} == {2}
    assert made["last"].metrics["rollouts"] == 8


def test_fresh_and_logged_rollouts_are_pooled_and_each_says_which_it_is(reused):
    registry, made = reused
    pooled, logged = lines_of(registry, made["pooled"]), lines_of(registry, made["logged"])
    assert len(pooled) == 16 * 2 + len(logged)
    assert Counter(line["step"] for line in pooled) == {None: 32, 1: 8, 2: 8}
    kept = tokens.read(registry.path(made["pooled"], "data"))
    assert made["pooled"].metrics["kept_from_training"] == sum(row.provenance["step"] is not None for row in kept) > 0
    policies = {row.provenance["step"] is None: row.provenance["policy"] for row in kept}
    assert policies == {True: made["rl1"].id, False: made["rl1"].id}
    assert made["relearnt"].metrics["rows"] == len(kept)


def test_harvesting_a_log_samples_nothing(reused):
    registry, made = reused
    sampled = {name: (registry.path(made[name]) / "metrics.jsonl").exists() for name in ("logged", "pooled")}
    assert sampled == {"logged": False, "pooled": True}


def test_rows_that_training_never_met_are_refused(reused, write):
    import copy

    settings = copy.deepcopy(LEARNED)
    asked = {"name": "nowhere", "kind": "rejection", "policy": "rl1", "source": "training", "rows": "train[900:902]"}
    settings["stages"] = [*settings["stages"][:2], asked]
    done = run_cli("run", write(settings), "--registry", reused[0].store.root, "--no-prefect")
    assert (
        done.returncode == 2
        and "has no rollout of these rows and steps; look at rows and training_steps" in done.stderr
    )
