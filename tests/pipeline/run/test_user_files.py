"""What was planned is what is read, and what was changed since publishes nothing."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from pipeline.errors import StageFailed
from pipeline.plan.steps import Step
from pipeline.plan.steps import steps as steps_of
from pipeline.recipe import recipe
from pipeline.registry import Artifact, Registry, Source
from pipeline.registry.keys import digest_model
from pipeline.run import user_files
from pipeline.run.hub import checked_commit
from pipeline.run.user_files import as_planned
from stages.config import identity_values
from stages.errors import BadInput
from stages.problems.catalog import settings_of
from stages.problems.custom.settings import VERSION
from stages.runtime.disk import digest_file
from tests.conftest import TINY_BASE, run_cli

PROBLEM = """
import helpers
REWARDS = {"a": 1.0}
def rows(rng):
    while True:
        yield {"prompt": " ".join(str(rng.randint(0, 9)) for _ in range(6))}
def rewards(row, completion):
    return {"a": score(row, completion)}
def score(row, completion):
    return helpers.VALUE
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(PROBLEM)
    (tmp_path / "helpers.py").write_text("VALUE = 0.25\n")
    (tmp_path / "words.txt").write_text("one two")
    (tmp_path / "chat.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {i}", "completion": "old"}) + "\n" for i in range(8))
    )
    shutil.copytree(TINY_BASE, tmp_path / "base")
    return tmp_path


def settings(folder: Path, **problem) -> dict:
    sft = {"kind": "sft", "policy": "base", "data": str(folder / "chat.jsonl"), "rows_per_step": 8, "warmup_steps": 0}
    return {
        "name": "t",
        "model": {"path": str(folder / "base")},
        "problem": {"file": str(folder / "mine.py"), "workers": 1, **problem},
        "evaluate": {"rows": 4, "samples": 1, "max_completion_length": 4},
        "validation": {"rows": 4},
        "stages": [{"name": "one", "epochs": 1, **sft}, {"name": "two", "epochs": 2, **sft}],
        "launch": {"threads": 1},
    }


def planned(folder: Path, name: str, **problem) -> Step:
    text = yaml.safe_dump(settings(folder, **problem))
    steps = steps_of(recipe.parse(text, "r"), Registry(folder / "registry"))
    return next(step for step in steps if step.name == name)


def fail(why: str) -> None:
    raise AssertionError(why)


def test_small_files_are_read_from_copies(folder):
    step = planned(folder, "one.evaluate")
    with as_planned(step, folder / "work", fail) as copies:
        assert set(copies) == {str(folder / "mine.py"), str(folder / "helpers.py")}
        (folder / "helpers.py").write_text("VALUE = 0.75\n")
        copy = Path(copies[str(folder / "mine.py")])
        assert (copy.parent / "helpers.py").read_text() == "VALUE = 0.25\n"
        assert copy.is_relative_to(folder / "work" / "files")


@pytest.mark.parametrize(
    ("step", "name"),
    [("one.evaluate", "mine.py"), ("one.evaluate", "helpers.py"), ("one", "chat.jsonl"), ("one", "base/config.json"),
     ("base.evaluate", "words.txt")],
)  # fmt: skip
@pytest.mark.parametrize("gone", [True, False])
def test_a_file_that_was_changed_since_the_plan_starts_nothing(step, name, gone, folder):
    one = planned(folder, step, files=[str(folder / "words.txt")])
    path = folder / name
    if gone:
        path.unlink()
    else:
        path.write_text(path.read_text() + " ")
    changed = pytest.raises(BadInput, match=f"^{step}: .* was changed after the run was planned")
    with changed, as_planned(one, folder / "work", fail):
        raise AssertionError("the step was started")


