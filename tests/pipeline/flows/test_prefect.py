"""Prefect for real, on a server as a user has one, with a password: a flow shows its steps and what was reused, a
schedule plans its runs, and nothing that happens to the server decides anything."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.flows.report import flow_process
from pipeline.flows.server import API_URL, SETTINGS
from pipeline.plan import plan
from pipeline.recipe import recipe as recipes
from pipeline.registry import Registry
from stages.runtime.process import descendants
from tests.conftest import TINY, Settings, environment, run_cli
from tests.pipeline.flows.gate import Gate

pytestmark = pytest.mark.slow

AUTH, PASSWORD = "PREFECT_API_AUTH_STRING", "admin:a secret"
SOON = {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1"}
"""The server looks at schedules every second."""
FIRST = ("base.evaluate", "warmup", "warmup.evaluate")
REST = ("rl1", "rl1.evaluate", "harvest", "distill", "distill.evaluate", "rl2", "rl2.evaluate")


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Iterator[int]:
    """Where a user's own server listens."""
    home = tmp_path_factory.mktemp("users")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    settings = {
        **SETTINGS,
        **SOON,
        "HOME": str(home),
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_AUTH_STRING": PASSWORD,
    }
    application = ["prefect.server.api.server:create_app", "--factory", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", *application, "--log-level", "warning"],
            env=environment(**settings),
            cwd=home,
            stdout=log,
            stderr=log,
        )
    try:
        ends_at = time.monotonic() + 300
        while not is_well(port):
            assert server.poll() is None and time.monotonic() < ends_at, (home / "log").read_text()
            time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait()


def is_well(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=60) as answer:
            return answer.status == 200
    except OSError:
        return False


def of_a_user(port: int) -> dict[str, str]:
    """A user's environment."""
    return {API_URL: f"http://127.0.0.1:{port}/api", AUTH: PASSWORD}


def post(port: int, path: str, **body: Any) -> Any:
    """A server's answer to a request."""
    token = base64.b64encode(PASSWORD.encode()).decode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Basic {token}"},
    )
    for _ in range(100):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            assert error.code == 503, error  # its database is locked
            time.sleep(0.2)
    raise AssertionError("its database was locked for too long")


def ask(port: int, what: str, **body: Any) -> Any:
    """Rows of a server's table."""
    return post(port, f"{what}/filter", **body)


def flow_of(port: int, run: str) -> dict[str, Any]:
    (flow,) = ask(port, "flow_runs", flow_runs={"name": {"any_": [run]}})
    return flow


def states(port: int, run: str) -> dict[str, tuple[str, str]]:
    """Task name -> (state name, state type) of one run's flow."""
    tasks = ask(port, "task_runs", flow_runs={"id": {"any_": [flow_of(port, run)["id"]]}})
    return {task["name"]: (task["state_name"], task["state_type"]) for task in tasks}


def run_of(registry: Path) -> str:
    return json.loads(run_cli("runs", "--registry", registry, "--json").stdout)[0]["run"]


@pytest.fixture(scope="module")
def warmed(port, tmp_path_factory) -> tuple[Path, Path]:
    """(recipe, registry) of the tiny recipe up to its warm-up, run with Prefect."""
    directory = tmp_path_factory.mktemp("warmed")
    recipe = directory / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(TINY, sort_keys=False))
    done = run_cli("run", recipe, "--registry", directory / "r", "--until", "warmup", env=of_a_user(port))
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "Prefect" not in done.stdout, "the terminal is switchback's"
    return recipe, directory / "r"


def test_a_flow_has_a_task_a_step_and_says_what_was_reused(port, warmed):
    recipe, registry = warmed
    skipped = dict.fromkeys(REST, ("NotSelected", "COMPLETED"))
    first = run_of(registry)
    assert flow_of(port, first)["state_type"] == "COMPLETED"
    assert states(port, first) == {**dict.fromkeys(FIRST, ("Completed", "COMPLETED")), **skipped}
    assert not (registry / "work" / "prefect").exists(), "no server of its own where the user has one"
    again = run_cli("run", recipe, "--registry", registry, "--until", "warmup", env=of_a_user(port))
    assert (again.returncode, again.stderr) == (0, "")
    assert states(port, run_of(registry)) == {**dict.fromkeys(FIRST, ("Reused", "COMPLETED")), **skipped}


