"""One byte anywhere is found, named, and exactly the step that it belongs to is made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.cli import exit_code
from pipeline.errors import StageFailed
from pipeline.plan import plan
from pipeline.recipe import recipe
from pipeline.registry import Artifact, Registry, Source, aliases
from pipeline.registry.keys import key_of
from pipeline.registry.verify import verify, verify_ids
from pipeline.run.step import refuse_damaged
from tests.conftest import printed_json, run_cli, tensors

STEPS = {
    "base.evaluate": 6,
    "warmup": 10,
    "warmup.evaluate": 6,
    "rl1": 11,
    "rl1.evaluate": 6,
    "harvest": 7,
    "distill": 10,
    "distill.evaluate": 6,
    "rl2": 11,
    "rl2.evaluate": 6,
}
"""Step of the climb -> files of its artifact, the manifest among them."""
FILES = [(step, number) for step, count in STEPS.items() for number in range(count)]


@pytest.fixture(scope="module")
def copy(climbed, tmp_path_factory):
    """(a recipe, a registry of one's own, step -> id) of the climb."""
    recipe, registry = climbed
    mine = tmp_path_factory.mktemp("copy") / "registry"
    shutil.copytree(registry, mine, ignore=shutil.ignore_patterns("work"))
    planned = printed_json("plan", recipe, "--registry", mine, "--json")
    return recipe, mine, {one["step"]: one["artifact"] for one in planned}


def actions(recipe, registry, capsys):
    """Step -> what `plan` would do."""
    assert exit_code(["plan", str(recipe), "--registry", str(registry), "--json"]) == 0
    return {one["step"]: one["action"] for one in json.loads(capsys.readouterr().out)}


def flip(path: Path):
    """One bit of the byte in the middle; returns what undoes it."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    path.write_bytes(changed)
    return lambda: path.write_bytes(content)


def test_every_file_of_the_climb_is_flipped_below(copy):
    _, registry, ids = copy
    assert {step: len(files_of(registry / "artifacts" / id)) for step, id in ids.items()} == STEPS


def files_of(directory: Path):
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(("step", "number"), FILES)
def test_one_byte_of_any_file_is_found_and_exactly_that_step_is_made_again(step, number, copy, capsys):
    recipe, registry, ids = copy
    path = files_of(registry / "artifacts" / ids[step])[number]
    key = next(key for key in (registry / "keys").iterdir() if ids[step] in (key / "000001.json").read_text())
    undo = flip(path)
    try:
        assert exit_code(["verify", "--json", "--registry", str(registry)]) == 1
        found = {one["id"]: one for one in json.loads(capsys.readouterr().out)}
        assert [id for id, one in found.items() if not one["ok"]] == [ids[step]]
        named = f"{ids[step]}/{path.relative_to(registry / 'artifacts' / ids[step])}"
        assert found[ids[step]]["problems"] and all(line.startswith(named) for line in found[ids[step]]["problems"])
        assert actions(recipe, registry, capsys) == {one: "run" if one == step else "reuse" for one in STEPS}
    finally:
        undo()
        (key / "000002.json").unlink()


def test_what_damage_reaches_is_everything_made_from_it_and_the_aliases_there(copy, capsys):
    _, registry, ids = copy
    place = Registry(registry)
    for alias, step in (("prod", "warmup"), ("prod", "rl2"), ("before", "warmup"), ("gone", "rl2")):
        aliases.set_to(place, alias, place.open(ids[step]))
    aliases.remove(place, "gone")
    undo = flip(registry / "artifacts" / ids["rl1"] / "model.safetensors")
    try:
        assert exit_code(["verify", ids["rl1"], "--json", "--registry", str(registry)]) == 1
        (found,) = json.loads(capsys.readouterr().out)
        below = ["distill", "distill.evaluate", "harvest", "rl1.evaluate", "rl2", "rl2.evaluate"]
        assert set(found["reaches"]["artifacts"]) >= {ids[step] for step in below}
        assert not set(found["reaches"]["artifacts"]) & {ids[step] for step in STEPS if step not in below}
        assert found["reaches"]["aliases"] == ["prod"]
        assert exit_code(["verify", ids["rl1"], "--registry", str(registry)]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert (
            len(lines) == 2 and lines[1].startswith(f"{ids['rl1']} reaches ") and lines[1].endswith("; aliases: prod")
        )
    finally:
        undo()
        Registry(registry).store.append(f"keys/{Registry(registry).open(ids['rl1']).key}", {"artifact": ids["rl1"]})


@pytest.mark.slow
def test_a_run_with_a_damaged_input_starts_no_stage_and_the_next_one_mends_it(climbed, tmp_path):
    recipe, source = climbed
    registry = tmp_path / "registry"
    shutil.copytree(source, registry, ignore=shutil.ignore_patterns("work"))
    ids = {one["step"]: one["artifact"] for one in printed_json("plan", recipe, "--registry", registry, "--json")}
    flip(registry / "artifacts" / ids["distill"] / "model.safetensors")
    again = [recipe, "--registry", registry, "--set", "stages.rl2.kl.beta=0.2"]
    done = run_cli("run", *again, "--no-prefect", "--only", "rl2")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"rl2: its input is damaged: {ids['distill']}/model.safetensors" in done.stderr
    assert not list((registry / "work").glob("*/job.json")), "no job was started"
    assert {one["step"] for one in printed_json("plan", *again, "--json") if one["action"] == "run"} == {
        "distill",
        "rl2",
        "rl2.evaluate",
    }
    done = run_cli("run", *again, "--no-prefect")
    assert done.returncode == 0, done.stderr
    assert {one["action"] for one in printed_json("plan", *again, "--json")} == {"reuse"}


OWNER = "user"


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def made(registry, directory, name, inputs=None):
    (directory / name).mkdir()
    (directory / name / "model.safetensors").write_bytes(tensors(name))
    draft = Artifact(
        id="",
        key=key_of({"name": name}),
        kind="sft",
        stage=name,
        created="",
        outputs={"policy": "."},
        files=(),
        inputs=inputs or {},
        format=None,
        config={},
        identity={"name": name},
        metrics={},
        provenance={},
    )
    return registry.publish(directory / name, draft, OWNER).artifact


def read(artifact):
    return Source(id=artifact.id, output="policy", key=artifact.key, name=artifact.stage, digest=artifact.digest)


def test_an_input_that_is_another_one_now_is_named(registry, tmp_path):
    first = made(registry, tmp_path, "first")
    second = made(registry, tmp_path, "second", {"policy": read(first)})
    lying = made(registry, tmp_path, "lying", {"policy": read(first).model_copy(update={"digest": "0" * 64})})
    assert verify(registry, second) == []
    (said,) = verify(registry, lying)
    assert said == f"{lying.id}/artifact.json: its input policy is not what was read: {first.id} has other files now"


def test_an_input_that_is_damaged_is_not_held_against_who_read_it(registry, tmp_path):
    first = made(registry, tmp_path, "first")
    second = made(registry, tmp_path, "second", {"policy": read(first)})
    path = registry.path(first) / "artifact.json"
    path.write_text(path.read_text().replace(first.files[0].sha256, "0" * 64))
    assert [one.id for one in verify_ids(registry) if one.problems] == [first.id]
    assert registry.find(first.key) is None and registry.find(second.key) == second


def test_a_key_that_is_not_that_of_what_was_asked_is_named(registry, tmp_path):
    artifact = made(registry, tmp_path, "first")
    path = registry.path(artifact) / "artifact.json"
    path.write_text(path.read_text().replace('"name": "first"', '"name": "other"'))
    forget(registry, artifact)
    (said,) = verify(registry, registry.open(artifact.id))
    assert said == f"{artifact.id}/artifact.json: its key is not that of its identity"


def test_no_byte_of_a_manifest_can_change_unseen(registry, tmp_path):
    artifact = made(registry, tmp_path, "first")
    path, log = registry.path(artifact) / "artifact.json", registry.store.root / "keys" / artifact.key
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        (found,) = verify_ids(registry)
        assert found.problems and all(line.startswith(f"{artifact.id}/artifact.json") for line in found.problems), i
        assert registry.find(artifact.key) is None
        (log / "000002.json").unlink()


def test_a_manifest_that_says_a_thing_twice_is_named(registry, tmp_path):
    artifact = made(registry, tmp_path, "first")
    path = registry.path(artifact) / "artifact.json"
    path.write_text(path.read_text().replace('"kind":', '"kind": "grpo", "kind":'))
    forget(registry, artifact)
    (said,) = verify(registry, registry.open(artifact.id))
    assert said == f"{artifact.id}/artifact.json: it does not say one thing alone: a name is there twice"


def forget(registry, artifact):
    """The log's entry as earlier versions wrote it, without the manifest's digest."""
    path = registry.store.root / "keys" / artifact.key / "000001.json"
    path.write_text(json.dumps({"artifact": artifact.id}))


def test_a_stage_does_not_start_on_an_input_that_went_missing(registry, tmp_path, climbed):
    first = made(registry, tmp_path, "first")
    (registry.path(first) / "model.safetensors").unlink()
    with pytest.raises(StageFailed, match=r"model\.safetensors: is gone"):
        refuse_damaged(step_of(climbed), {"policy": read(first)}, registry)
    assert registry.find(first.key) is None


def step_of(climbed):
    return plan.plan(recipe.load(climbed[0]), Registry(climbed[1]))[3].step


def test_an_artifact_that_is_named_and_not_there_is_bad_input(registry, tmp_path, capsys):
    made(registry, tmp_path, "first")
    assert exit_code(["verify", "first-00000000", "--registry", registry.url]) == 2
    assert "there is no artifact first-00000000" in capsys.readouterr().err