@pytest.mark.parametrize("how_it_ends", [None, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["base/model.safetensors", "words.txt"])
def test_a_change_while_a_step_runs_publishes_nothing_and_leaves_no_checkpoint(name, how_it_ends, folder):
    """A checkpoint of the other bytes would be resumed once the old bytes are back."""
    one = planned(folder, "base.evaluate", files=[str(folder / "words.txt")])
    dropped: list[str] = []
    with pytest.raises(how_it_ends or BadInput), as_planned(one, folder / "work", dropped.append):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b"\0")
        if how_it_ends:
            raise how_it_ends
    assert len(dropped) == 1 and "was changed after the run was planned" in dropped[0]


def test_a_large_file_is_no_copy_but_is_looked_at_again(folder, monkeypatch):
    monkeypatch.setattr(user_files, "LARGEST_COPY", 10)
    changed = pytest.raises(BadInput, match=r"chat\.jsonl was changed")
    with changed, as_planned(planned(folder, "one"), folder / "work", lambda why: None) as copies:
        assert str(folder / "chat.jsonl") not in copies
        (folder / "chat.jsonl").write_text("{}")


def test_an_edit_while_a_run_trains_reaches_no_later_stage(folder):
    """The data of the second stage are edited as soon as the first one is published."""
    path, registry = folder / "r.yaml", folder / "registry"
    path.write_text(yaml.safe_dump(settings(folder)))
    old = (folder / "chat.jsonl").read_text()
    ended = threading.Event()

    def edit() -> None:
        while not list(registry.glob("artifacts/one-*")) and not ended.wait(0.05):
            pass
        (folder / "chat.jsonl").write_text(old.replace("old", "new"))

    editing = threading.Thread(target=edit)
    editing.start()
    done = run_cli("run", path, "--registry", registry, "--no-prefect")
    ended.set()
    editing.join()
    assert done.returncode == 2, done.stderr
    assert "two: " in done.stderr.splitlines()[-1] and "chat.jsonl was changed after the run" in done.stderr
    assert not list(registry.glob("artifacts/two-*"))
    (folder / "chat.jsonl").write_text(old)
    done = run_cli("run", path, "--registry", registry, "--no-prefect")
    assert done.returncode == 0, done.stderr
    assert not list(registry.glob("work/*/files"))


def problem_identity(folder: Path, **problem) -> dict:
    identity = planned(folder, "base.evaluate", **problem).identity["problem"]
    assert isinstance(identity, dict)
    return identity


def test_the_key_has_the_modules_that_a_problem_imports(folder):
    before = problem_identity(folder)
    assert before["modules"] == {"helpers": digest_file(folder / "helpers.py")}
    (folder / "helpers.py").write_text("VALUE = 1.0\n")
    assert problem_identity(folder)["modules"] != before["modules"]
    (folder / "unrelated.py").write_text("")
    assert problem_identity(folder)["file"] == before["file"]


def test_a_problem_without_modules_has_the_key_that_it_had(folder):
    (folder / "mine.py").write_text(PROBLEM.replace("import helpers", "").replace("helpers.VALUE", "1.0"))
    values = identity_values(settings_of({"file": str(folder / "mine.py"), "workers": 1}))
    assert problem_identity(folder) == {"version": VERSION, "file": digest_file(folder / "mine.py"), **values}


def test_files_that_code_opens_are_in_the_key_by_name_and_bytes(folder):
    (folder / "more").mkdir()
    (folder / "more" / "a.txt").write_text("a")
    files = [str(folder / "words.txt"), str(folder / "more")]
    found = problem_identity(folder, files=files)["files"]
    assert found == [
        ["words.txt", digest_file(folder / "words.txt")],
        ["more/a.txt", digest_file(folder / "more/a.txt")],
    ]
    (folder / "more" / "a.txt").write_text("b")
    assert problem_identity(folder, files=files)["files"] != found


def test_an_index_of_shards_brings_its_files_into_the_digest(folder):
    base = folder / "base"
    (base / "w").mkdir()
    (base / "model.safetensors").rename(base / "w" / "model.safetensors")
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "w/model.safetensors"}}))
    before = digest_model(base)
    (base / "w" / "model.safetensors").write_bytes(b"other weights")
    assert digest_model(base) != before
    for outside in ("../model.safetensors", "/etc/hostname"):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(BadInput, match="expected one below"):
            digest_model(base)


