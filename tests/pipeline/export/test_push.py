"""Push: one private commit of exactly what was exported, and one line whatever the hub says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.registry import Registry
from tests.conftest import run_cli
from tests.hub_server import TOKEN, Commit, Hub, Repository, hub
from tests.pipeline.export.test_export import exported, harvest, newest
from tests.pipeline.registry.test_registry import OWNER, draft, finished


@pytest.fixture
def server():
    with hub() as held:
        yield held


@pytest.fixture
def push(server, tmp_path):
    """Run the command against the server, with a token and without anybody's own settings."""

    def push(place: Path, *arguments: str, **env: str):
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        return run_cli("push", *arguments, "--registry", place, env={**settings, **env})

    return push


@pytest.fixture
def small(tmp_path):
    """(registry, id) without a climb."""
    registry = Registry(tmp_path / "registry")
    return registry.store.root, registry.publish(finished(tmp_path / "out"), draft(), OWNER).artifact.id


def of_directory(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def test_the_hub_gets_what_export_writes_as_one_private_commit(climbed, server, push, tmp_path):
    id = newest(Registry(climbed[1]), "rl2").id
    done = push(climbed[1], id, "hf://acme/rl2")
    assert done.returncode == 0, done.stderr
    assert f"{server.url}/acme/rl2" in done.stdout and "private" in done.stdout
    assert server.files("acme/rl2") == of_directory(exported(climbed[1], "rl2", tmp_path / "x"))
    assert server.messages("acme/rl2") == ["initial commit", id]
    assert server.repositories["model", "acme/rl2"].private
    assert len(server.blobs) == 1, "the weights went through git-lfs"


def test_data_go_to_a_dataset_repository(climbed, server, push, tmp_path):
    id = newest(Registry(climbed[1]), "harvest").id
    assert push(climbed[1], id, "hf://acme/harvest").returncode == 0
    found = server.files("acme/harvest", kind="dataset")
    assert found == of_directory(exported(climbed[1], "harvest", tmp_path / "x"))


def test_a_control_goes_to_a_dataset_repository_by_its_name(server, push, tmp_path):
    registry, artifact = harvest(tmp_path)
    name = f"{artifact.id}:control"
    done = push(registry.store.root, name, "hf://acme/control")
    assert done.returncode == 0, done.stderr
    assert server.messages("acme/control", kind="dataset") == ["initial commit", name]
    assert b'"of": "control"' in server.files("acme/control", kind="dataset")["card.json"]


def test_public_and_a_revision_are_asked_for(small, server, push):
    done = push(small[0], small[1], "hf://acme/m", "--public", "--revision", "v1", "--json")
    said = json.loads(done.stdout)
    assert said["url"] == f"{server.url}/acme/m/tree/v1" and said["private"] is False
    assert not server.repositories["model", "acme/m"].private
    assert server.messages("acme/m", "v1") == ["initial commit", small[1]]
    assert server.messages("acme/m") == ["initial commit"]
    assert said["commit"] == server.repositories["model", "acme/m"].branches["v1"][-1].sha


def test_a_public_repository_is_not_pushed_to_unless_asked(small, server, push):
    server.repositories["model", "acme/m"] = Repository(private=False)
    done = push(small[0], small[1], "hf://acme/m")
    assert done.returncode == 2 and "public" in done.stderr and server.messages("acme/m") == ["initial commit"]
    assert push(small[0], small[1], "hf://acme/m", "--public").returncode == 0


def test_weights_of_an_earlier_push_go_and_other_files_stay(small, server, push):
    old = {"model-00001-of-00002.safetensors": b"old", "adapter/adapter_config.json": b"{}", "tokenizer.json": b"{}"}
    kept = {"LICENSE": b"mine", ".gitattributes": b"*", "figures/loss.json": b"{}"}
    repository = Repository(private=True)
    repository.branches["main"].append(Commit("before", {**old, **kept}))
    server.repositories["model", "acme/m"] = repository
    assert push(small[0], small[1], "hf://acme/m").returncode == 0
    assert server.files("acme/m").keys() == {"README.md", "model.safetensors", *kept}


def test_the_same_again_makes_no_commit(small, server, push):
    first, second = (json.loads(push(small[0], small[1], "hf://acme/m", "--json").stdout) for _ in range(2))
    assert first == second and server.messages("acme/m") == ["initial commit", small[1]]


@pytest.mark.parametrize(
    "target",
    [
        "acme/m",
        "hf://m",
        "hf://acme/m/x",
        "hf://acme/m@main",
        "s3://acme/m",
        "hf://acme/../m",
        "hf://a--b/c",
        "hf:///m",
        "",
    ],
)
def test_a_bad_target_is_refused_in_one_line_before_anything_is_sent(target, small, server, push):
    done = push(small[0], small[1], target)
    assert done.returncode == 2 and "expected hf://org/name" in done.stderr and done.stderr.count("\n") == 1
    assert server.seen == []


def test_without_a_token_nothing_is_sent(small, server, push):
    done = push(small[0], small[1], "hf://acme/m", HF_TOKEN="")
    assert (done.returncode, done.stderr.count("\n"), server.seen) == (2, 1, [])
    assert "there is no token" in done.stderr and "HF_TOKEN" in done.stderr


def test_a_hub_that_must_not_be_reached_is_one_line(small, server, push):
    done = push(small[0], small[1], "hf://acme/m", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "HF_HUB_OFFLINE" in done.stderr and server.seen == []


@pytest.mark.parametrize(
    ("where", "status", "code", "said"),
    [
        ("/repos/create", 401, 2, "does not know the token"),
        ("/api/", 403, 2, "may not write there"),
        ("/commit/", 403, 2, "may not write there"),
        ("/commit/", 409, 1, "somebody else wrote"),
        ("/lfs/objects/batch", 413, 1, "could not take it"),
        ("^/lfs/", 400, 1, "could not take it"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token(where, status, code, said, small, server, push):
    server.refuse[where] = (status, f"no, not with Bearer {TOKEN}")
    done = push(small[0], small[1], "hf://acme/m")
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert said in done.stderr and str(status) in done.stderr
    assert TOKEN not in done.stderr + done.stdout


def test_a_hub_that_is_not_there_is_one_line(small, push):
    done = push(small[0], small[1], "hf://acme/m", HF_ENDPOINT="http://127.0.0.1:9")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "hf://acme/m" in done.stderr


def test_what_somebody_else_commits_meanwhile_is_not_written_over(small, server: Hub, push):
    """Between the look at the repository and the commit."""

    def theirs() -> None:
        server.repositories["model", "acme/m"].branches["main"].append(Commit("theirs", {"model.safetensors": b"t"}))

    server.before["/commit/"] = theirs
    done = push(small[0], small[1], "hf://acme/m")
    assert done.returncode == 1 and "somebody else wrote" in done.stderr
    assert server.files("acme/m") == {"model.safetensors": b"t"}


def test_a_damaged_artifact_is_not_pushed(small, server, push):
    (small[0] / "artifacts" / small[1] / "model.safetensors").write_text("weightz")
    done = push(small[0], small[1], "hf://acme/m")
    assert done.returncode == 1 and "its bytes are not those that were published" in done.stderr
    assert server.messages("acme/m") == ["initial commit"]
