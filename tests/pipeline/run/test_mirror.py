"""Resume checkpoints that are copied out while a stage runs: whole or not at all, never in its way, and brought back
where they are missing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from pipeline.registry.stores.local import LocalStore
from pipeline.registry.stores.open import open_store
from pipeline.registry.stores.store import Store
from pipeline.run.mirror import Mirror, bring_back, copies, copy_out, forget, mirrored
from stages.runtime.checkpoints import COMPLETE, Entry, Record
from stages.runtime.disk import digest_file
from tests.conftest import SWITCHBACK, environment, run_cli, stage
from tests.pipeline.registry.test_objects import PROCESSES, machine

KEY = "0123456789ab"
S3 = "s3://bucket/mirror"


@pytest.fixture(params=["directory", "s3"])
def store(request, server, tmp_path) -> Store:
    """Any place can be a mirror."""
    return open_store(S3 if request.param == "s3" else str(tmp_path / "mirror"))


@pytest.fixture
def work(tmp_path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def save(work: Path, step: int, content: bytes = b"weights") -> Path:
    """A whole checkpoint, as a stage leaves it."""
    checkpoint = work / f"checkpoint-{step}"
    (checkpoint / "logs").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(content)
    (checkpoint / "logs" / "metrics.jsonl").write_text(f"{step}\n")
    files = tuple(
        Entry(path=path.relative_to(checkpoint).as_posix(), size=path.stat().st_size, sha256=digest_file(path))
        for path in checkpoint.rglob("*") if path.is_file()
    )  # fmt: skip
    record = Record(step=step, asked="a", execution={}, files=files)
    (checkpoint / COMPLETE).write_text(record.model_dump_json())
    return checkpoint


def copied(store: Store, work: Path, steps: list[int]) -> None:
    for step in steps:
        save(work, step, f"weights {step}".encode())
        mirror = Mirror(store, KEY, work, pytest.fail)
        mirror.look()
        mirror.close(120)
        shutil.rmtree(work / f"checkpoint-{step}")


def steps(store: Store) -> list[int]:
    return [copy.step for copy in copies(store, KEY) if store.read(f"{copy.name}/{COMPLETE}")]


def test_the_newest_whole_checkpoint_is_copied_once_and_a_torn_one_never(store, work):
    for step in (1, 2):
        save(work, step)
    (save(work, 3) / COMPLETE).unlink()
    for _ in range(2):
        mirror = Mirror(store, KEY, work, pytest.fail)
        mirror.look()
        mirror.close(120)
    assert steps(store) == [2]
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_what_was_lost_comes_back_byte_for_byte_and_only_where_it_is_missing(store, work, tmp_path):
    copied(store, work, [1, 2])
    save(tmp_path / "as it was", 2, b"weights 2")
    elsewhere = tmp_path / "elsewhere" / KEY
    assert bring_back(store, KEY, elsewhere, pytest.fail) == "checkpoint-2"
    compared = subprocess.run(["diff", "-r", tmp_path / "as it was", elsewhere])
    assert compared.returncode == 0
    shutil.rmtree(elsewhere / "checkpoint-2")
    save(elsewhere, 2, b"weights 2")
    assert bring_back(store, KEY, elsewhere, pytest.fail) is None, "there is the same one"
    save(elsewhere, 3)
    assert bring_back(store, KEY, elsewhere, pytest.fail) is None, "there is one that was not copied yet"
    assert bring_back(store, "another", tmp_path / "another", pytest.fail) is None


def test_a_machine_that_comes_back_takes_what_another_one_has_done_since(store, work, tmp_path):
    """Its own checkpoint was copied, or its copy is gone by now."""
    save(tmp_path / "back", 50)
    copied(store, work, [50, 450])
    assert bring_back(store, KEY, tmp_path / "back", pytest.fail) == "checkpoint-450"
    save(tmp_path / "later", 50)
    copied(store, work, [500])
    assert bring_back(store, KEY, tmp_path / "later", pytest.fail) == "checkpoint-500"


def test_a_torn_checkpoint_gives_way_to_the_whole_one_of_its_step(store, work):
    copied(store, work, [4])
    (save(work, 4, b"torn") / COMPLETE).unlink()
    assert bring_back(store, KEY, work, pytest.fail) == "checkpoint-4"
    assert (work / "checkpoint-4" / "model.safetensors").read_bytes() == b"weights 4"


def test_only_the_newest_two_stay_out_there(store, work):
    copied(store, work, [1, 2, 3, 4])
    assert steps(store) == [3, 4]


def test_a_stage_that_started_again_is_not_taken_back_to_what_it_left(store, work, tmp_path):
    copied(store, work, [50, 60, 5])
    assert steps(store) == [60, 5]
    assert bring_back(store, KEY, tmp_path / "elsewhere", pytest.fail) == "checkpoint-5"


def test_a_damaged_copy_is_named_and_the_one_before_it_is_taken(work, tmp_path):
    store, said = LocalStore(tmp_path / "mirror"), []
    copied(store, work, [1, 2])
    store.path(f"{copies(store, KEY)[-1].name}/model.safetensors").write_bytes(b"weights 3")
    assert bring_back(store, KEY, tmp_path / "elsewhere", said.append) == "checkpoint-1"
    assert len(said) == 1 and "model.safetensors is gone or damaged" in said[0]
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["checkpoint-1"]


def test_a_copy_that_was_not_finished_is_not_brought_back(store, work, tmp_path):
    copied(store, work, [1, 2])
    store.remove(f"{copies(store, KEY)[-1].name}/{COMPLETE}")
    assert bring_back(store, KEY, tmp_path / "elsewhere", pytest.fail) == "checkpoint-1"


def slow(reached: threading.Event, seconds: float, over: threading.Event | None = None):
    """A door that lets uploads of weights wait: so long, or until it is over."""

    def door(environ, through, start_response):
        if environ["REQUEST_METHOD"] == "PUT" and "safetensors" in environ["PATH_INFO"]:
            reached.set()
            (over or threading.Event()).wait(seconds)
        return through(start_response)

    return door


def test_looking_costs_nothing_and_a_checkpoint_may_disappear_while_it_is_copied(server, work, tmp_path):
    store, reached, over = open_store(S3), threading.Event(), threading.Event()
    save(work, 1)
    mirror = Mirror(store, KEY, work, pytest.fail)
    with server.behind(slow(reached, 20, over)):
        begin = time.monotonic()
        mirror.look()
        assert reached.wait(60)
        for _ in range(100):
            mirror.look()
        assert time.monotonic() - begin < 20, "it waited for the upload"
        over.set()
        shutil.rmtree(work / "checkpoint-1")
        mirror.close(120)
    assert steps(store) == [1] and list(work.iterdir()) == []
    assert bring_back(store, KEY, tmp_path / "elsewhere", pytest.fail) == "checkpoint-1"


def test_a_mirror_that_does_not_take_copies_is_one_warning_and_the_next_is_tried_again(server, work):
    store, said = open_store(S3), []

    def refuse(environ, through, start_response):
        start_response("403 Forbidden", [("Content-Length", "0")])
        return [b""]

    mirror = Mirror(store, KEY, work, said.append)
    with server.behind(refuse):
        for step in (1, 2):
            save(work, step)
            mirror.look()
            while any(thread.name == "mirror" for thread in threading.enumerate()):
                time.sleep(0.01)
    assert len(said) == 1 and "access was refused" in said[0] and steps(store) == []
    save(work, 3)
    mirror.look()
    mirror.close(120)
    assert steps(store) == [3] and len(said) == 1


def test_a_copy_under_way_ends_when_the_stage_is_done_and_leaves_nothing_here(server, work):
    store, reached = open_store(S3), threading.Event()
    save(work, 1, os.urandom(80_000_000))
    mirror = Mirror(store, KEY, work, pytest.fail)
    with server.behind(slow(reached, 0.3)):
        mirror.look()
        assert reached.wait(60)
        begin = time.monotonic()
        mirror.close(0)
        assert time.monotonic() - begin < 3
    assert steps(store) == [] and [path.name for path in work.iterdir()] == ["checkpoint-1"]


def test_what_a_stage_saved_last_is_copied_when_it_is_stopped(store, work):
    with pytest.raises(KeyboardInterrupt), mirrored(store, KEY, work, 10, pytest.fail) as look:
        save(work, 1)
        look()
        save(work, 2)
        raise KeyboardInterrupt
    assert steps(store)[-1] == 2


def test_a_published_stage_leaves_nothing_out_there(store, work):
    copied(store, work, [1, 2])
    forget(store, KEY, pytest.fail)
    assert store.names(f"resume/{KEY}") == []
    forget(None, KEY, pytest.fail)


def copy_and_die(mirror: Path, checkpoint: Path) -> None:
    copy_out(LocalStore(mirror), KEY, checkpoint, lambda: os.kill(os.getpid(), signal.SIGKILL) is None)


def test_a_copy_that_was_killed_is_made_again_and_leaves_nothing(work, tmp_path):
    store = LocalStore(tmp_path / "mirror")
    killed = PROCESSES.Process(target=copy_and_die, args=(store.root, save(work, 1)))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and copies(store, KEY) == []
    left = store.root / "resume" / KEY
    assert len(list(left.iterdir())) == 1, "under a name that is not seen"
    mirror = Mirror(store, KEY, work, pytest.fail)
    mirror.look()
    mirror.close(120)
    assert steps(store) == [1] and len(list(left.iterdir())) == 1
    killed = PROCESSES.Process(target=copy_and_die, args=(store.root, save(work, 2)))
    killed.start()
    killed.join()
    forget(store, KEY, pytest.fail)
    assert list(left.iterdir()) == []


def test_without_a_mirror_nothing_is_copied(work):
    save(work, 1)
    with mirrored(None, KEY, work, 10, pytest.fail) as look:
        look()
    assert [path.name for path in work.iterdir()] == ["checkpoint-1"]


def test_a_mirror_that_cannot_be_used_is_known_before_anything_runs(write, settings, tmp_path):
    (tmp_path / "file").write_text("")
    for place, said in (
        (str(tmp_path / "file"), "is a file"),
        ("ftp://x/y", "ftp:// is no place"),
        ("s3://me:hush@b/c", "work.mirror: a s3:// URL has a user"),
    ):
        settings["work"] = {"mirror": place}
        done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect")
        assert (
            (done.returncode, done.stderr.count("\n")) == (2, 1) and said in done.stderr and "hush" not in done.stderr
        )


@pytest.mark.slow
def test_a_machine_that_is_lost_in_mid_training_loses_nothing_that_was_mirrored(
    started, write, settings, tmp_path, monkeypatch
):
    """Registry and mirror are all that the two machines have in common; the first is switched off without a word."""
    started.reset()
    settings["stages"] = settings["stages"][:2]
    stage(settings, "warmup").update(rows="train[0:64]")
    stage(settings, "rl1").update(steps=40, rows="train[64:144]", save_every=4)
    settings["work"] = {"mirror": S3}
    recipe = write(settings)
    one, two = machine(started, tmp_path / "one"), machine(started, tmp_path / "two")
    command = [SWITCHBACK, "run", recipe, "--no-prefect"]
    lost = subprocess.Popen(command, cwd=tmp_path / "one", env=environment(**one), stdout=subprocess.DEVNULL)
    while not any(
        seen.method == "PUT" and "/mirror/resume/" in seen.path and seen.path.endswith(COMPLETE)
        for seen in started.seen
    ):
        assert lost.poll() is None, "it ended before anything was mirrored"
        time.sleep(0.05)
    os.kill(lost.pid, signal.SIGKILL)
    lost.wait()
    done = run_cli("run", recipe, "--only", "rl1", "--no-prefect", cwd=tmp_path / "two", env=two)
    assert done.returncode == 0, done.stderr
    assert "rl1: brought checkpoint-" in done.stdout and "rl1: resumed from checkpoint-" in done.stdout
    listed = json.loads(run_cli("ls", "--json", cwd=tmp_path / "two", env=two).stdout)
    assert "rl1" in [found["stage"] for found in listed]
    for name, value in two.items():
        monkeypatch.setenv(name, value)
    assert open_store(S3).files("resume") == {}, "what was mirrored goes once the stage is published"
