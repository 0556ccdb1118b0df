"""A registry on an object store, on moto's S3 behind real HTTP: the same promises as on a disk, whatever is lost on
the way and whoever is killed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import obstore
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from obstore.store import S3Store

from pipeline.errors import Damaged
from pipeline.registry import Artifact, File, Registry
from pipeline.registry.stores.local import LocalStore
from pipeline.registry.stores.open import open_store
from pipeline.registry.stores.store import JSON_LIMIT
from stages.errors import BadInput
from tests.conftest import TINY, environment, run_cli, tensors
from tests.object_server import ObjectServer
from tests.pipeline.registry.test_registry import OWNER, draft, finished
from tests.storm import storm

URL = "s3://bucket/team/registry"
WEIGHTS = tensors("weights")
MANIFEST = "artifact.json"
PROCESSES = multiprocessing.get_context("forkserver")
"""Processes that have imported everything and used nothing: obstore does not survive a fork."""
PROCESSES.set_forkserver_preload(["tests.pipeline.registry.test_objects"])


@pytest.fixture
def elsewhere(server, monkeypatch, tmp_path):
    """Go on as another machine: with an empty cache."""

    def move() -> Registry:
        monkeypatch.setenv("SWITCHBACK_CACHE", str(tmp_path / "another-cache"))
        return Registry(URL)

    return move


def overwrite(name: str, content: bytes) -> None:
    """What no writer of ours ever does."""
    obstore.put(S3Store("bucket", prefix="team/registry", client_options={"allow_http": True}), name, content)


def make_older(name: str, by: timedelta) -> None:
    for key in s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets["bucket"].keys.values():
        if key.name.startswith(f"team/registry/{name}"):
            key.last_modified -= by


def unheard(status: str, headers: list[tuple[str, str]], error: object = None) -> None:
    """Where the headers of an answer go that is lost."""


# ---- names


def test_a_name_is_put_once_and_read_back(server):
    store = open_store(URL)
    assert store.put("a/b.json", b"1") and not store.put("a/b.json", b"2")
    assert store.read("a/b.json") == b"1" and store.read("a/c.json") is None
    assert store.names("a") == ["b.json"] and store.names("nothing") == [] and store.names("a/b.json") == []
    store.remove("a/b.json")
    store.remove("a/b.json")
    assert store.read("a/b.json") is None


def test_equal_bytes_of_another_writer_are_not_ones_own(server):
    store = open_store(URL)
    assert store.put("a.json", b"same") and not store.put("a.json", b"same")


@pytest.mark.parametrize("status", ["500 Oh", "503 Slow Down"])
def test_a_put_whose_answer_was_lost_is_repeated_and_still_counts_as_the_first(status, server):
    lost = []

    def door(environ, through, start_response):
        if environ["REQUEST_METHOD"] != "PUT" or lost:
            return through(start_response)
        lost.append(environ["PATH_INFO"])
        through(unheard)
        start_response(status, [("Content-Length", "0")])
        return [b""]

    store = open_store(URL)
    with server.behind(door):
        assert store.append("log", {"entry": 1}) == 1
    assert lost and store.names("log") == ["000001.json"]


def test_names_that_leave_the_registry_are_refused(server):
    for name in ("../x", "a/../../x", "/etc/passwd"):
        with pytest.raises(BadInput, match="leaves the registry"):
            open_store(URL).read(name)


def test_a_json_file_that_is_too_long_is_refused_before_it_is_downloaded(server):
    overwrite("runs/huge.json", bytes(JSON_LIMIT + 1))
    with pytest.raises(BadInput, match="more than"):
        open_store(URL).get("runs/huge.json")


# ---- places


def test_a_store_that_ignores_conditional_puts_is_refused_at_first_use_and_left_as_it_was(server, tmp_path):
    def door(environ, through, start_response):
        environ.pop("HTTP_IF_NONE_MATCH", None)
        return through(start_response)

    with server.behind(door), pytest.raises(BadInput, match="ignores conditional puts"):
        Registry(URL).publish(finished(tmp_path / "out"), draft(), OWNER)
    assert open_store("s3://bucket").files("team") == {}


def test_the_probe_leaves_nothing_behind(server):
    Registry(URL).initialise()
    assert list(open_store(URL).files("probe")) == [] and open_store(URL).get("format.json")["format"] == 1


SECRETS = ("AKIATESTTESTTEST", "hush-hush-hush", "pass-pass-word")


def refuse(environ, through, start_response):
    """As Amazon does: with the key in the answer."""
    start_response("403 Forbidden", [("Content-Type", "application/xml")])
    return [
        b"<Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>AKIATESTTESTTEST</AWSAccessKeyId><StringToSign>hush-hush-hush</StringToSign></Error>"
    ]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s3://missing/registry", "there is no bucket missing"),
        ("ftp://bucket/registry", "ftp:// is no place that is known; give a directory or a URL that starts with "
                                  "s3://, gs://, az://"),
        ("s3://me:pass-pass-word@bucket/registry", "has a user, a password or a query in it"),
        ("s3://bucket/registry?token=pass-pass-word", "has a user, a password or a query in it"),
        ("s3://", "is no place in an object store; expected s3://bucket"),
        ("s3://bucket/a/../b", "is no place in an object store"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_used_is_one_line_without_a_secret_and_exit_2(place, said, server):
    done = run_cli("ls", "--registry", place, env=dict(os.environ))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr and not any(secret in done.stderr for secret in SECRETS)


def test_refused_credentials_are_one_line_that_does_not_repeat_them(server):
    with server.behind(refuse):
        done = run_cli("ls", "--registry", URL, env=dict(os.environ))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "access was refused (InvalidAccessKeyId); check AWS_ACCESS_KEY_ID" in done.stderr
    assert not any(secret in done.stderr for secret in SECRETS)


@pytest.mark.parametrize(
    ("place", "variable"), [("s3://bucket", "AWS_ACCESS_KEY_ID"), ("az://container", "AZURE_STORAGE_ACCOUNT_NAME")]
)
def test_credentials_that_are_not_there_are_asked_for_by_name(place, variable, server, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(BadInput, match=f"no credentials were found; set {variable}"):
        open_store(place)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_plain_http_is_for_this_machine_unless_the_user_says_otherwise(variable, server, monkeypatch):
    monkeypatch.setenv(variable, "http://me:pass-pass-word@storage.example:9000")
    with pytest.raises(BadInput, match=r"storage\.example is plain http; use https") as caught:
        open_store(URL)
    assert "pass-pass-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "answer", "said"),
    [
        ("404 Not Found", b"<html>no such page</html>", "answered 404 where something else was expected; check the "
                                                        "URL"),
        ("301 Moved", b"<Error><Code>PermanentRedirect</Code></Error>", "is in another region; set AWS_REGION"),
        ("400 Bad Request", b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>", "is in another region; set "
                                                                                         "AWS_REGION"),
    ],
)  # fmt: skip
def test_a_server_that_is_not_the_right_one_is_said_to_be_none(status, answer, said, server):
    def door(environ, through, start_response):
        start_response(status, [("Content-Type", "application/xml")])
        return [answer]

    with server.behind(door), pytest.raises(BadInput, match=said):
        open_store(URL)


def test_a_file_of_credentials_that_is_not_there_is_said(server, monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "nothing.json"))
    with pytest.raises(BadInput, match="credentials cannot be read; check GOOGLE_APPLICATION_CREDENTIALS"):
        open_store("gs://bucket")


def test_what_is_gone_from_a_store_has_no_digest(server, tmp_path):
    for store in (open_store(URL), LocalStore(tmp_path)):
        with pytest.raises(Damaged, match=r"artifacts/x/model\.safetensors is gone"):
            store.digest("artifacts/x/model.safetensors")


def test_a_wrong_endpoint_is_known_within_twenty_seconds(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(BadInput, match="cannot be reached; check the network"):
        open_store(URL)
    assert time.monotonic() - begin < 20


# ---- artifacts


def test_what_is_published_is_found_and_goes_on_locally_without_a_download(server, tmp_path):
    registry = Registry(URL)
    out = finished(tmp_path / "out")
    big = os.urandom(20_000_000)
    (out / "big.parquet").write_bytes(big)
    artifact = registry.publish(out, draft(), OWNER).artifact
    assert not out.exists() and registry.find(artifact.key) == artifact == registry.artifacts()[0]
    assert registry.location(artifact, "data") == f"{URL}/artifacts/{artifact.id}/data"
    parts = [one for one in server.seen if one.method == "PUT" and "partNumber" in one.query]
    assert len(parts) == 3, "a big file goes up in parts"
    server.seen.clear()
    path = registry.path(artifact)
    assert (path / "big.parquet").read_bytes() == big and (path / MANIFEST).is_file() and server.seen == []


def test_the_manifest_is_put_when_all_else_is_there(server, tmp_path):
    artifact = Registry(URL).publish(finished(tmp_path / "out"), draft(), OWNER).artifact
    put = [one.path for one in server.seen if one.method == "PUT" and "/artifacts/" in one.path]
    assert put[-1].endswith(f"{artifact.id}/{MANIFEST}") and len(put) == 3


def test_another_machine_fetches_what_was_published_once(elsewhere, server, tmp_path):
    artifact = Registry(URL).publish(finished(tmp_path / "out"), draft(), OWNER).artifact
    there = elsewhere()
    path = there.path(artifact, "data")
    assert (path / "rows.jsonl").read_text() == "{}\n" and (path.parent / MANIFEST).is_file()
    server.seen.clear()
    assert there.path(artifact, "data") == path and server.seen == []
    (path / "rows.jsonl").write_text("")
    assert (there.path(artifact, "data") / "rows.jsonl").read_text() == "{}\n", "a torn copy is fetched again"


@pytest.mark.parametrize("damage", [WEIGHTS[:-1] + b"z", WEIGHTS[:-1], WEIGHTS + b" and more"])
def test_a_damaged_download_names_the_file_and_is_not_kept(damage, elsewhere, server, tmp_path):
    artifact = Registry(URL).publish(finished(tmp_path / "out"), draft(), OWNER).artifact
    overwrite(f"artifacts/{artifact.id}/model.safetensors", damage)
    there = elsewhere()
    for _ in range(2):
        with pytest.raises(BadInput, match=f"{artifact.id}/model.safetensors is damaged"):
            there.path(artifact)
    assert [path for path in (tmp_path / "another-cache").rglob("*") if path.is_file()] == []


def test_a_file_that_is_gone_is_named(elsewhere, server, tmp_path):
    artifact = Registry(URL).publish(finished(tmp_path / "out"), draft(), OWNER).artifact
    there = elsewhere()
    there.store.remove(f"artifacts/{artifact.id}/model.safetensors")
    with pytest.raises(BadInput, match=r"model.safetensors is gone"):
        there.path(artifact)


def test_what_the_store_itself_has_is_told_from_what_was_copied(server, tmp_path):
    registry = Registry(URL)
    artifact = registry.publish(finished(tmp_path / "out"), draft(), OWNER).artifact
    name = f"artifacts/{artifact.id}"
    assert set(registry.store.files(name)) == {MANIFEST, *(file.path for file in artifact.files)}
    overwrite(f"{name}/model.safetensors", b"weightz")
    assert registry.store.digest(f"{name}/model.safetensors") == hashlib.sha256(b"weightz").hexdigest()
    assert (registry.path(artifact) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_local_store_lists_and_hashes_what_it_has_and_follows_no_link(tmp_path):
    store, directory = LocalStore(tmp_path), finished(tmp_path / "artifacts" / "x")
    (directory / "link").symlink_to("/etc")
    assert store.files("artifacts/x") == {"model.safetensors": len(WEIGHTS), "data/rows.jsonl": 3, "link": -1}
    assert store.digest("artifacts/x/model.safetensors") == hashlib.sha256(WEIGHTS).hexdigest()


def test_a_directory_is_removed_manifest_first_here_and_there(server, tmp_path):
    registry = Registry(URL)
    artifact = registry.publish(finished(tmp_path / "out"), draft(), OWNER).artifact
    copy = registry.path(artifact)
    server.seen.clear()
    registry.store.remove_tree(f"artifacts/{artifact.id}", MANIFEST)
    assert server.seen[0].path.endswith(MANIFEST) or "delete" in server.seen[0].query
    assert registry.get(artifact.id) is None and registry.store.names("artifacts") == [] and not copy.exists()
    registry.store.remove_tree(f"artifacts/{artifact.id}", MANIFEST)


def test_only_a_directory_that_nobody_finished_in_a_day_is_abandoned(server, tmp_path):
    registry = Registry(URL)
    whole = registry.publish(finished(tmp_path / "out"), draft(), OWNER).artifact
    for name in ("old", "resumed", "young"):
        overwrite(f"artifacts/{name}-1/model.safetensors", b"x")
    make_older("artifacts/", timedelta(hours=25))
    overwrite("artifacts/resumed-1/data/rows.jsonl", b"x")
    overwrite("artifacts/young-1/model.safetensors", b"x")
    assert registry.store.abandoned("artifacts", MANIFEST) == ["artifacts/old-1"]
    assert registry.artifacts() == [whole]


# ---- processes


def process(work: Callable[..., None], *arguments: object, cache: Path) -> multiprocessing.process.BaseProcess:
    """A process that is not started yet, in this one's environment but for its cache."""
    env = {**os.environ, "SWITCHBACK_CACHE": str(cache)}
    return PROCESSES.Process(target=in_environment, args=(env, work, *arguments))


