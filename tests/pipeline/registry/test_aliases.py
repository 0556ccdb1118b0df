"""Aliases: they move from where the mover saw them, remember each move, and go to no policy that is credibly worse."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from pipeline.errors import NotComparable
from pipeline.registry import Artifact, Registry
from pipeline.registry.aliases import aliases, current, history, look_up, remove, resolve, set_to
from pipeline.registry.keys import key_of
from pipeline.registry.pins import keep, let_go, pins
from pipeline.results.evaluations import bootstrap
from pipeline.results.promote import Comparison, Refused, compare, promote
from stages.errors import BadInput
from stages.job import Evaluation
from tests.artifacts import draft, make, of
from tests.conftest import printed_json, run_cli

OWNER = "user"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def policies(registry: Registry, tmp_path: Path) -> list[Artifact]:
    made = [make(registry, tmp_path / name, draft(name), OWNER) for name in "abc"]
    for one in made:
        registry.release(one.id, OWNER)
    return made


def test_an_alias_moves_and_remembers_who_when_and_why(registry, policies):
    a, b, _ = policies
    assert current(registry, "prod") is None
    assert set_to(registry, "prod", a).number == 1
    set_to(registry, "prod", b, reason="better")
    moves = history(registry, "prod")
    assert [(move.number, move.artifact, move.reason) for move in moves] == [(1, a.id, ""), (2, b.id, "better")]
    assert all("@" in move.actor and move.at for move in moves)
    assert resolve(registry, "prod") == b == resolve(registry, b.id)
    assert registry.store.names(f"pins/{b.id}") == [], "the mover lets go"


def test_an_alias_moves_only_from_where_the_mover_saw_it(registry, policies):
    a, b, c = policies
    set_to(registry, "prod", a, expect=0)
    set_to(registry, "prod", b, expect=1)
    with pytest.raises(BadInput, match=rf"expected at 1, but is at 2, {b.id}, moved by \S+@\S+ on ") as refused:
        set_to(registry, "prod", c, expect=1)
    assert "\n" not in str(refused.value) and resolve(registry, "prod") == b
    with pytest.raises(BadInput, match="has never been set"):
        set_to(registry, "new", c, expect=3)


def _move(place: str, id: str, expect: int) -> bool:
    registry = Registry(place)
    try:
        set_to(registry, "prod", registry.open(id), expect)
    except BadInput:
        return False
    return True


def test_of_eight_movers_who_saw_the_same_entry_one_wins(registry, policies):
    set_to(registry, "prod", policies[0])
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        won = pool.starmap(_move, [(registry.url, policies[i % 3].id, 1) for i in range(8)])
    assert won.count(True) == 1 and len(history(registry, "prod")) == 2


def test_an_alias_that_was_taken_away_points_nowhere_and_keeps_its_history(registry, policies):
    set_to(registry, "prod", policies[0])
    remove(registry, "prod", "over")
    assert aliases(registry) == {} and look_up(registry, "prod") is None
    assert [move.artifact for move in history(registry, "prod")] == [policies[0].id, None]
    with pytest.raises(BadInput, match="there is no alias prod"):
        remove(registry, "prod")
    assert set_to(registry, "prod", policies[1]).number == 3


def test_an_alias_never_goes_to_what_is_void_or_gone(registry, policies):
    a, b, _ = policies
    registry.void(a, "a test")
    registry.store.remove_tree(f"artifacts/{b.id}", "artifact.json")
    for artifact in (a, b):
        with pytest.raises(BadInput, match="is void or gone"):
            set_to(registry, "prod", artifact)
        with pytest.raises(BadInput, match="is void or gone"):
            keep(registry, artifact, "")
    assert aliases(registry) == {} and pins(registry) == []


@pytest.mark.parametrize("name", ["", "Prod", "-x", "../x", "a/b", "a" * 65, "warmup-0123abcd", ".x", "a\n", "é"])
def test_what_is_no_name_is_refused(name, registry, policies):
    with pytest.raises(BadInput, match="cannot name an alias"):
        set_to(registry, name, policies[0])


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "x", '{"artifact": 1}', '{"artifact": null, "prev": 7, "actor": "", "reason": "", "at": ""}'],
)
def test_an_entry_that_switchback_did_not_write_is_one_line(content, registry, policies):
    set_to(registry, "prod", policies[0])
    registry.store.path("refs/prod/000001.json").write_text(content)
    with pytest.raises(BadInput, match="not written by switchback") as refused:
        current(registry, "prod")
    assert "\n" not in str(refused.value)


def test_the_user_pins_and_lets_go(registry, policies):
    keep(registry, policies[0], "good")
    assert [(id, pin.owner, pin.reason) for id, pin in pins(registry)] == [(policies[0].id, "user", "good")]
    with pytest.raises(BadInput, match="is pinned already"):
        keep(registry, policies[0], "")
    let_go(registry, policies[0].id)
    with pytest.raises(BadInput, match="is not pinned by a user"):
        let_go(registry, policies[0].id)


def test_wherever_an_artifact_can_be_named_an_alias_can(registry, policies):
    at = ("--registry", registry.url)
    assert run_cli("alias", "set", "prod", policies[0].id, "--reason", "first", *at).returncode == 0
    assert printed_json("show", "prod", "--json", *at)["id"] == policies[0].id
    assert printed_json("lineage", "prod", "--json", *at)["id"] == policies[0].id
    assert printed_json("verify", "prod", "--json", *at)[0]["id"] == policies[0].id
    assert run_cli("alias", "set", "best", "prod", *at).returncode == 0
    assert run_cli("pin", "best", *at).returncode == 0
    assert printed_json("pins", "--json", *at)[0]["id"] == policies[0].id
    assert {line["alias"]: line["artifact"] for line in printed_json("alias", "ls", "--json", *at)} == {
        "best": policies[0].id,
        "prod": policies[0].id,
    }
    assert [line["reason"] for line in printed_json("alias", "history", "prod", "--json", *at)] == ["first"]
    refused = run_cli("alias", "set", "prod", policies[1].id, "--expect", "7", *at)
    assert refused.returncode == 2 and "is at 1" in refused.stderr and len(refused.stderr.splitlines()) == 1


# promotion


def evaluate(registry: Registry, policy: Artifact, scores: list[float], out: Path, **settings: object) -> Artifact:
    """Publish what an evaluate step would: two samples a row, whose mean is the score."""
    (out / "x").mkdir(parents=True)
    out = out / "x"
    said = [
        {"row": f"row-{i}", "greedy": {"score": score}, "samples": [{"score": score - 0.05}, {"score": score + 0.05}]}
        for i, score in enumerate(scores)
    ]
    (out / "validation.jsonl").write_text("\n".join(map(json.dumps, said)) + "\n")
    evaluation = Evaluation(
        policy=policy.id,
        split="validation",
        decoding={},
        rows=len(scores),
        samples=2,
        seeds=[0],
        greedy=0.0,
        mean=0.0,
        interval=(0.0, 0.0),
        solved=0.0,
        format=0.0,
        format_digest="",
        pass_at_k={},
        outcomes={},
        per_row="validation.jsonl",
    )
    (out / "validation.json").write_text(evaluation.model_dump_json())
    identity = {
        "kind": "evaluate",
        "inputs": {"policy": policy.key},
        "format": policy.stage,
        "config": {"rows": 100, **settings},
    }
    outputs = {"validation": "validation.json"}
    planned = draft("evaluation", "evaluate", policy).model_copy(
        update={"identity": identity, "key": key_of(identity), "outputs": outputs, "inputs": {"policy": of(policy)}}
    )
    return registry.publish(out, planned, OWNER).artifact


ROWS = [0.2 + 0.005 * (i % 50) for i in range(100)]


def test_the_policies_of_a_climb_can_be_promoted_one_after_the_other(climbed, tmp_path):
    """What the evaluate stage writes is what promotion reads."""
    registry = Registry(shutil.copytree(climbed[1], tmp_path / "registry"))
    warmup, rl1 = (registry.artifacts(stage)[0] for stage in ("warmup", "rl1"))
    promote(registry, warmup, "prod")
    evidence = promote(registry, rl1, "prod", force=True).evidence
    means = [registry.artifacts(f"{stage}.evaluate")[0].metrics["validation/mean"] for stage in ("warmup", "rl1")]
    assert evidence["difference"] == pytest.approx(means[1] - means[0]) and evidence["rows"] == 4


def test_a_policy_that_is_not_credibly_worse_is_promoted_with_its_numbers(registry, policies, tmp_path):
    a, b, _ = policies
    evaluate(registry, a, ROWS, tmp_path / "1")
    evaluate(registry, b, [score + 0.1 for score in ROWS], tmp_path / "2")
    assert promote(registry, a, "prod").evidence == {}, "there was nothing to compare with"
    evidence = promote(registry, b, "prod", reason="up").evidence
    assert resolve(registry, "prod") == b and evidence["against"] == a.id and evidence["rows"] == 100
    unseen = 1.959964**2 / (100 + 1.959964**2)  # every row says 0.1, and there were 100 of them
    between = [0.1 - unseen * 1.1, 0.1 + unseen * 0.9]
    assert evidence["difference"] == pytest.approx(0.1) and evidence["interval"] == pytest.approx(between)


def test_a_policy_that_is_credibly_worse_is_promoted_only_by_force_which_is_remembered(registry, policies, tmp_path):
    a, b, _ = policies
    evaluate(registry, a, ROWS, tmp_path / "1")
    evaluate(registry, b, [score - 0.1 for score in ROWS], tmp_path / "2")
    promote(registry, a, "prod")
    refused = run_cli("promote", b.id, "prod", "--registry", registry.url)
    assert refused.returncode == 3 and "-10.0 points" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert resolve(registry, "prod") == a
    assert run_cli("promote", b.id, "prod", "--force", "--registry", registry.url).returncode == 0
    evidence = history(registry, "prod")[-1].evidence
    assert evidence["forced"] is True and evidence["difference"] == pytest.approx(-0.1)
    assert "forced" in run_cli("alias", "history", "prod", "--registry", registry.url).stdout


def test_a_policy_that_is_worse_by_less_than_the_noise_is_promoted(registry, policies, tmp_path):
    a, b, _ = policies
    noise = [0.3 * (-1) ** i - 0.01 for i in range(100)]
    evaluate(registry, a, ROWS, tmp_path / "1")
    evaluate(registry, b, [score + by for score, by in zip(ROWS, noise, strict=True)], tmp_path / "2")
    found = compare(registry, b, a)
    assert found.difference == pytest.approx(-0.01) and found.interval[0] < 0 < found.interval[1]
    set_to(registry, "prod", a)
    assert promote(registry, b, "prod").evidence == found.model_dump(mode="json")


def test_what_cannot_be_compared_is_refused(registry, policies, tmp_path):
    a, b, c = policies
    set_to(registry, "prod", a)
    with pytest.raises(Refused, match=f"{b.id} has no evaluation"):
        promote(registry, b, "prod")
    evaluate(registry, a, ROWS, tmp_path / "1")
    evaluate(registry, b, ROWS, tmp_path / "2", temperature=0.5)
    with pytest.raises(NotComparable, match="not evaluated with equal settings"):
        compare(registry, b, a)
    evaluate(registry, c, ROWS[:99], tmp_path / "3")
    with pytest.raises(NotComparable, match="the same rows"):
        compare(registry, c, a)
    assert promote(registry, b, "prod", force=True).evidence["forced"] is True


def test_only_a_policy_is_promoted(registry, policies, tmp_path):
    evaluation = evaluate(registry, policies[0], ROWS, tmp_path / "1")
    with pytest.raises(BadInput, match="holds no policy"):
        promote(registry, evaluation, "prod")


def test_a_damaged_evaluation_decides_nothing(registry, policies, tmp_path):
    a, b, _ = policies
    evaluation = evaluate(registry, a, ROWS, tmp_path / "1")
    evaluate(registry, b, ROWS, tmp_path / "2")
    set_to(registry, "prod", a)
    path = registry.path(evaluation) / "validation.jsonl"
    path.write_text(path.read_text().replace("0.15", "0.95", 1))
    with pytest.raises(BadInput, match="switchback verify"):
        promote(registry, b, "prod")


def test_the_interval_is_that_of_the_mean():
    values = [(i % 10) / 10 for i in range(400)]
    low, high = bootstrap(values)
    error = (sum((value - 0.45) ** 2 for value in values) / 400 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.45 - 1.96 * error, 0.45 + 1.96 * error), abs=0.2 * error)
    assert bootstrap(values) == (low, high)
    assert (
        str(Comparison(against="x", difference=0.01, interval=(0.0, 0.02), rows=3))
        == "+1.0 points against x (95 % +0.0 to +2.0, 3 validation rows)"
    )
