"""Clean-up: what somebody needs stays, what nobody needs goes, and what went is remembered."""

from __future__ import annotations

import fcntl
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.registry import Artifact, Registry, runs
from pipeline.registry.aliases import remove, set_to
from pipeline.registry.cleanup.gc import DOUBTED, Survey, clean, survey
from pipeline.registry.pins import keep, let_go, pins
from pipeline.registry.tombstones import Tombstone, tombstone
from tests.artifacts import draft, make, wrong
from tests.conftest import printed_json, run_cli

NO_GRACE, A_YEAR = timedelta(0), timedelta(days=365)
OWNER = "maker"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "registry")
    registry.initialise()
    return registry


def made(registry: Registry, name: str, kind: str = "sft", parent: Artifact | None = None) -> Artifact:
    artifact = make(registry, registry.store.work / "out", draft(name, kind, parent), OWNER)
    registry.release(artifact.id, OWNER)
    return artifact


def cleaned(registry: Registry, grace: timedelta = NO_GRACE, hours: float = 0) -> Survey:
    return clean(registry, registry.store.work, grace, datetime.now(UTC) + timedelta(hours=hours))


def there(registry: Registry) -> set[str]:
    return {artifact.id for artifact in registry.artifacts()}


def test_what_an_alias_or_a_user_needs_stays_with_its_lineage_and_evaluations(registry):
    base = made(registry, "base.evaluate", "evaluate")
    parent = made(registry, "parent")
    child = made(registry, "child", parent=parent)
    scores = made(registry, "child.evaluate", "evaluate", child)
    pinned, doomed = made(registry, "pinned"), made(registry, "doomed")
    of_doomed = made(registry, "doomed.evaluate", "evaluate", doomed)
    set_to(registry, "prod", child)
    keep(registry, pinned, "")
    found = cleaned(registry)
    assert there(registry) == {base.id, parent.id, child.id, scores.id, pinned.id}
    assert {one.name for one in found.removals} == {doomed.id, of_doomed.id}
    assert found.kept[child.id] == "alias prod" and found.kept[parent.id] == f"{child.id} was made from it"
    assert wrong(registry) == []
    remove(registry, "prod")
    let_go(registry, pinned.id)
    cleaned(registry)
    assert there(registry) == set()


def test_what_was_cleaned_is_void_is_remembered_and_can_be_made_again(registry):
    artifact = made(registry, "1")
    cleaned(registry)
    assert registry.find(artifact.key) is None and not registry.usable(artifact) and not registry.hold(artifact, OWNER)
    found = tombstone(registry, artifact.id)
    assert found and found.artifact == artifact and found.at
    assert tombstone(registry, "another-01234567") is None
    again = made(registry, "1")
    assert again.id != artifact.id and registry.find(artifact.key) == again


def test_what_is_younger_than_the_grace_stays_with_what_it_was_made_from(registry):
    parent = made(registry, "parent")
    path = registry.path(parent) / "artifact.json"
    path.write_text(path.read_text().replace(parent.created, "2020-01-01T00:00:00.000000+00:00"))
    child = made(registry, "child", parent=parent)
    assert cleaned(registry, timedelta(hours=24)).removals == () and there(registry) == {parent.id, child.id}
    cleaned(registry, timedelta(hours=24), hours=25)
    assert there(registry) == set()


@pytest.mark.parametrize(("end", "hours", "stays"), [
    (None, 23, True), (None, 25, False), ("failed", 23, True), ("stopped", 25, False), ("done", 0, False),
])  # fmt: skip
def test_what_a_run_holds_stays_as_long_as_the_run_may_go_on(end, hours, stays, registry):
    run = runs.start(registry, "demo", "", {"steps": []})
    artifact = made(registry, "1")
    assert registry.hold(artifact, run)
    if end:
        runs.record(registry, run, end)
    cleaned(registry, hours=hours)
    assert there(registry) == ({artifact.id} if stays else set())
    assert bool(pins(registry)) is stays, "a dead run's pins go, too"


def test_a_run_that_beats_is_alive_for_another_day(registry):
    run = runs.start(registry, "demo", "", {"steps": []})
    assert registry.store.last(f"runs/{run}/events") == 1
    for _ in range(3):
        runs.beat(registry, run)
    assert registry.store.last(f"runs/{run}/events") == 1, "nothing is written within the hour"
    runs.beat(registry, run, every=0)
    assert runs.events(registry, run)[-1]["event"] == "heartbeat" and runs.state(registry, run) == "running"
    first = registry.store.path(f"runs/{run}/events/000001.json")
    first.write_text(first.read_text().replace('"at": "2', '"at": "1'))
    now = datetime.now(UTC)
    assert runs.alive(registry, run, now) is True and runs.alive(registry, run, now + timedelta(hours=25)) is False
    assert runs.alive(registry, "nosuch", now) is None


def test_somebody_who_was_killed_while_moving_an_alias_holds_on_for_a_day(registry):
    artifact = made(registry, "1")
    registry.pin(artifact.id, "alias-0123")
    cleaned(registry, hours=23)
    assert there(registry) == {artifact.id}
    cleaned(registry, hours=25)
    assert there(registry) == set() and pins(registry) == []