def in_environment(env: dict[str, str], work: Callable[..., None], *arguments: object) -> None:
    os.environ.update(env)
    work(*arguments)


def publish_as(writer: int, keys: list[str], directory: Path, winners: Path) -> None:
    registry = Registry(URL)
    found = {}
    for i, name in enumerate(keys):
        out = finished(directory / f"{writer}-{i}", f"{writer} {i}")
        found[name] = registry.publish(out, draft(name), f"run-{writer}").artifact.id
    (winners / f"{writer}.json").write_text(json.dumps(found))


def test_four_publishers_of_overlapping_keys_agree_on_one_winner_a_key(server, tmp_path):
    """Numbers are dense, losers leave nothing."""
    (tmp_path / "won").mkdir()
    orders = [[f"k{(i * step + writer) % 20}" for i in range(20)] for writer, step in enumerate((1, 3, 7, 9))]
    writers = [
        process(publish_as, n, keys, tmp_path, tmp_path / "won", cache=tmp_path / f"cache-{n % 2}")
        for n, keys in enumerate(orders)
    ]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    assert [one.exitcode for one in writers] == [0] * 4
    registry = Registry(URL)
    told = [json.loads(path.read_text()) for path in (tmp_path / "won").iterdir()]
    for name in {name for keys in orders for name in keys}:
        key = draft(name).key
        assert registry.store.names(f"keys/{key}") == ["000001.json"]
        assert {one[name] for one in told} == {registry.store.get(f"keys/{key}/000001.json")["artifact"]}
    assert {artifact.id for artifact in registry.artifacts()} == {id for one in told for id in one.values()}
    assert len(registry.store.names("artifacts")) == 20
    assert all(whole(registry, artifact) for artifact in registry.artifacts())