def test_a_failed_stage_is_a_failed_task_and_still_one_line(port, settings, write, tmp_path):
    settings["stages"][0]["deadline"] = 0.05
    run = ("run", write(settings), "--registry", tmp_path / "r", "--only", "warmup")
    done = run_cli(*run, env=of_a_user(port))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "killed after its deadline" in done.stderr
    name = run_of(tmp_path / "r")
    assert flow_of(port, name)["state_type"] == "FAILED"
    assert states(port, name) == {"base.evaluate": ("NotSelected", "COMPLETED"), "warmup": ("Failed", "FAILED")}


def test_a_server_that_dies_changes_neither_the_run_nor_its_exit_code(port, warmed):
    """The gate takes the connection that asks before the run, and no other."""
    recipe, registry = warmed
    with Gate(port, let=1) as gate:
        done = run_cli("run", recipe, "--registry", registry, "--until", "warmup", env=of_a_user(gate.port))
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = [line for line in done.stdout.splitlines() if "Prefect" in line]
    assert line.startswith("Prefect does not show the rest of this run: ")
    assert json.loads(run_cli("runs", "--registry", registry, "--json").stdout)[0]["state"] == "done"


# the process that shows a run, with steps that take no time


@contextmanager
def shown(port: int, home: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> Iterator[Any]:
    for name, value in of_a_user(port).items():
        monkeypatch.setenv(name, value)
    with flow_process(home, "a run", notes.append) as process:
        yield process


def planned(settings: Settings, directory: Path) -> list[plan.Planned]:
    return plan.plan(recipes.Recipe.model_validate(settings), Registry(directory))


def test_no_step_waits_for_an_answer(port, settings, tmp_path, monkeypatch):
    """Every answer is held until the last step has ended, and still all of it is shown."""
    notes: list[str] = []
    steps = planned(settings, tmp_path / "r")
    with Gate(port) as gate, shown(gate.port, tmp_path, monkeypatch, notes) as process:
        gate.hold()
        process.begin("held", steps)
        for one in steps:
            process.became("Completed", one.step.name)
        gate.release()
    assert notes == []
    assert states(port, "held") == {one.step.name: ("Completed", "COMPLETED") for one in steps}


def test_a_server_that_dies_is_one_line(port, settings, tmp_path, monkeypatch):
    notes: list[str] = []
    steps = planned(settings, tmp_path / "r")
    with Gate(port) as gate, shown(gate.port, tmp_path, monkeypatch, notes) as process:
        process.begin("cut", steps)
        while not ask(port, "task_runs", flow_runs={"name": {"any_": ["cut"]}}):
            time.sleep(0.1)
        gate.cut()
        for one in steps:
            process.became("Completed", one.step.name)
    assert len(notes) == 1 and notes[0].startswith("Prefect does not show the rest of this run: "), notes


def test_an_interrupted_run_is_a_crashed_flow_and_leaves_no_process(port, settings, tmp_path, monkeypatch):
    before, notes = descendants(os.getpid()), list[str]()
    with pytest.raises(KeyboardInterrupt), shown(port, tmp_path, monkeypatch, notes) as process:
        process.begin("interrupted", planned(settings, tmp_path / "r"))
        while not ask(port, "task_runs", flow_runs={"name": {"any_": ["interrupted"]}}):
            time.sleep(0.1)
        raise KeyboardInterrupt
    assert flow_of(port, "interrupted")["state_type"] == "CRASHED"
    assert descendants(os.getpid()) <= before and notes == []


def test_a_schedule_plans_its_runs(port):
    """With sqlalchemy 2.1 it silently never does; this is why that is pinned."""
    flow = post(port, "flows/", name="nightly")["id"]
    every_hour = {"schedule": {"interval": 3600}, "active": True}
    post(port, "deployments/", name="soon", flow_id=flow, schedules=[every_hour])
    ends_at = time.monotonic() + 300
    while not (planned := ask(port, "flow_runs", flows={"name": {"any_": ["nightly"]}})):
        assert time.monotonic() < ends_at, "no run was planned within 300 s"
        time.sleep(0.2)
    assert all(run["auto_scheduled"] and run["state_type"] == "SCHEDULED" for run in planned)


def test_an_unreachable_server_is_one_line(settings, write, tmp_path):
    run = ("run", write(settings), "--registry", tmp_path / "r", "--only", "warmup")
    done = run_cli(*run, env={API_URL: "http://127.0.0.1:9/api"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "no Prefect server answers at http://127.0.0.1:9/api" in done.stderr
