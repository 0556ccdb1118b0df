"""A registry that is killed at any moment: every change to the file system that it makes, killed once just before, and
once with the file half written."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.registry import Artifact, Registry, runs
from pipeline.registry.aliases import aliases, current, remove, set_to
from pipeline.registry.cleanup.gc import DOUBTED, clean, survey
from pipeline.registry.pins import keep, let_go
from pipeline.registry.tombstones import Tombstone, tombstone
from stages.errors import BadInput
from tests.artifacts import draft, finished, make, wrong
from tests.conftest import SWITCHBACK, environment, run_cli
from tests.crashes import crash_at, is_write, points, stopped_at
from tests.storm import storm

RUN = "a-run"
A_YEAR = timedelta(days=365)


def later() -> datetime:
    """When nothing that was killed today counts any more."""
    return datetime.now(UTC) + timedelta(hours=25)


def registry_of(root: Path) -> Registry:
    return Registry(root / "registry")


def make_in(root: Path, name: str, owner: str = RUN, kind: str = "sft", parent: Artifact | None = None) -> Artifact:
    return make(registry_of(root), root / "work" / name, draft(name, kind, parent), owner)


def key(name: str) -> str:
    return draft(name).key


class Scenario(NamedTuple):
    """Something a registry does. Both take the directory that `registry` and `work` lie in."""

    before: Callable[[Path], object]
    """What is there."""
    does: Callable[[Path], object]
    """What is killed, and done again."""
    done: Callable[[Path], bool]
    """What must have come of it in the end."""


# what a registry does


def nothing(root: Path) -> None:
    (root / "work").mkdir()


def one(root: Path) -> None:
    nothing(root)
    make_in(root, "1")
    registry_of(root).release(registry_of(root).artifacts()[0].id, RUN)


def run_of_a_recipe(root: Path) -> None:
    registry = registry_of(root)
    run = runs.start(registry, "demo", "name: demo\n", {"steps": []})
    runs.record(registry, run, "step", step="1")
    runs.beat(registry, run, every=0)
    runs.record(registry, run, "done")


def from_another_file_system(root: Path) -> None:
    assert elsewhere(root).parent.stat().st_dev != root.stat().st_dev, "the test needs two file systems"
    make(registry_of(root), elsewhere(root), draft("1"), RUN)


def elsewhere(root: Path) -> Path:
    """A place on another file system, always the same for the same directory."""
    return Path(tempfile.gettempdir(), f"switchback-test-{'-'.join(root.parts[-2:])}")


def lose_a_race(root: Path) -> None:
    """Publish what somebody else has published meanwhile."""
    shutil.rmtree(root / "work" / "2", ignore_errors=True)
    registry_of(root).publish(finished(root / "work" / "2"), draft("1"), RUN)


def unrecorded(root: Path) -> None:
    one(root)
    shutil.rmtree(root / "registry" / "keys")


def void(root: Path) -> None:
    for artifact in registry_of(root).artifacts():
        registry_of(root).void(artifact, "a test")


def hold(root: Path) -> None:
    registry = registry_of(root)
    artifact = registry.artifacts()[0]
    registry.hold(artifact, RUN)
    registry.release(artifact.id, RUN)
    if not (root / "registry" / "pins" / artifact.id / "user.json").exists():
        keep(registry, artifact, "good")
    let_go(registry, artifact.id)


def move_alias(root: Path) -> None:
    registry = registry_of(root)
    set_to(registry, "prod", registry.artifacts()[0], reason="a test")
    remove(registry, "canary") if current(registry, "canary") else None


def with_alias(root: Path) -> None:
    one(root)
    set_to(registry_of(root), "canary", registry_of(root).artifacts()[0])


def much_to_clean(root: Path) -> None:
    """Of everything that a clean-up meets, one."""
    nothing(root)
    registry = registry_of(root)
    parent = make_in(root, "parent")
    kept = make_in(root, "kept", parent=parent)
    make_in(root, "evaluation", kind="evaluate", parent=kept)
    set_to(registry, "prod", kept)
    pinned = make_in(root, "pinned")
    held = make_in(root, "held", runs.start(registry, "live", "", {"steps": []}))
    for name in ("doomed", "doomed-too"):
        make_in(root, name)
    lost = make_in(root, "lost")
    shutil.rmtree(root / "registry" / "keys" / lost.key)
    for artifact in registry.artifacts():
        registry.release(artifact.id, RUN)
    keep(registry, pinned, "good")
    registry.pin(held.id, ended(registry))
    clean_up_was_killed_at(registry, pinned)
    (root / "registry" / "artifacts" / "half-01234567").mkdir()
    (root / "registry" / "artifacts" / "half-01234567" / "model.safetensors").write_text("half")
    stale = root / "registry" / "keys" / held.key / ".000009.json.0"
    stale.write_text("half")
    os.utime(stale, (0, 0))
    for n in (10, 20):
        (root / "work" / held.key[:12] / f"checkpoint-{n}").mkdir(parents=True)
        (root / "work" / held.key[:12] / f"checkpoint-{n}" / "optimizer.pt").write_text("moments")
    (root / "work" / held.key[:12] / "lock").write_text("1")


def ended(registry: Registry) -> str:
    run = runs.start(registry, "dead", "", {"steps": []})
    runs.record(registry, run, "done")
    return run


def clean_up_was_killed_at(registry: Registry, artifact: Artifact) -> None:
    """Condemned, and then pinned after all."""
    content = Tombstone(artifact=artifact, why="a test", at=datetime.now(UTC)).model_dump(mode="json")
    registry.store.put_new(f"tombstones/{artifact.id}.json", content)
    registry.void(artifact, DOUBTED)


def clean_up(root: Path) -> None:
    clean(registry_of(root), root / "work", timedelta(0))


def is_clean(root: Path) -> bool:
    registry = registry_of(root)
    whole = {artifact.stage for artifact in registry.artifacts()}
    gone = {
        found.artifact.stage for name in registry.store.names("tombstones") if (found := tombstone(registry, name[:-5]))
    }
    there = all(registry.find(key(name)) for name in ("parent", "pinned", "held"))
    checkpoints = list(root.glob("work/*/checkpoint-*"))
    return (whole, gone, there, checkpoints) == (
        {"sparent", "skept", "sevaluation", "spinned", "sheld"}, {"sdoomed", "sdoomed-too", "slost"}, True, [],
    )  # fmt: skip


def is_made(root: Path) -> bool:
    return registry_of(root).find(key("1")) is not None


SCENARIOS = {
    "a run": Scenario(
        nothing, run_of_a_recipe, lambda root: "done" in [run.state for run in runs.runs(registry_of(root))]
    ),
    "publish": Scenario(nothing, lambda root: make_in(root, "1"), is_made),
    "publish from another file system": Scenario(nothing, from_another_file_system, is_made),
    "publish what was made already": Scenario(one, lose_a_race, is_made),
    "recover": Scenario(
        unrecorded,
        lambda root: make_in(root, "1"),
        lambda root: len(registry_of(root).artifacts()) == 1 and is_made(root),
    ),
    "void": Scenario(one, void, lambda root: not is_made(root)),
    "hold and pin": Scenario(one, hold, lambda root: not list(root.glob("registry/pins/*/*.json"))),
    "move aliases": Scenario(with_alias, move_alias, lambda root: list(aliases(registry_of(root))) == ["prod"]),
    "clean up": Scenario(much_to_clean, clean_up, is_clean),
}


# the tests


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory where waiting for the disk costs nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@cache
def points_of(name: str) -> list[str]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        SCENARIOS[name].before(Path(root))
        found = points(lambda: SCENARIOS[name].does(Path(root)), Path(root))
        shutil.rmtree(elsewhere(Path(root)), ignore_errors=True)
        return found


def test_there_are_fault_points_at_every_kind_of_change():
    distinct = {point for name in SCENARIOS for point in points_of(name)}
    assert len(distinct) >= 25
    assert {point.split()[0] for point in distinct} >= {
        "open",
        "os.link",
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
    }
    for place in ("format.json", "artifacts/", "keys/", "refs/", "pins/", "tombstones/", "/events/"):
        assert any(place in point for point in distinct), place


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_any_point_it_ends_well_when_done_again(name, memory):
    before, does, done = SCENARIOS[name]
    (memory / "start").mkdir()
    before(memory / "start")
    for n, point in enumerate(points_of(name)):
        for mode in ("before", "torn") if is_write(point) else ("before",):
            root = Path(shutil.copytree(memory / "start", memory / f"{n}-{mode}", copy_function=shutil.copy2))
            where = f"killed at {n}, {mode} {point}"
            assert crash_at(partial(does, root), root, n, mode), where
            assert wrong(registry_of(root)) == [], where
            does(root)
            assert done(root), where
            assert wrong(registry_of(root)) == [], where
            leaves_no_rubbish(root, where)
            shutil.rmtree(root)
            shutil.rmtree(elsewhere(root), ignore_errors=True)


def leaves_no_rubbish(root: Path, where: str) -> None:
    """A day later, one clean-up finds what was left, and a second one nothing."""
    registry = registry_of(root)
    clean(registry, root / "work", A_YEAR, later())
    assert survey(registry, root / "work", A_YEAR, later()).removals == (), where
    assert [path for path in registry.store.root.rglob(".*") if path.is_file()] == [], where
    assert {path.name for path in root.glob("registry/artifacts/*")} == {one.id for one in registry.artifacts()}, where
    assert wrong(registry) == [], where


def alias_of(root: Path, *names: str) -> None:
    """Move an alias to what was published under these names, where it still is."""
    registry = registry_of(root)
    for artifact in registry.artifacts():
        if artifact.stage in {f"s{name}" for name in names}:
            with suppress(BadInput):
                set_to(registry, "best", artifact)


def use(root: Path, name: str) -> None:
    """As a run does: make or take what there is, make something of it, and let go of both once an alias points at
    that."""
    registry = registry_of(root)
    parent = make_in(root, name)
    assert registry.get(parent.id), "what a run holds is there"
    child = make_in(root, f"of-{name}", parent=parent)
    assert registry.get(child.id) and registry.get(parent.id), "what a run holds is there"
    registry.release(parent.id, RUN)
    set_to(registry, "best", child)
    registry.release(child.id, RUN)


BESIDE = {
    "an alias is moved": lambda root: alias_of(root, "doomed", "doomed-too", "pinned"),
    "a run uses what would go": lambda root: use(root, "doomed"),
    "a run recovers what would go": lambda root: use(root, "lost"),
    "another clean-up": clean_up,
}


@pytest.mark.parametrize("name", BESIDE)
def test_whatever_happens_in_the_middle_of_a_clean_up_or_around_it_no_alias_is_broken(name, memory):
    """One stands still at each of its points while the other does all that it does; both ways round."""
    (memory / "start").mkdir()
    much_to_clean(memory / "start")
    for first, second in dict.fromkeys([(clean_up, BESIDE[name]), (BESIDE[name], clean_up)]):
        for n in itertools.count():
            root = Path(shutil.copytree(memory / "start", memory / "now"))
            with stopped_at(partial(first, root), root, n) as stands:
                second(root)
            assert wrong(registry_of(root)) == [], n
            leaves_no_rubbish(root, str(n))
            shutil.rmtree(root)
            if not stands:
                break


def test_of_two_clean_ups_that_judge_differently_one_decides(memory):
    """A slow one has looked at the pins; then somebody pins, a fast one sees that and gives the artifact back, and an
    alias is set to it."""
    nothing(memory)
    registry, artifact = registry_of(memory), make_in(memory, "1")
    registry.release(artifact.id, RUN)
    with ExitStack() as slow:
        with standing_at(memory, "os.remove registry/keys"):  # it has condemned, and not looked again
            slow.enter_context(
                standing_at(memory, "os.mkdir registry/keys")
            )  # it has looked again, and is about to say that it is over
            registry.pin(artifact.id, "somebody")
        assert registry.usable(artifact), "the fast one gave it back"
        set_to(registry, "prod", artifact)
        registry.release(artifact.id, "somebody")
    assert wrong(registry) == [] and registry.find(artifact.key) == artifact


@contextmanager
def standing_at(root: Path, start: str) -> Iterator[None]:
    """A clean-up that stands still at the first point whose name starts so."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        copy = Path(shutil.copytree(root, other, dirs_exist_ok=True))
        n = next(n for n, point in enumerate(points(partial(clean_up, copy), copy)) if point.startswith(start))
    with stopped_at(partial(clean_up, root), root, n) as stands:
        assert stands
        yield


