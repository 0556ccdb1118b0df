"""A base model on the hub that cannot be had ends a run before anything is started, in one line."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.registry import Registry, runs
from tests.conftest import run_cli

MODEL = ("--set", "model.path=null", "--set", "model.hub=some/model")


@contextmanager
def silent() -> Iterator[str]:
    """A server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


@contextmanager
def dead() -> Iterator[str]:
    """A port without a listener."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize("hub", [silent, dead])
def test_a_model_that_is_neither_in_the_cache_nor_reachable_ends_the_run(hub, write, settings, tmp_path):
    with hub() as url:
        env = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": url}
        done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect", *MODEL, env=env)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert (
        f"model.hub: some/model is not in this machine's cache, and {url} does not give it out (found " in done.stderr
    )
    assert not (tmp_path / "r" / "work").exists(), "no job was started"
    assert runs.runs(Registry(tmp_path / "r"))[0].state == "failed"


def test_offline_it_is_not_asked_for(write, settings, tmp_path):
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect", *MODEL, env=env)
    assert done.returncode == 2 and "HF_HUB_OFFLINE is set. Fix: unset it" in done.stderr