def append_as(writer: int) -> None:
    store = open_store(URL)
    for i in range(15):
        store.append("log", {"writer": writer, "i": i})


def test_an_append_only_log_loses_nothing_to_four_writers(server, tmp_path):
    writers = [process(append_as, writer, cache=tmp_path) for writer in range(4)]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    store = open_store(URL)
    assert store.names("log") == [f"{n:06d}.json" for n in range(1, 61)]
    assert {(one["writer"], one["i"]) for one in store.entries("log")} == {(w, i) for w in range(4) for i in range(15)}


def fetch_as(artifact: str) -> None:
    registry = Registry(URL)
    path = registry.path(registry.open(artifact))
    assert len((path / "big.parquet").read_bytes()) == 3_000_000


def test_processes_that_fetch_the_same_artifact_at_once_are_fine_and_what_a_killed_one_left_is_cleaned(
    server, tmp_path
):
    out = finished(tmp_path / "out")
    (out / "big.parquet").write_bytes(os.urandom(3_000_000))
    artifact = Registry(URL).publish(out, draft(), OWNER).artifact
    cache = tmp_path / "shared-cache"
    asked = threading.Event()

    def door(environ, through, start_response):
        if environ["PATH_INFO"].endswith("big.parquet") and not asked.is_set():
            asked.set()
            time.sleep(1)
        return through(start_response)

    killed = process(fetch_as, artifact.id, cache=cache)
    with server.behind(door):
        killed.start()
        assert asked.wait(60)
        assert killed.pid
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
    left = [path.name for path in next(cache.iterdir()).joinpath("artifacts").iterdir()]
    assert len(left) == 1 and left[0].startswith(".")
    fetchers = [process(fetch_as, artifact.id, cache=cache) for _ in range(3)]
    for one in fetchers:
        one.start()
    for one in fetchers:
        one.join()
    assert [one.exitcode for one in fetchers] == [0, 0, 0]
    assert [path.name for path in next(cache.iterdir()).joinpath("artifacts").iterdir()] == [artifact.id]


