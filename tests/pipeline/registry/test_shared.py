"""Two users work in one registry, whatever their umask; and a file system that a registry cannot use is named."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.registry import Registry, runs
from pipeline.registry.aliases import aliases, history, set_to
from pipeline.registry.cleanup.gc import clean
from pipeline.registry.pins import keep, pins
from pipeline.registry.workdir import alone
from stages.errors import BadInput
from stages.job import Execution, Job
from stages.runtime import checkpoints, worker
from tests.artifacts import draft, make
from tests.conftest import ROOT, environment
from tests.crashes import FAILED
from tests.stages.runtime.test_attempts import Logs

TEAM = 20000
A, B = 20001, 20002
STRANGER = 20003
"""Of the same machine, and not of the team."""
RUN = "a-run"
BELONGS = checkpoints.Belongs("a-job", {"processes": 1})
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def as_user(uid: int, umask: int, action: Callable[[], object], groups: tuple[int, ...] = (TEAM,)) -> str:
    """What a user's process says of an action: "" when it ended well, else its last line."""
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            code = FAILED
            try:
                os.setgroups(groups)
                os.setgid(uid)  # the user's own group is his primary one, as useradd makes it
                os.setuid(uid)
                os.umask(umask)
                action()
                code = 0
            except BaseException:
                traceback.print_exc(file=errors)
                errors.flush()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        said = errors.read()
    if status == signal.SIGKILL:
        return "killed"
    assert status in (0, FAILED << 8), said
    return said.splitlines()[-1] if said else ""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may look into, with a team's registry and two homes."""
    with tempfile.TemporaryDirectory(prefix="switchback-team-") as directory:
        place = Path(directory)
        place.chmod(0o755)
        for name, uid in (("a", A), ("b", B), ("s", STRANGER)):
            (place / name).mkdir(mode=0o700)
            os.chown(place / name, uid, uid)
        (place / "team").mkdir()
        os.chown(place / "team", A, TEAM)
        (place / "team").chmod(0o2775)
        yield place


def team(place: Path) -> Registry:
    return Registry(place / "team")


def make_one(place: Path, home: str, name: str, alias: str) -> None:
    """Publish an artifact, point an alias at it, pin it, record a run."""
    registry = team(place)
    artifact = make(registry, place / home / name, draft(name), RUN)
    registry.release(artifact.id, RUN)
    set_to(registry, alias, artifact)
    keep(registry, artifact, "good")
    run = runs.start(registry, "demo", "name: demo\n", {"steps": []})
    runs.record(registry, run, "done")


def move(place: Path, alias: str, stage: str) -> None:
    registry = team(place)
    set_to(registry, alias, registry.artifacts(stage)[-1], reason="better")


def work_on(place: Path) -> None:
    """A step's directory, as an attempt leaves it."""
    registry = team(place)
    with alone(registry, registry.store.work / "0123456789ab", on_wait=lambda pid: None):
        (registry.store.work / "0123456789ab" / "checkpoint-1").mkdir(exist_ok=True)
        (registry.store.work / "0123456789ab" / "checkpoint-1" / "state.json").write_text("{}")


def begin_and_die(place: Path) -> None:
    """A run that is killed without a warning: its job has sealed a checkpoint and is in the middle of the next."""
    registry = team(place)
    work = registry.store.work / "0123456789ab"
    with alone(registry, work, on_wait=lambda pid: None):
        for name in ("files/ab/mine.py", "out/metrics.jsonl", "checkpoint-1/trainer_state.json", "checkpoint-2/half"):
            (work / name).parent.mkdir(parents=True)
            (work / name).write_text("{}")
        (work / "job.json").write_text("{}")
        (work / "checkpoint-1" / "model.safetensors").write_bytes(b"")
        (work / "checkpoint-1" / "model.safetensors").chmod(0o600)  # as safetensors leaves it
        checkpoints.seal(work / "checkpoint-1", 1, BELONGS)
        os.kill(os.getpid(), signal.SIGKILL)


def resume(place: Path) -> None:
    registry = team(place)
    work = registry.store.work / "0123456789ab"
    with alone(registry, work, on_wait=lambda pid: None):
        found = checkpoints.newest(work, BELONGS)
        assert found.checkpoint == work / "checkpoint-1", found
        assert (work / "checkpoint-1" / "model.safetensors").read_bytes() == b""
        for name in ("files", "out", "checkpoint-2"):
            shutil.rmtree(work / name, ignore_errors=name == "checkpoint-2")  # it may have been set aside
        (work / "job.json").write_text("{}")
        checkpoints.clear(work)


