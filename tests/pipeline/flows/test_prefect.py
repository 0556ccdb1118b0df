"""Prefect for real: a flow shows its steps and what was reused, a schedule fires, and the user's own server is used
where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline.flows.server import API_URL, SETTINGS, own_server
from stages.runtime.process import descendants
from tests.conftest import environment, run_cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The URL of a server that stays up for this module, as a user's own would."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (API_URL, "PREFECT_HOME", *SETTINGS):
            patch.delenv(name, raising=False)
        with own_server(tmp_path_factory.mktemp("prefect")):
            yield os.environ[API_URL]


def ask(server: str, what: str, **body):
    request = urllib.request.Request(
        f"{server}/{what}/filter", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def states(server: str, run: str) -> dict[str, tuple[str, str]]:
    """Task name -> (state name, state type) of one run's flow."""
    (flow,) = ask(server, "flow_runs", flow_runs={"name": {"any_": [run]}})
    assert flow["state_type"] == "COMPLETED"
    tasks = ask(server, "task_runs", flow_runs={"id": {"any_": [flow["id"]]}})
    return {task["name"]: (task["state_name"], task["state_type"]) for task in tasks}


def run_of(registry: Path) -> str:
    return json.loads(run_cli("runs", "--registry", registry, "--json").stdout)[0]["run"]


def test_a_flow_has_a_task_a_step_and_says_what_was_reused(server, settings, write, tmp_path):
    recipe = write(settings)
    env = {API_URL: server}
    first = run_cli("run", recipe, "--registry", tmp_path / "r", "--until", "warmup", env=env)
    assert first.returncode == 0, first.stderr
    assert first.stderr == "", "the terminal is switchback's"
    run = run_of(tmp_path / "r")
    assert states(server, run) == {
        "base.evaluate": ("Completed", "COMPLETED"),
        "warmup": ("Completed", "COMPLETED"),
        "warmup.evaluate": ("Completed", "COMPLETED"),
        **dict.fromkeys(
            ["rl1", "rl1.evaluate", "harvest", "distill", "distill.evaluate", "rl2", "rl2.evaluate"],
            ("NotSelected", "COMPLETED"),
        ),
    }
    assert not (tmp_path / "r" / "work" / "prefect").exists(), "no server of its own beside the user's"
    again = run_cli("run", recipe, "--registry", tmp_path / "r", "--until", "warmup", env=env)
    assert again.returncode == 0, again.stderr
    shown = states(server, run_of(tmp_path / "r"))
    assert {shown[name][0] for name in ("base.evaluate", "warmup", "warmup.evaluate")} == {"Reused"}


def test_a_failed_stage_is_a_failed_task_and_still_one_line(server, settings, write, tmp_path):
    settings["stages"][0]["deadline"] = 0.05
    done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--only", "warmup", env={API_URL: server})
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "killed after its deadline" in done.stderr
    (flow,) = ask(server, "flow_runs", flow_runs={"name": {"any_": [run_of(tmp_path / "r")]}})
    assert flow["state_type"] == "FAILED"


SCHEDULED = """
from datetime import timedelta
from prefect import flow
@flow
def nightly(): pass
if __name__ == "__main__": nightly.serve(name="soon", interval=timedelta(seconds=5))
"""


def test_a_schedule_fires(server, tmp_path):
    """With sqlalchemy 2.1 it silently never does; this is why that is pinned."""
    (tmp_path / "scheduled.py").write_text(SCHEDULED)
    env = environment(**SETTINGS, PREFECT_HOME=str(tmp_path), **{API_URL: server})
    serving = subprocess.Popen(
        [sys.executable, "scheduled.py"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        ends_at = time.monotonic() + 300
        finished = {"name": {"any_": ["nightly"]}}
        while not (
            done := ask(server, "flow_runs", flows=finished, flow_runs={"state": {"type": {"any_": ["COMPLETED"]}}})
        ):
            assert time.monotonic() < ends_at, "no scheduled run came to its end within 300 s"
            time.sleep(1)
        assert done[0]["auto_scheduled"]
    finally:
        serving.terminate()
        serving.wait()


def listening(pid: int) -> set[str]:
    """The addresses (hex) at which a process listens."""
    inodes = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    return {fields[1].partition(":")[0] for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes}


def test_its_own_server_listens_on_loopback_alone_and_is_gone_afterwards(tmp_path, monkeypatch):
    """Also where the environment names a proxy for everything."""
    monkeypatch.delenv(API_URL, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    processes, variables = descendants(os.getpid()), dict(os.environ)
    with own_server(tmp_path):
        (pid,) = descendants(os.getpid()) - processes
        assert listening(pid) == {"0100007F"}
    assert pid not in descendants(os.getpid()) and dict(os.environ) == variables


def test_a_server_of_its_own_keeps_its_history(settings, write, tmp_path):
    done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--until", "warmup")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r" / "work" / "prefect" / "prefect.db").stat().st_size > 0


def test_an_unreachable_server_is_one_line(settings, write, tmp_path):
    done = run_cli(
        "run",
        write(settings),
        "--registry",
        tmp_path / "r",
        "--only",
        "warmup",
        env={API_URL: "http://127.0.0.1:9/api"},
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "no Prefect server answers at http://127.0.0.1:9/api" in done.stderr
