"""The registry: whole or not there, written once, found by key, verified by bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.errors import Unreadable
from pipeline.registry import Artifact, Registry, Source, UnsafeFile, runs
from pipeline.registry.aliases import set_to
from pipeline.registry.cleanup import gc
from pipeline.registry.keys import key_of
from pipeline.registry.lineage import lineage
from pipeline.registry.stores.local import LocalStore
from pipeline.registry.verify import verify, verify_ids
from stages.errors import BadInput
from tests.conftest import tensors


def finished(directory: Path, content: str = "weights") -> Path:
    (directory / "data").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(tensors(content))
    (directory / "data" / "rows.jsonl").write_text("{}\n")
    return directory


def draft(name: str = "k", stage: str = "warmup", inputs: dict[str, Source] | None = None) -> Artifact:
    return Artifact(
        id="",
        key=key_of({"name": name}),
        kind="sft",
        stage=stage,
        created="",
        outputs={"policy": ".", "data": "data"},
        files=(),
        inputs=inputs or {},
        format=None,
        config={},
        identity={"name": name},
        metrics={},
        provenance={},
    )


OWNER = "user"


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def test_what_is_published_is_found_by_key_and_by_id_and_leaves_where_it_was(registry, tmp_path):
    out = finished(tmp_path / "out")
    artifact = registry.publish(out, draft(), OWNER).artifact
    assert not out.exists()
    assert registry.find(artifact.key) == registry.open(artifact.id) == artifact
    assert (registry.path(artifact, "data") / "rows.jsonl").read_text() == "{}\n"
    assert {file.path for file in artifact.files} == {"model.safetensors", "data/rows.jsonl"}
    assert artifact.id.startswith("warmup-") and len(artifact.id) == len("warmup-") + 8


def test_a_small_file_of_an_output_is_read_where_it_is(registry, tmp_path):
    artifact = registry.publish(finished(tmp_path / "out"), draft(), OWNER).artifact
    assert registry.content(artifact, "data", "rows.jsonl") == b"{}\n"
    assert registry.content(artifact, "policy", "rows.jsonl") is None


def test_without_a_manifest_a_directory_is_no_artifact(registry, tmp_path):
    artifact = registry.publish(finished(tmp_path / "out"), draft(), OWNER).artifact
    (registry.path(artifact) / "artifact.json").unlink()
    assert registry.find(artifact.key) is None and registry.artifacts() == []
    with pytest.raises(BadInput, match="there is no artifact"):
        registry.open(artifact.id)


def test_the_first_maker_of_a_key_wins_and_the_other_leaves_nothing(registry, tmp_path):
    first = registry.publish(finished(tmp_path / "a"), draft(), OWNER).artifact
    second = registry.publish(finished(tmp_path / "b", "other"), draft(), OWNER).artifact
    assert second == first
    assert [artifact.id for artifact in registry.artifacts()] == [first.id]


def test_a_key_whose_artifact_is_gone_or_void_can_be_made_again(registry, tmp_path):
    first = registry.publish(finished(tmp_path / "a"), draft(), OWNER).artifact
    registry.store.append(f"keys/{first.key}", {"void": first.id, "reason": "a test"})
    assert registry.find(first.key) is None
    again = registry.publish(finished(tmp_path / "b"), draft(), OWNER).artifact
    assert again.id != first.id and registry.find(first.key) == again


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "model.pkl", "code.py", "noextension"])
def test_an_unsafe_kind_of_file_is_never_published(name, registry, tmp_path):
    out = finished(tmp_path / "out")
    (out / name).write_text("x")
    with pytest.raises(UnsafeFile, match=name):
        registry.publish(out, draft(), OWNER)
    assert out.exists() and registry.artifacts() == []


def test_a_link_is_never_published(registry, tmp_path):
    out = finished(tmp_path / "out")
    (out / "link.json").symlink_to("/etc/passwd")
    with pytest.raises(UnsafeFile, match="link"):
        registry.publish(out, draft(), OWNER)


def test_a_directory_from_another_file_system_is_copied_and_leaves_nothing_behind(registry):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        out = finished(Path(elsewhere, "out"))
        assert out.stat().st_dev != registry.store.root.parent.stat().st_dev, "the test needs two file systems"
        artifact = registry.publish(out, draft(), OWNER).artifact
        assert not out.exists()
    assert verify(registry, artifact) == []
    assert [path.name for path in (registry.store.root / "artifacts").iterdir()] == [artifact.id]


def test_an_artifact_whose_maker_was_killed_before_it_was_recorded_is_recovered(registry, tmp_path):
    artifact = registry.publish(finished(tmp_path / "out"), draft(), OWNER).artifact
    (registry.store.root / "keys" / artifact.key / "000001.json").unlink()
    assert registry.find(artifact.key) is None
    assert registry.recover(artifact.key, artifact.stage, OWNER) == artifact == registry.find(artifact.key)


def test_a_void_artifact_is_not_recovered(registry, tmp_path):
    artifact = registry.publish(finished(tmp_path / "out"), draft(), OWNER).artifact
    registry.void(artifact, "a test")
    assert registry.recover(artifact.key, artifact.stage, OWNER) is None is registry.find(artifact.key)


@pytest.mark.parametrize("path", ["../x", "/etc", "a/../../x"])
def test_an_output_that_leaves_the_artifact_is_refused(path):
    with pytest.raises(ValueError, match="string_pattern_mismatch"):
        Artifact.model_validate({**draft().model_dump(), "outputs": {"policy": path}})


def test_verify_names_every_file_that_changed_went_or_came(registry, tmp_path):
    artifact = registry.publish(finished(tmp_path / "out"), draft(), OWNER).artifact
    assert verify(registry, artifact) == []
    directory = registry.path(artifact)
    (directory / "model.safetensors").write_bytes(tensors("weightz"))
    (directory / "data" / "rows.jsonl").unlink()
    (directory / "extra.txt").write_text("")
    said = verify(registry, artifact)
    assert len(said) == 3 and all(artifact.id in line for line in said)
    assert (
        "model.safetensors: its bytes" in said[1]
        and "rows.jsonl: is gone" in said[0]
        and "extra.txt: was not published" in said[2]
    )


def test_lineage_goes_down_to_the_base_and_says_what_is_gone(registry, tmp_path):
    base = Source(id=None, output="policy", key="base-key", name="/models/tiny")
    first = registry.publish(finished(tmp_path / "a"), draft("1", "warmup", {"policy": base}), OWNER).artifact
    source = Source(id=first.id, output="policy", key=first.key, name="warmup")
    second = registry.publish(finished(tmp_path / "b"), draft("2", "rl1", {"policy": source}), OWNER).artifact
    tree = lineage(registry, second)
    assert tree.inputs[0].id == first.id and tree.inputs[0].inputs[0].name == "/models/tiny"
    (registry.path(first) / "artifact.json").unlink()
    gone = lineage(registry, second).inputs[0]
    assert (gone.whole, gone.kind) == (False, "gone")


def test_a_root_that_is_a_file_and_a_registry_of_another_format_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        Registry(tmp_path / "file" / "registry")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "format.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(BadInput, match="format"):
        Registry(tmp_path / "new")


def test_no_name_leaves_the_root(tmp_path):
    store = LocalStore(tmp_path / "r")
    for name in ("../x", "a/../../x", "/etc/passwd"):
        with pytest.raises(ValueError, match="leaves the registry"):
            store.path(name)


def _append(root: Path, writer: int) -> None:
    for i in range(25):
        LocalStore(root).append("log", {"writer": writer, "i": i})


def test_an_append_only_log_loses_nothing_to_eight_writers(tmp_path):
    """Numbers are dense, and every entry is there once."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append, args=(tmp_path, writer)) for writer in range(8)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    store = LocalStore(tmp_path)
    assert store.names("log") == [f"{n:06d}.json" for n in range(1, 201)]
    assert {(entry["writer"], entry["i"]) for entry in store.entries("log")} == {
        (w, i) for w in range(8) for i in range(25)
    }