def test_without_apply_nothing_is_changed(registry):
    made(registry, "1")
    before = sorted(registry.store.root.rglob("*"))
    found = survey(registry, registry.store.work, NO_GRACE)
    assert [one.what for one in found.removals] == ["artifact"] and found.frees == sum(
        one.size for one in registry.artifacts()
    )
    assert sorted(registry.store.root.rglob("*")) == before


def test_resume_checkpoints_go_once_their_stage_is_published_and_no_job_is_at_them(registry):
    published, unpublished = made(registry, "1"), draft("2")
    for key in (published.key, unpublished.key):
        job = registry.store.work / key[:12]
        (job / "checkpoint-10").mkdir(parents=True)
        (job / "checkpoint-10" / "optimizer.pt").write_bytes(b"x" * 1000)
        (job / "lock").write_text("")
    held = registry.store.work / published.key[:12]
    (held / ".removed-checkpoint-5").mkdir()
    with (held / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cleaned(registry, A_YEAR).removals == ()
    found = cleaned(registry, A_YEAR)
    assert [(one.what, one.bytes) for one in found.removals] == [("checkpoint", 1000), ("checkpoint", 0)]
    assert not list(held.glob(".removed-*"))
    left = [path.parent.name for path in registry.store.work.glob("*/checkpoint-*")]
    assert left == [unpublished.key[:12]] and (held / "lock").exists()


def test_what_killed_writers_left_goes_and_what_is_being_written_stays(registry):
    artifact = made(registry, "1")
    root = registry.store.root
    for name in (".copy-01234567", "half-01234567", ".live-01234567"):
        (root / "artifacts" / name).mkdir()
        (root / "artifacts" / name / "model.safetensors").write_text("half")
    old, young = (root / "keys" / artifact.key / f".000002.json.{age}" for age in ("old", "young"))
    for partial in (old, young):
        partial.write_text("half")
    os.utime(old, (0, 0))
    live = os.open(root / "artifacts" / ".live-01234567", os.O_RDONLY)
    fcntl.flock(live, fcntl.LOCK_EX)
    found = cleaned(registry, A_YEAR)
    assert {Path(one.name).name for one in found.removals} == {".copy-01234567", "half-01234567", old.name}
    assert found.frees == 12
    assert {path.name for path in (root / "artifacts").iterdir()} == {artifact.id, ".live-01234567"}
    assert young.exists() and not old.exists()
    os.close(live)


def test_what_is_wanted_again_in_the_middle_of_a_clean_up_is_given_back(registry):
    """As a killed clean-up leaves it: condemned, and then pinned by somebody who had looked before."""
    artifact, other = made(registry, "1"), made(registry, "2")
    for one in (artifact, other):
        content = Tombstone(artifact=one, why="a test", at=datetime.now(UTC)).model_dump(mode="json")
        registry.store.put_new(f"tombstones/{one.id}.json", content)
        registry.void(one, DOUBTED)
    registry.pin(artifact.id, "user")
    assert registry.find(artifact.key) is None
    cleaned(registry)
    assert registry.find(artifact.key) == artifact and tombstone(registry, artifact.id) is None
    assert there(registry) == {artifact.id} and tombstone(registry, other.id)


def test_what_failed_verification_stays_void_when_it_is_wanted(registry):
    artifact = made(registry, "1")
    keep(registry, artifact, "")
    registry.void(artifact, "failed verification")
    cleaned(registry)
    assert there(registry) == {artifact.id} and registry.find(artifact.key) is None


def test_voiding_what_is_not_the_newest_leaves_the_newest(registry):
    """Two makers of one key, and the older one is cleaned."""
    older = made(registry, "1")
    registry.void(older, "a test")
    newer = made(registry, "1")
    registry.store.append(f"keys/{older.key}", {"void": older.id, "reason": "cleaned"})
    assert registry.find(older.key) == newer
    keep(registry, newer, "")
    cleaned(registry)
    assert there(registry) == {newer.id} and registry.find(older.key) == newer


def test_of_two_makers_the_one_that_was_killed_before_it_gave_way_is_cleaned(registry):
    first = made(registry, "1")
    keep(registry, first, "")
    directory = registry.path(first).with_name("s1-01234567")
    directory.mkdir()
    for file in first.files:
        (directory / file.path).parent.mkdir(exist_ok=True)
        (directory / file.path).write_bytes((registry.path(first) / file.path).read_bytes())
    (directory / "artifact.json").write_text(first.model_copy(update={"id": directory.name}).model_dump_json())
    assert len(there(registry)) == 2
    cleaned(registry)
    assert there(registry) == {first.id} and registry.find(first.key) == first


def test_the_command_shows_what_would_go_and_removes_it_when_told(registry):
    artifact, at = made(registry, "1"), ("--registry", registry.url)
    shown = run_cli("gc", "--grace", "0", *at)
    assert shown.returncode == 0 and artifact.id in shown.stdout and "--apply does it" in shown.stdout
    assert there(registry) == {artifact.id}
    assert printed_json("gc", "--json", *at)["removals"] == [], "it is younger than 24 h"
    found = printed_json("gc", "--grace", "0s", "--apply", "--json", *at)
    assert found["applied"] and found["frees"] == artifact.size and there(registry) == set()
    refused = run_cli("gc", "--grace", "soon", *at)
    assert refused.returncode == 2 and "expected a time such as" in refused.stderr
