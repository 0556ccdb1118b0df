"""The digest cache: a large file is hashed once, and again whenever it could be another one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from pipeline.plan import digest_cache
from pipeline.registry import Registry
from pipeline.registry.verify import verify
from tests.conftest import TINY_BASE, run_cli, stage
from tests.pipeline.registry.test_registry import OWNER, draft, finished

FALSE = "f" * 64
"""What no file's digest is: whoever gives it has read it from the cache."""


def large(path: Path) -> Path:
    """A file just large enough, that nobody has touched for a while."""
    with path.open("wb") as file:
        file.truncate(digest_cache.SMALLEST)
    time.sleep(2.1)
    return path


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    """One that no test changes."""
    return large(tmp_path_factory.mktemp("large") / "model.safetensors")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHBACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests.json"


def true_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def poison(cache: Path) -> None:
    """Make every entry tell a digest that is false."""
    entries = json.loads(cache.read_text())
    cache.write_text(json.dumps({path: {**entry, "sha256": FALSE} for path, entry in entries.items()}))


def test_a_large_file_is_hashed_once(settled, cache):
    assert digest_cache.digest_once(settled) == true_digest(settled)
    poison(cache)
    assert digest_cache.digest_once(settled) == FALSE, "it was read from the cache"


def test_a_file_changed_in_place_is_noticed_though_its_size_and_mtime_are_as_before(cache, tmp_path):
    path = large(tmp_path / "model.safetensors")
    before, first = path.stat(), digest_cache.digest_once(path)
    poison(cache)
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert digest_cache.digest_once(path) == true_digest(path) != first


def test_a_file_that_was_just_written_is_not_remembered(cache, tmp_path):
    """Not even one whose mtime says that it is old."""
    path = tmp_path / "new.safetensors"
    with path.open("wb") as file:
        file.truncate(digest_cache.SMALLEST)
    os.utime(path, (0, 0))
    digest_cache.digest_once(path)
    assert not cache.exists()


def test_a_small_file_is_not_remembered(cache):
    path = TINY_BASE / "config.json"
    assert digest_cache.digest_once(path) == true_digest(path)
    assert not cache.exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"PATH": 1}',
        '{"PATH": {"state": STATE, "sha256": "../../etc"}}',
        "x" * (digest_cache.BYTES + 1),
    ],
    ids=["empty", "torn", "list", "null", "deep", "no entry", "no digest", "long"],
)
def test_a_hostile_or_torn_cache_is_as_good_as_none(content, settled, cache):
    seen = settled.stat()
    state = json.dumps([seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino, seen.st_dev])
    cache.parent.mkdir()
    cache.write_text(content.replace("PATH", str(settled)).replace("STATE", state))
    assert digest_cache.digest_once(settled) == true_digest(settled)
    assert json.loads(cache.read_text()).keys() == {str(settled)}


@pytest.mark.parametrize("how", ["writable by all", "a link", "a fifo", "a directory"])
def test_a_cache_that_somebody_else_could_have_written_is_ignored(how, settled, cache):
    digest_cache.digest_once(settled)
    poison(cache)
    if how == "writable by all":
        cache.chmod(0o666)
    else:
        cache.rename(cache.with_name("theirs"))
        {"a link": lambda: cache.symlink_to("theirs"), "a fifo": lambda: os.mkfifo(cache), "a directory": cache.mkdir}[
            how
        ]()
    assert digest_cache.digest_once(settled) == true_digest(settled)


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(settled, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWITCHBACK_CACHE", str(tmp_path / "file"))
    assert digest_cache.digest_once(settled) == true_digest(settled)


def test_processes_at_once_lose_no_entry(cache):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_remember, args=(n,)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(json.loads(cache.read_text())) == 4 * 25
    assert {path.name for path in cache.parent.iterdir()} == {"digests.json", ".digests.json.lock"}


def _remember(writer: int) -> None:
    for i in range(25):
        digest_cache._remember(f"/{writer}/{i}", [0] * 5, FALSE)


def test_only_the_newest_thousand_files_are_remembered(cache):
    cache.parent.mkdir()
    cache.write_text(json.dumps({f"/{i}": {} for i in range(digest_cache.ENTRIES)}))
    digest_cache._remember("/new", [0] * 5, FALSE)
    kept = list(json.loads(cache.read_text()))
    assert (len(kept), kept[0], kept[-1]) == (digest_cache.ENTRIES, "/1", "/new")


def test_a_plan_remembers_the_base_model(cache, tmp_path, settings, write):
    base = shutil.copytree(TINY_BASE, tmp_path / "base")
    path = large(base / "more.safetensors")
    settings["model"]["path"] = str(base)
    settings["stages"] = [stage(settings, "warmup")]
    env = {"SWITCHBACK_CACHE": str(cache.parent)}
    plan = ("plan", write(settings), "--registry", tmp_path / "registry", "--json")
    first = run_cli(*plan, env=env)
    assert first.returncode == 0, first.stderr
    assert list(json.loads(cache.read_text())) == [str(path)]
    assert run_cli(*plan, env=env).stdout == first.stdout
    poison(cache)
    assert run_cli(*plan, env=env).stdout != first.stdout, "it was read from the cache"


def test_verify_hashes_whatever_the_cache_says(cache, tmp_path):
    out = finished(tmp_path / "out")
    large(out / "large.parquet")
    registry = Registry(tmp_path / "registry")
    artifact = registry.publish(out, draft(), OWNER).artifact
    time.sleep(2.1)  # publishing sets modes and moves
    path = registry.path(artifact) / "large.parquet"
    digest_cache.digest_once(path)
    poison(cache)
    assert digest_cache.digest_once(path) == FALSE and verify(registry, artifact) == []