def test_a_run_is_remembered_with_its_state(registry):
    done = runs.start(registry, "demo", "name: demo\n", {"steps": []})
    runs.record(registry, done, "done")
    running = runs.start(registry, "demo", "name: demo\n", {"steps": []})
    assert {run.run: run.state for run in runs.runs(registry)} == {done: "done", running: "running"}
    assert [run.run for run in runs.runs(registry)] == [running, done], "newest first"


def test_a_run_whose_process_is_gone_was_interrupted(registry):
    run = runs.start(registry, "demo", "", {"steps": []})
    event = registry.store.path(f"runs/{run}/events/000001.json")
    event.write_text(event.read_text().replace('"process": "', '"process": "9'))
    assert runs.runs(registry)[0].state == "interrupted"


def test_what_cannot_be_read_just_now_is_not_judged(tmp_path):
    """As another user's file, or a disk that fails: neither void nor cleaned."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        registry = Registry(Path(directory, "registry"))
        first = registry.publish(finished(tmp_path / "a"), draft("1"), OWNER).artifact
        source = Source(id=first.id, output="policy", key=first.key, name="warmup", digest=first.digest)
        second = registry.publish(finished(tmp_path / "b"), draft("2", "rl1", {"policy": source}), OWNER).artifact
        set_to(registry, "prod", second)
        for one in (first, second):
            registry.release(one.id, OWNER)
        for hidden in ("artifact.json", "model.safetensors"):
            (registry.path(second) / hidden).chmod(0)
            assert unreadable(lambda: verify_ids(registry))
            assert hidden != "artifact.json" or unreadable(
                lambda: gc.clean(registry, Path(directory, "work"), timedelta(0))
            )
            (registry.path(second) / hidden).chmod(0o644)
        assert registry.find(first.key) == first and registry.find(second.key) == second


def unreadable(act) -> bool:
    """Whether somebody else, who may not read everything, is told so."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    try:
        if os.geteuid() == 0:
            os.seteuid(65534)
        act()
    except Unreadable:
        os._exit(0)
    finally:
        os._exit(1)


