"""The rejection stage: its dataset, where each row comes from, its control, and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
from datasets import load_dataset

from pipeline.recipe import checks
from pipeline.recipe.recipe import Recipe
from pipeline.registry import Registry
from stages import rejection
from stages.data import harvest as dataset
from stages.data import rollouts
from stages.data.selection import Choice, Keep, Pool, candidate
from stages.errors import BadInput
from stages.job import Job
from stages.policy import models
from stages.problems import catalog
from stages.tokens import token_rows
from tests.conftest import LEARNED, TINY_BASE, run_cli, stage
from tests.models import make_tokenizer
from tests.stages.data.test_sources import FORMAT
from tests.stages.inspections.test_preflight import job

TRAINING = {"source": "training", "samples": 8, "max_completion_length": 512}
"""What is the same as leaving out what source: training refuses."""


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
    funnel = token_rows.read_card(registry.path(artifact, "data"))["funnel"]
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
    kept, drawn = (token_rows.read(registry.path(artifact, output)) for output in ("data", "control"))
    assert Counter(row.row for row in kept) == Counter(row.row for row in drawn)
    lines = {(line["row"], line["sample"]): line for line in lines_of(registry, artifact)}
    mine = [lines[row.row, row.provenance["sample"]] for row in drawn]
    assert all(line["finished"] for line in mine) and len({(line["row"], line["sample"]) for line in mine}) == len(mine)
    assert {row.provenance["rule"] for row in drawn} == {"random"}
    assert sum(line["score"] for line in mine) < sum(row.provenance["score"] for row in kept)
    assert token_rows.read_card(registry.path(artifact, "control"))["control"] == "random"


def test_a_stage_trains_on_the_control_by_its_name(harvested):
    _, registry = harvested
    harvest, trained = newest(registry, "harvest"), newest(registry, "distill-control")
    assert (trained.inputs["data"].id, trained.inputs["data"].output) == (harvest.id, "control")
    assert trained.metrics["rows"] == harvest.metrics["kept"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"distill": {"data": "demonstrations:control"}}, "stages.distill.data: there is no demonstrations:control"),
        ({"distill": {"data": "demonstrations:"}}, "stages.distill.data: found demonstrations:, but a stage trains on"),
        ({"distill": {"data": "harvest:control"}}, "stages.distill.data: there is no harvest:control; a rejection "
                                                   "stage with control: random makes one"),
        ({"distill": {"data": "harvest:rollouts"}}, "stages.distill.data: found harvest:rollouts, but a stage trains "
                                                    "on harvest or harvest:control"),
        ({"harvest": {"control": "best"}}, "stages.harvest.control: found 'best'"),
        ({"harvest": {"source": "both", "policy": "warmup", "rows": "train[0:9]"}}, "its policy warmup is no grpo "
                                                                                    "stage"),
        ({"harvest": {"source": "both", "format": {"response_prefix": ""}}}, "rendered with its own Format; remove "
                                                                             "format"),
        ({"harvest": {"source": "training"}}, "samples has no effect with source: training"),
        ({"harvest": {"source": "both", "training_steps": [3, 4]}}, "stages.harvest.training_steps: found [3, 4], "
                                                                    "but rl1 has 2 steps; expected two of 1 to 2"),
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": "both", "training_steps": [1, 99]}, "stages.harvest.training_steps: found [1, 99], but rl1 has 2 "
                                                        "steps; expected two of 1 to 2"),
        ({**TRAINING, "rows": "train[500:520]"}, "stages.harvest.rows: found train[500:520], but rl1 is trained on "
                                                 "train[512:528], and source: training has no others"),
        ({**TRAINING, "rows": "train[520:529]"}, "stages.harvest.rows: found train[520:529], but rl1 is trained on"),
        ({**TRAINING, "rows": "train[512:528]", "training_steps": [1, 2]}, None),
        ({"source": "both", "rows": "train[500:520]"}, None),
    ],
)  # fmt: skip
def test_what_no_log_can_have_is_refused_before_anything_runs(change, said, settings):
    stage(settings, "harvest").update(change)
    with pytest.raises(BadInput) if said else nullcontext() as refused:
        checks.check(Recipe.model_validate(settings))
    assert not said or str(refused.value).startswith(said)


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
    rows = token_rows.read(registry.path(made["logged"], "data"))
    assert made["logged"].metrics["rollouts"] == len(log) == 16 and len(rows) > 0
    sampling = token_rows.read_card(registry.path(made["logged"], "data"))["sampling"]
    assert sampling["fresh"] is None and sampling["training"]["policy"] == made["rl1"].id
    assert made["logged"].metrics["kept_from_training"] == made["logged"].metrics["kept"] == len(rows)
    fresh = token_rows.read(registry.path(newest(registry, "harvest"), "data"))
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
    kept = token_rows.read(registry.path(made["pooled"], "data"))
    assert made["pooled"].metrics["kept_from_training"] == sum(row.provenance["step"] is not None for row in kept) > 0
    policies = {row.provenance["step"] is None: row.provenance["policy"] for row in kept}
    assert policies == {True: made["rl1"].id, False: made["rl1"].id}
    assert made["relearnt"].metrics["rows"] == len(kept)


def test_harvesting_a_log_samples_nothing(reused):
    registry, made = reused
    sampled = {name: (registry.path(made[name]) / "metrics.jsonl").exists() for name in ("logged", "pooled")}
    assert sampled == {"logged": False, "pooled": True}


def test_a_harvest_says_how_many_of_its_rows_the_training_met(reused):
    """Two steps of two prompts of 16 rows; what the stage says is on its artifact's record, and what it kept is of
    these rows."""
    registry, made = reused
    met = {line["row"] for line in lines_of(registry, made["logged"])}
    assert len(met) == 4 and {row.row for row in token_rows.read(registry.path(made["logged"], "data"))} <= met
    (finding,) = made["logged"].provenance["findings"]
    assert finding["rule"] == "rows_not_in_log" and finding["evidence"] == {"in_log": 4.0, "rows": 16.0}


ROLLOUT = {
    "row": "",
    "sample": 0,
    "step": 1,
    "ids": [5, 6, 7, 8],
    "prefix": 2,
    "text": "x",
    "finished": True,
    "score": 0.5,
    "outcome": "valid",
    "rewards": {"format": 1.0},
    "failure": None,
}
HOW = {"seed": 3, "temperature": 1.0, "max_completion_length": 8}


def from_a_log(directory: Path, lines, change=None, **config) -> Job:
    """A job that harvests the log of a grpo stage on the tiny base, with these rollouts of each of 50 rows; `change`
    is what another tokenizer or Format did to its card."""
    one = job(TINY_BASE, {"kind": "rejection"}, directory)
    given = {
        "config": {"name": "rejection", "kind": "rejection", "policy": "rl1", "source": "training", **config},
        "inputs": {**one.inputs, "training": str(directory / "log")},
        "sources": {"policy": "rl1-00000000", "training": "rl1-00000000"},
    }
    one = one.model_copy(update=given)
    tokenizer = models.load_tokenizer(str(TINY_BASE))
    each = [{**ROLLOUT, "row": row.id, **line} for row in problem_rows(one) for line in lines]
    rollouts.write(directory / "log", each, {**rollouts.card(tokenizer, one, 1.0, 8), **(change or {})})
    return one


def problem_rows(one: Job):
    assert one.problem is not None and one.rows is not None
    return catalog.rows(catalog.load(one.problem), one.rows)


def drawn(one: Job) -> list[int]:
    """Which of each row's rollouts are the control."""
    assert rejection.run(one).outputs["control"] == "control"
    return [row.provenance["sample"] for row in token_rows.read(Path(one.out, "control"))]