def job_in(work: Path) -> None:
    """A job of no library, which leaves a log and a directory."""
    job = Job(
        kind="logs", name="logs", config={"fails": False}, inputs={}, work=str(work), out=str(work / "out"),
        problem=None, rows=None, format=None, seed=0, dtype="float32", execution=Execution(),
    )  # fmt: skip
    assert worker.main(str(job.save()), {"logs": Logs()}) == 0


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_job_writes_for_the_group_of_its_directory(umask, place):
    """It is forked from a process that knows no registry, so it has to ask its directory."""
    work = place / "team" / "work"
    work.mkdir()
    os.chown(work, A, TEAM)
    work.chmod(0o2775)
    assert as_user(A, umask, lambda: job_in(work)) == ""
    made = [path for path in work.rglob("*") if path.name != "job.json"]  # the run's, which was forked here
    assert made and all(path.stat().st_mode & 0o060 == 0o060 for path in made)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_another_user_resumes_what_was_killed_without_a_warning(umask, place):
    assert as_user(A, umask, lambda: begin_and_die(place)) == "killed"
    assert as_user(B, umask, lambda: resume(place)) == ""
    assert not list((place / "team" / "work" / "0123456789ab").glob("checkpoint-*"))


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_two_users_move_one_alias_and_resume_one_step_under_any_umask(umask, place):
    assert as_user(A, umask, lambda: make_one(place, "a", "1", "prod")) == ""
    assert as_user(B, umask, lambda: make_one(place, "b", "2", "canary")) == ""
    for uid, alias, stage in ((B, "prod", "s2"), (A, "prod", "s1"), (A, "canary", "s1"), (B, "canary", "s2")):
        assert as_user(uid, umask, lambda alias=alias, stage=stage: move(place, alias, stage)) == ""
    for uid in (A, B, A):
        assert as_user(uid, umask, lambda: work_on(place)) == ""
    registry = team(place)
    assert [one.number for one in history(registry, "prod")] == [1, 2, 3]
    assert len(runs.runs(registry)) == 2 and len(pins(registry)) == 2
    assert as_user(B, umask, lambda: clean(team(place), place / "team" / "work")) == ""
    for path in (place / "team").rglob("*"):
        status = path.stat()
        wanted = 0o2070 if path.is_dir() else 0o060
        assert status.st_gid == TEAM and status.st_mode & wanted == wanted, path
        assert not status.st_mode & stat.S_IWOTH, path


def test_what_was_made_elsewhere_comes_into_the_team_too(place):
    """A directory that is renamed keeps the group it was made with."""
    (place / "team").chmod(0o775)  # without setgid the kernel does not hand the group on
    assert as_user(A, 0o077, lambda: make_one(place, "a", "1", "prod")) == ""
    assert as_user(B, 0o022, lambda: move(place, "prod", "s1")) == ""


def test_a_registry_of_ones_own_stays_ones_own(place):
    (place / "team").chmod(0o700)
    assert as_user(A, 0o077, lambda: make_one(place, "a", "1", "prod")) == ""
    own = [path for path in (place / "team").rglob("*") if path.is_dir() or "artifacts" not in path.parts]
    assert not [path for path in own if path.stat().st_mode & 0o077]
    (place / "team").chmod(0o2755)
    assert as_user(A, 0o022, lambda: make_one(place, "a", "2", "canary")) == ""
    assert not [path for path in (place / "team").rglob("*") if path.stat().st_mode & 0o022]


def test_one_users_unreadable_file_does_not_hide_the_others(place, caplog):
    """As a registry from before files were shared may hold them."""
    for home, uid, name in (("a", A, "1"), ("b", B, "2")):
        assert as_user(uid, 0o022, lambda home=home, name=name: make_one(place, home, name, f"of-{home}")) == ""
    for path in (place / "team").rglob("*"):
        if path.is_file() and path.stat().st_uid == A and path.name != "format.json":
            path.chmod(0o600)

    def look() -> None:
        registry = team(place)
        assert list(aliases(registry, strict=False)) == ["of-b"]
        assert [one.stage for one in registry.artifacts()] == ["s2"]
        assert len(runs.runs(registry)) == 1 and len(pins(registry, strict=False)) == 1

    assert as_user(B, 0o022, look) == ""
    refused = as_user(B, 0o022, lambda: clean(team(place), place / "team" / "work"))
    assert "cannot be read (Permission denied). Fix: make it readable" in refused, "a clean-up must know every pin"


def test_a_step_that_another_user_does_not_share_is_one_line(place):
    assert as_user(A, 0o022, lambda: work_on(place)) == ""
    (place / "team" / "work" / "0123456789ab" / "run.lock").chmod(0o600)
    assert as_user(B, 0o022, lambda: work_on(place)).startswith(
        f"stages.errors.BadInput: work: {place}/team/work/0123456789ab is in use by another user (found Permission"
    )


def test_a_stranger_reads_and_writes_nothing(place):
    (place / "team").chmod(0o2770)
    assert as_user(A, 0o022, lambda: make_one(place, "a", "1", "prod")) == ""
    assert "Permission denied" in as_user(STRANGER, 0o022, lambda: move(place, "prod", "s1"), groups=())


# file systems


NO_LINK = """
#include <errno.h>
#include <stdlib.h>
static int no(void) { errno = atoi(getenv("TEST_LINK_ERRNO")); return -1; }
int link(const char *a, const char *b) { return no(); }
int linkat(int x, const char *a, int y, const char *b, int f) { return no(); }
"""


@pytest.fixture(scope="module")
def no_links(tmp_path_factory) -> Path:
    """A library under which link(2) fails as on vfat (EPERM), gcsfuse (ENOSYS) and SMB (ENOTSUP)."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("no-links")
    (directory / "no_link.c").write_text(NO_LINK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", directory / "no_link.so", directory / "no_link.c"], check=True)
    return directory / "no_link.so"


@pytest.mark.parametrize("name", ["EPERM", "ENOSYS", "ENOTSUP"])
def test_a_file_system_without_hard_links_is_named(name, no_links, tmp_path):
    import errno

    env = environment(LD_PRELOAD=str(no_links), TEST_LINK_ERRNO=str(getattr(errno, name)))
    code = "import sys; from pipeline.registry import Registry; Registry(sys.argv[1]).initialise()"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "r"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1].startswith(
        f"stages.errors.BadInput: registry: {tmp_path}/r is on a file system without hard links (found "
    )
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == []


def test_a_name_that_is_taken_is_no_file_system_without_links(tmp_path):
    registry = Registry(tmp_path / "r")
    registry.initialise()
    assert not registry.store.put("format.json", b"{}")
    with pytest.raises(BadInput, match="another format"):
        (tmp_path / "r" / "format.json").write_text("{}")
        Registry(tmp_path / "r")