def test_a_clean_up_stops_at_a_manifest_that_is_not_one_rather_than_lose_what_it_was_made_from(registry, tmp_path):
    artifact = registry.publish(finished(tmp_path / "a"), draft(), OWNER).artifact
    (registry.path(artifact) / "artifact.json").write_text("{")
    with pytest.raises(BadInput, match=artifact.id):
        gc.clean(registry, tmp_path / "work", timedelta(0))


def test_a_clean_up_leaves_hidden_files_that_are_not_its_own(registry, tmp_path):
    registry.initialise()
    old = datetime.now(UTC) - timedelta(days=30)
    for name in (".gitignore", ".env", f".x.json.{uuid.uuid4().hex}"):
        (registry.store.root / name).touch()
        os.utime(registry.store.root / name, (old.timestamp(), old.timestamp()))
    gc.clean(registry, tmp_path / "work", timedelta(0))
    assert {path.name for path in registry.store.root.glob(".*")} == {".gitignore", ".env"}


def test_what_is_made_again_is_recovered_too(registry, tmp_path):
    first = registry.publish(finished(tmp_path / "a"), draft(), OWNER).artifact
    registry.void(first, "a test")
    second = registry.publish(finished(tmp_path / "b"), draft(), OWNER).artifact
    log = sorted((registry.store.root / "keys" / first.key).iterdir())
    log[-1].unlink()
    assert registry.find(first.key) is None
    assert registry.recover(first.key, first.stage, OWNER) == second == registry.find(first.key)


def test_a_run_of_another_machine_that_is_silent_was_interrupted(registry):
    run = runs.start(registry, "tiny", "recipe", {"steps": [], "selection": {}})
    event = registry.store.path(f"runs/{run}/events/000001.json")
    said = {**json.loads(event.read_text()), "host": "elsewhere"}
    event.write_text(json.dumps(said))
    assert runs.state(registry, run) == "running"
    event.write_text(json.dumps({**said, "at": (datetime.now(UTC) - timedelta(hours=4)).isoformat()}))
    assert runs.state(registry, run) == "interrupted" and runs.unfinished(registry, "tiny", "recipe".__eq__, {}) == run
    assert (
        runs.unfinished(registry, "tiny", "another".__eq__, {})
        is None
        is runs.unfinished(registry, "tiny", "recipe".__eq__, {"only": "rl1"})
    )


def test_an_unfinished_run_of_another_recipe_is_not_looked_at_any_further(registry):
    """Its plan may be torn."""
    run = runs.start(registry, "tiny", "another", {"steps": [], "selection": {}})
    (registry.store.root / "runs" / run / "plan.json").write_text("{")
    runs.record(registry, run, "stopped")
    assert runs.unfinished(registry, "tiny", "recipe".__eq__, {}) is None


def test_a_run_that_another_process_is_just_starting_is_none_to_go_on_with(registry):
    """Between its plan and its first event a run is no run yet; `switchback run` beside it must not stumble over it."""
    before = runs.start(registry, "tiny", "recipe", {"steps": [], "selection": {}})
    runs.record(registry, before, "failed", message="a test")
    starting = "tiny-99990101-000000-0000"
    registry.store.put_new(f"runs/{starting}/plan.json", {"recipe": "tiny", "steps": [], "selection": {}})
    assert runs.unfinished(registry, "tiny", "recipe".__eq__, {}) == before
    registry.store.put_new(f"runs/{before[:-4]}ffff/plan.json", {"recipe": "tiny"})
    assert runs.unfinished(registry, "tiny", "recipe".__eq__, {}) == before, "nor is one of the same second"
    assert starting not in [run.run for run in runs.runs(registry)]