def test_a_model_that_is_an_adapter_is_refused(folder):
    """`from_pretrained` would load the model that the adapter names, whose bytes no digest has."""
    (folder / "base" / "adapter_config.json").write_text("{}")
    (folder / "r.yaml").write_text(yaml.safe_dump(settings(folder)))
    done = run_cli("plan", folder / "r.yaml", "--registry", folder / "registry")
    assert done.returncode == 2 and "is an adapter" in done.stderr


@pytest.fixture
def hub(folder, monkeypatch):
    """A cache of the hub with one model, whose main branch is put at a commit."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    model = folder / "hub" / "models--org--tiny"

    def move(commit: str) -> None:
        for name, content in {"refs/main": commit, f"snapshots/{commit}/config.json": "{}"}.items():
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            (model / name).write_text(content)

    return move


def test_a_hub_model_that_moves_between_two_steps_is_refused_before_the_second(folder, hub):
    text = yaml.safe_dump({**settings(folder), "model": {"hub": "org/tiny"}})
    first, second, _, third, _ = steps_of(recipe.parse(text, "r"), Registry(folder / "registry"))
    assert checked_commit(first, {}) is None, "it is not on this machine yet"
    hub("a" * 40)
    assert checked_commit(first, {}) == "a" * 40
    made = {first.name: artifact_of(first, {"commit": "a" * 40})}
    assert checked_commit(second, made) == "a" * 40
    hub("b" * 40)
    with pytest.raises(StageFailed, match=r"two: hf://org/tiny has moved on the hub .*which base.evaluate read"):
        checked_commit(third, made)


def test_a_hub_model_that_moves_while_a_step_runs_is_refused(folder, hub):
    """An adapter would be merged into another model than it was trained on."""
    text = yaml.safe_dump({**settings(folder), "model": {"hub": "org/tiny"}})
    _, step, *_ = steps_of(recipe.parse(text, "r"), Registry(folder / "registry"))
    hub("a" * 40)
    at_start = checked_commit(step, {})
    hub("b" * 40)
    with pytest.raises(StageFailed, match=r"which one at its start read"):
        checked_commit(step, {}, at_start)


def artifact_of(step: Step, provenance: dict[str, str]) -> Artifact:
    ref = step.inputs["policy"]
    source = Source(id=None, output="policy", key=ref.key, name=ref.source)
    return Artifact(
        id="", key=step.key, kind=step.kind, stage=step.name, created="", outputs={}, files=(),
        inputs={"policy": source}, format=None, config={}, identity=step.identity, metrics={}, provenance=provenance,
    )  # fmt: skip


def test_a_linked_folder_of_problem_files_is_in_the_key(folder):
    (folder / "real").mkdir()
    (folder / "real" / "v.txt").write_text("1")
    (folder / "words").mkdir()
    (folder / "words" / "link").symlink_to(folder / "real")
    (folder / "words" / "loop").symlink_to(folder / "words")
    before = problem_identity(folder, files=[str(folder / "words")])["files"]
    assert [name for name, _ in before] == ["words/link/v.txt"]
    (folder / "real" / "v.txt").write_text("2")
    assert problem_identity(folder, files=[str(folder / "words")])["files"] != before


def test_a_file_that_is_added_to_a_folder_of_problem_files_is_a_change(folder):
    (folder / "words").mkdir()
    step = planned(folder, "one.evaluate", files=[str(folder / "words")])
    (folder / "words" / "new.txt").write_text("")
    changed = pytest.raises(BadInput, match=r"new\.txt was changed after the run was planned")
    with changed, as_planned(step, folder / "work", fail):
        raise AssertionError("the step was started")


def test_files_of_one_name_in_two_folders_do_not_change_places_unseen(folder):
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "w.txt").write_text(name)
    files = [str(folder / "a" / "w.txt"), str(folder / "b" / "w.txt")]
    found = problem_identity(folder, files=files)["files"]
    assert [name for name, _ in found] == ["a/w.txt", "b/w.txt"]