def test_ctrl_c_ends_an_upload_at_once_and_leaves_no_parts_behind(server, tmp_path):
    out, reached = finished(tmp_path / "out"), threading.Event()
    (out / "big.parquet").write_bytes(bytes(80_000_000))

    def door(environ, through, start_response):
        if "partNumber" in environ["QUERY_STRING"]:
            reached.set()
            time.sleep(7)  # ten parts, four at once: all of them would take 21 s
        return through(start_response)

    publisher = process(publish_once, out, cache=tmp_path / "cache")
    with server.behind(door):
        publisher.start()
        assert reached.wait(60)
        assert publisher.pid
        os.kill(publisher.pid, signal.SIGINT)
        begin = time.monotonic()
        publisher.join()
    assert time.monotonic() - begin < 20 and publisher.exitcode == 1
    assert [one for one in server.seen if one.method == "DELETE" and "uploadId" in one.query]
    assert Registry(URL).artifacts() == [] and (out / "big.parquet").exists()


def test_a_cache_that_cannot_be_written_is_one_line(elsewhere, server, tmp_path):
    artifact = Registry(URL).publish(finished(tmp_path / "out"), draft(), OWNER).artifact
    there = elsewhere()
    (tmp_path / "another-cache").mkdir()
    store = next((tmp_path / "cache").iterdir()).name
    (tmp_path / "another-cache" / store).write_text("a file, where a directory should be made")
    with pytest.raises(BadInput, match=r"cannot be written.*set SWITCHBACK_CACHE"):
        there.path(artifact)


