"""A Prefect server of a run's own, where PREFECT_API_URL names none: loopback, a free port, its own kept home, no
telemetry, gone with the run.

Imports no Prefect. The server is killed with this process, however that dies; its home keeps the history of runs for
`PREFECT_HOME=<registry>/work/prefect prefect server start`.
"""

from __future__ import annotations

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

from pipeline.errors import Failed
from stages.errors import BadInput
from stages.runtime.process import die_with_parent

API_URL = "PREFECT_API_URL"
SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
}
"""Of server and client."""
PATIENCE = 120.0
"""Seconds a server may take to answer; a new database takes about 10."""


def api_url() -> str | None:
    """The user's own server."""
    return os.environ.get(API_URL) or None


@contextmanager
def own_server(home: Path) -> Iterator[None]:
    """PREFECT_API_URL answers inside this block: the user's, else a server started here and stopped at the end.

    Raises BadInput when the user's does not answer, Failed when ours does not.
    """
    users_url = api_url()
    if users_url is not None:
        if not _answers(users_url):
            raise BadInput(
                f"{API_URL}: no Prefect server answers at {users_url}; start it, unset the variable, or use "
                "--no-prefect"
            )
        yield
        return
    home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    with _environment({**SETTINGS, "PREFECT_HOME": str(home), API_URL: url, **_no_proxy()}):
        with (home / "server.log").open("w", encoding="utf-8") as log:
            server = _start(port, log.fileno())
        try:
            _wait_until_healthy(server, url, home / "server.log")
            yield
        finally:
            server.kill()
            server.wait()


def _no_proxy() -> dict[str, str]:
    """The variables that keep Prefect's client from asking a proxy for 127.0.0.1."""
    return {name: ",".join(filter(None, [os.environ.get(name), "127.0.0.1"])) for name in ("NO_PROXY", "no_proxy")}


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables of this process inside the block, and give it its own back afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start(port: int, log: int) -> subprocess.Popen[bytes]:
    me = os.getpid()
    application = ["prefect.server.api.server:create_app", "--factory", "--host", "127.0.0.1", "--port", str(port)]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "uvicorn", *application, "--log-level", "warning"],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=lambda: die_with_parent(me),  # noqa: PLW1509 - no thread has been started yet
    )


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    ends_at = time.monotonic() + PATIENCE
    while time.monotonic() < ends_at:
        if server.poll() is not None:
            raise Failed(f"the Prefect server ended at once (exit {server.returncode}); see {log}, or use --no-prefect")
        if _healthy(url):
            return
        time.sleep(0.1)
    raise Failed(f"the Prefect server did not answer within {PATIENCE:g} s; see {log}, or use --no-prefect")


def _answers(url: str) -> bool:
    """Whether an HTTP server is there, whatever it says."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5):  # noqa: S310 - the user's own setting
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def _healthy(url: str) -> bool:
    """Whether our own server says that it is well; asked directly, whatever proxies the environment names."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