def test_a_crash_of_a_crash_is_seen(memory):
    """The tests above can fail: without its last step, a child is not killed, and one that raises says what."""
    nothing(memory)
    count = len(points_of("publish"))
    assert not crash_at(lambda: make_in(memory, "1"), memory, count)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        crash_at(lambda: 1 / 0, memory, 0)


SOME, NAMES = st.integers(0, 3), st.sampled_from(["prod", "best"])
WORK = st.one_of(
    st.tuples(st.just("publish"), SOME, st.none() | SOME),
    st.tuples(st.just("alias"), NAMES, SOME),
    st.tuples(st.just("drop"), NAMES),
    st.tuples(st.just("pin"), SOME),
    st.tuples(st.just("unpin"), SOME),
    st.tuples(st.just("gc"), st.booleans()),
)
STEPS = st.lists(
    st.tuples(WORK, st.none() | st.tuples(st.integers(0, 60), st.sampled_from(["before", "torn"]))),
    min_size=4,
    max_size=14,
)


@settings(max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_whatever_is_done_and_killed_in_any_order_no_alias_is_ever_broken(steps):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        root = Path(directory)
        nothing(root)
        for work, crash in steps:
            if crash is None:
                do(root, work)
            else:
                crash_at(partial(do, root, work), root, *crash)
            assert wrong(registry_of(root)) == []
        leaves_no_rubbish(root, str(steps))


def do(root: Path, work: tuple) -> None:
    try:
        DO[work[0]](root, registry_of(root), *work[1:])
    except BadInput as error:
        assert any(said in str(error) for said in ("void or gone", "pinned", "no alias")), error


def publish(root: Path, registry: Registry, name: int, parent: int | None) -> None:
    source = make_in(root, str(parent)) if parent is not None else None
    made = make_in(root, f"{name}-of-{parent}", parent=source)
    for held in (made, source):
        if held:
            registry.release(held.id, RUN)


def at(registry: Registry, i: int) -> list[Artifact]:
    return registry.artifacts()[i : i + 1]


DO = {
    "publish": publish,
    "alias": lambda root, registry, alias, i: [set_to(registry, alias, found) for found in at(registry, i)],
    "drop": lambda root, registry, alias: remove(registry, alias),
    "pin": lambda root, registry, i: [keep(registry, found, "") for found in at(registry, i)],
    "unpin": lambda root, registry, i: [let_go(registry, found.id) for found in at(registry, i)],
    "gc": lambda root, registry, much_later: clean(
        registry, root / "work", timedelta(0), later() if much_later else None
    ),
}


def test_eight_processes_publish_while_a_clean_up_loops_and_no_alias_loses_anything(memory):
    seen = storm(str(memory / "registry"))
    assert seen["moves"] > 100 and seen["cleaned"] > 20 and seen["aliases"] == 3, seen


def without_space(does: Callable[[], object], limit: int) -> str:
    """What is raised in a child that may not write files of more than `limit` bytes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            does()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as said:
        return said.read()


@pytest.mark.parametrize("far", [False, True])
def test_on_a_full_disk_nothing_is_half_there_and_work_goes_on_when_there_is_space(far, memory, tmp_path):
    one(memory)
    registry = registry_of(memory)
    out = (tmp_path if far else memory / "work") / "2"
    finished(out, "x" * 20_000)
    assert "File too large" in without_space(lambda: registry.publish(out, draft("2"), RUN), 10_000 if far else 100)
    assert "File too large" in without_space(lambda: runs.start(registry, "demo", "", {"steps": []}), 10)
    assert "File too large" in without_space(lambda: set_to(registry, "prod", registry.artifacts()[0]), 10)
    assert [artifact.stage for artifact in registry.artifacts()] == ["s1"] and wrong(registry) == []
    assert runs.runs(registry) == [] and aliases(registry) == {}
    registry.publish(out, draft("2"), RUN)
    set_to(registry, "prod", registry.artifacts()[1])
    assert wrong(registry) == []
    leaves_no_rubbish(memory, "a full disk")


def test_a_full_disk_and_a_registry_under_a_file_are_one_line_on_the_command_line(memory):
    one(memory)
    id = registry_of(memory).artifacts()[0].id
    command = ["bash", "-c", f"ulimit -f 0; exec {SWITCHBACK} alias set prod {id} --registry {memory}/registry"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 1 and "the disk is full" in done.stderr and len(done.stderr.splitlines()) == 1
    assert aliases(registry_of(memory)) == {}
    done = run_cli("alias", "ls", "--registry", memory / "registry" / "format.json" / "inner")
    assert done.returncode == 2 and "is a file" in done.stderr and len(done.stderr.splitlines()) == 1