def publish_once(directory: Path) -> None:
    Registry(URL).publish(directory, draft(), "run")


def whole(registry: Registry, artifact: Artifact) -> bool:
    """Whether the store has just what the manifest says."""
    name = f"artifacts/{artifact.id}"
    found = [
        File(path=path, size=size, sha256=registry.store.digest(f"{name}/{path}"))
        for path, size in registry.store.files(name).items()
    ]
    return {file for file in found if file.path != MANIFEST} == set(artifact.files)


def killed_at(server: ObjectServer, at: int, when: str, directory: Path) -> bool:
    """Publish in a process that is killed at its `at`-th request, before the server handles it or after; False when it
    has fewer."""
    seen, ready = [0], threading.Event()

    def door(environ, through, start_response):
        assert ready.wait(60)
        seen[0] += 1
        if seen[0] != at:
            return through(start_response)
        if when == "after":
            through(unheard)
        assert publisher.pid
        os.kill(publisher.pid, signal.SIGKILL)
        while Path(f"/proc/{publisher.pid}").exists():
            time.sleep(0.001)
        start_response("500 Killed", [("Content-Length", "0")])
        return [b""]

    publisher = process(publish_once, finished(directory / "out"), cache=directory / "cache")
    with server.behind(door):
        publisher.start()
        ready.set()
        publisher.join()
    return publisher.exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_publisher_killed_at_any_request_leaves_all_or_nothing_and_the_next_one_ends_well(when, server, tmp_path):
    """At each request of opening, probing, uploading and recording."""
    at, published = 1, []
    while killed_at(server, at, when, tmp_path / f"{when}-{at}"):
        registry = Registry(URL)
        found = registry.artifacts()
        assert len(found) <= 1 and all(whole(registry, artifact) for artifact in found), f"killed {when} request {at}"
        current = registry.find(draft().key)
        artifact = current or registry.recover(draft().key, "warmup", OWNER)
        artifact = artifact or registry.publish(finished(tmp_path / f"{when}-{at}-again"), draft(), OWNER).artifact
        assert whole(registry, artifact) and registry.find(draft().key) == artifact
        published.append((len(found), current is not None))
        server.reset()
        at += 1
    assert at > 15 and {(0, False), (1, False)} <= set(published)
    assert (when == "after") == ((1, True) in published)