def test_a_control_is_drawn_anew_for_every_row_and_every_seed(tmp_path):
    """50 rows of 8 rollouts: were one number to decide for all, every row would have the same."""
    lines = [{"sample": i, "ids": [5, 6, 7, 8 + i]} for i in range(8)]
    one = from_a_log(tmp_path, lines, control="random", keep={"min_score": 0.5, "per_prompt": 1})
    found = drawn(one)
    assert len(found) == 50 and set(found) == set(range(8))
    assert drawn(one) == found != drawn(one.model_copy(update={"seed": 1}))


def test_the_metrics_tell_how_many_pass_and_what_all_are_worth_and_failures_are_told(tmp_path):
    """Of four rollouts of a row, two passed, with half a point and a quarter, and one could not be judged."""
    answers = [
        {"score": 0.5},
        {"score": 0.25},
        {"score": 0.0},
        {"score": 0.0, "failure": "timeout", "rewards": {"format": None}},
    ]
    one = from_a_log(tmp_path, [{**line, "sample": i} for i, line in enumerate(answers)], keep={"min_score": 0.5})
    result = rejection.run(one)
    assert (result.metrics["rollouts"], result.metrics["kept"]) == (200, 50)
    assert (result.metrics["pass_rate"], result.metrics["score"]) == (0.5, 0.1875)
    (finding,) = result.findings
    assert finding.rule == "answers_not_judged" and finding.evidence == {"timeout": 50.0, "answers": 200.0}
    assert rejection.run(from_a_log(tmp_path, [{"sample": i} for i in range(2)])).findings == ()