# ---- the whole thing


def machine(server: ObjectServer, directory: Path) -> dict[str, str]:
    """Another computer: no directory in common but the one the recipe lies in."""
    (directory / "home").mkdir(parents=True)
    return {**server.env, "HOME": str(directory / "home"), "SWITCHBACK_REGISTRY": URL}


@pytest.mark.slow
def test_one_machine_begins_a_climb_and_another_goes_on(started, tmp_path, write):
    """The second fetches what the first has published, and publishes there; nothing but the bucket is shared."""
    started.reset()
    recipe = write(TINY)
    one, two = machine(started, tmp_path / "one"), machine(started, tmp_path / "two")
    first = run_cli("run", recipe, "--until", "warmup", "--no-prefect", cwd=tmp_path / "one", env=one)
    assert first.returncode == 0, first.stderr
    second = run_cli("run", recipe, "--only", "rl1", "--no-prefect", cwd=tmp_path / "two", env=two)
    assert second.returncode == 0, second.stderr
    copies = sorted(
        path.name.partition("-")[0] for path in (tmp_path / "two" / "home").glob(".cache/switchback/*/artifacts/*")
    )
    assert {"warmup", "rl1"} <= set(copies) and (tmp_path / "two" / "work").is_dir()

    listed = json.loads(run_cli("ls", "--json", cwd=tmp_path / "two", env=two).stdout)
    assert [found["stage"] for found in listed] == ["base.evaluate", "warmup", "warmup.evaluate", "rl1", "rl1.evaluate"]
    assert all(found["path"].startswith(f"{URL}/artifacts/") for found in listed)
    ids = {found["stage"]: found["id"] for found in listed}
    planned = json.loads(run_cli("plan", recipe, "--until", "rl1", "--json", cwd=tmp_path / "one", env=one).stdout)
    assert {step["action"] for step in planned if step["step"].partition(".")[0] in ("base", "warmup", "rl1")} == {
        "reuse"
    }
    for command, said in (
        ("show", ids["rl1"]),
        (f"lineage {ids['rl1']}", ids["warmup"]),
        ("verify", "5 artifacts are whole"),
    ):
        done = run_cli(*command.split(), cwd=tmp_path / "one", env=one)
        assert done.returncode == 0 and said in done.stdout, done.stderr
    assert not any(secret in json.dumps(listed) for secret in SECRETS)
    assert environment().get("SWITCHBACK_REGISTRY") is None


# ---- many at once


@pytest.mark.slow
def test_on_s3_too_no_alias_loses_anything_to_a_clean_up_beside_many_publishers(server):
    """The full number of them: make test-full."""
    seen = storm(URL, processes=3, publishes=8, keys=8, cleaners=1)
    assert seen["cleaned"] and seen["moves"]


@pytest.mark.full
def test_on_s3_too_eight_processes_publish_a_hundred_times_while_a_clean_up_loops(server):
    print(f"storm on S3: {storm(URL, cleaners=1)}")