@pytest.mark.parametrize(
    "change",
    [{"tokenizer": "other"}, {"format": FORMAT.model_dump(mode="json")}],
    ids=lambda change: next(iter(change)),
)
def test_a_log_that_another_tokenizer_or_format_made_is_refused_in_one_line(change, tmp_path):
    with pytest.raises(
        BadInput, match=r"^rejection: the rollouts of rl1-00000000 were rendered with another Format [^\n]+$"
    ):
        rejection.run(from_a_log(tmp_path, [{}], change))


@pytest.mark.parametrize(
    ("config", "in_log", "said"),
    [
        ({}, 20, "has rollouts of 20 of the 50 rows; of the others nothing can be kept"),
        ({"training_steps": [2, 3]}, 10, "has rollouts of 10 of the 50 rows in steps 2 to 3; of the others nothing "
                                         "can be kept"),
    ],
)  # fmt: skip
def test_rows_that_a_training_did_not_meet_are_counted_in_a_note(config, in_log, said, tmp_path):
    """Of 50 rows, the log has the first 20, half of them in the second step."""
    one = from_a_log(tmp_path, [{}], keep={"min_score": 0.5}, **config)
    log = [{**line, "step": 1 + i % 2} for i, line in enumerate(rollouts.read(tmp_path / "log")) if i < 20]
    rollouts.write(tmp_path / "log", log, rollouts.read_card(tmp_path / "log"))
    result = rejection.run(one)
    (finding,) = result.findings
    assert (finding.rule, finding.severity) == ("rows_not_in_log", "note") and said in finding.advice
    assert finding.evidence == {"in_log": in_log, "rows": 50.0} and result.metrics["kept"] == in_log


def test_a_log_with_none_of_the_rows_is_refused_in_one_line(tmp_path):
    one = from_a_log(tmp_path, [{}], training_steps=[2, 2])
    with pytest.raises(
        BadInput, match=r"^rejection: the log of rl1-00000000 has no rollout of these rows and steps[^\n]+$"
    ):
        rejection.run(one)


def pool(*lines) -> Pool:
    """Of one row, with the first line as the best and the others not kept."""
    one = job(TINY_BASE, {"kind": "rejection"}, Path())
    row = problem_rows(one)[0]
    told = [{**ROLLOUT, "row": row.id, **line} for line in lines]
    choices = [Choice(None, 1), *[Choice("per_prompt", None)] * (len(told) - 1)]
    return Pool(row, told, [candidate(line, {"format": 1.0}, bool) for line in told], choices)


def test_each_row_is_told_by_whom_and_how_it_was_sampled():
    """A rollout with a step by the policies of the training, one without by the policy that stood still."""
    sampled = dataset.Sampled({**HOW, "policy": "now"}, {**HOW, "policy": "then", "temperature": 0.7})
    mixed = pool({"step": 4}, {"step": None})
    rows = dataset.rows(make_tokenizer(), FORMAT, [mixed], [[0, 1]], sampled, "random")
    told = [(row.provenance["step"], row.provenance["policy"], row.provenance["temperature"]) for row in rows]
    assert told == [(4, "then", 0.7), (None, "now", 1.0)]


def test_a_reward_that_there_is_none_of_is_null_and_json(tmp_path):
    nothing = pool({"rewards": {"format": None}}, {"rewards": {"format": 0.25}})
    told = [*dataset.selected([nothing])]
    assert [line["reward"] for line in told] == [None, 0.25]
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    sampled = dataset.Sampled(None, {**HOW, "policy": "then"})
    rows = dataset.rows(make_tokenizer(), FORMAT, [nothing], [[0, 1]], sampled)
    token_rows.write(tmp_path, rows, {})
    assert [row.provenance["reward"] for row in token_rows.read(tmp_path)] == [None, 0.25]


@pytest.mark.parametrize(
    ("control", "title"), [(None, "Completions that were kept as the best"), ("random", "Completions that were drawn "
                                                                                        "at random, a control")]
)  # fmt: skip
@pytest.mark.parametrize(
    ("source", "told"), [("fresh", "a policy"), ("training", "a policy's training"), ("both", "a policy and its "
                                                                                              "training")]
)  # fmt: skip
def test_the_card_says_of_how_many_which_whence_and_why(control, title, source, told, tmp_path):
    rows = [token_rows.TokenRow("r", [1, 2], "uc")]
    about = {"keep": Keep().model_dump(mode="json"), "source": source, "funnel": {"sampled": 7, "judged": 5, "kept": 1}}
    dataset.write(tmp_path, rows, {**about, **({"control": control} if control else {})})
    text = (tmp_path / "README.md").read_text()
    assert f"# {title}\n\n1 of 7 rollouts, from {told}. " in text
    assert "| sampled | 7 |\n| judged | 5 |\n| kept | 1 |\n" in text
