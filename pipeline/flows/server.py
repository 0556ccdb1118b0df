"""A Prefect server of a run's own, where PREFECT_API_URL names none: loopback, a free port, its own kept home, no
telemetry, gone with the run.

Imports no Prefect. `own_server` starts `pipeline.flows.application` and gives back an Own: where the page is, and the
environment of whatever talks to the server. Each server has a password of its own, which lies in a file that only this
user can read. Neither server nor client sees the user's PREFECT_* variables, home or credentials.

The server is killed with this process, however that dies. Its home keeps the history of runs for
`PREFECT_HOME=<registry>/work/prefect prefect server start`.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from pipeline.errors import Failed
from stages.runtime import signals

API_URL = "PREFECT_API_URL"
SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
}
"""Of server and client."""
PASSED = ("PATH", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONHOME")
"""All that server and client see of this process's environment."""
DATABASE = "prefect.db"
"""In the home, where Prefect looks for it by itself."""
PATIENCE = 120.0
"""Seconds a server may take to answer; a new database takes about 10."""


class Own(NamedTuple):
    """A server of a run's own, while it runs."""

    page: str
    """Its address in a browser."""
    password: Path
    """The file with the password that the page asks for."""
    environment: dict[str, str]
    """For the process that talks to it."""


def api_url() -> str | None:
    """The user's own server."""
    return os.environ.get(API_URL) or None


def without_user(url: str) -> str:
    """A URL without the user, password and query that it may hold."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "an address that is no URL"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


@contextmanager
def own_server(home: Path, run: str) -> Iterator[Own]:
    """A server that answers inside this block. Its password is in the file `password-<run>` of its home.

    Raises Failed when it does not answer, OSError where its home cannot be written.
    """
    home.mkdir(parents=True, exist_ok=True)
    if home.is_symlink() or home.stat().st_uid != os.geteuid():
        raise Failed(f"{home} is a link or another user's (found it there, expected none). Fix: remove it")
    home.chmod(0o700)
    password = secrets.token_urlsafe(32)
    file = home / f"password-{run}"
    with open(file, "x", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
        print(password, file=out)
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            page = f"http://127.0.0.1:{listener.getsockname()[1]}"
            server = _start(listener, home, _of_the_server(home, page, password))
        try:
            _wait_until_healthy(server, f"{page}/api", home / "server.log")
            yield Own(page, file, _of_the_client(home, page, password))
        finally:
            server.kill()
            server.wait()
    finally:
        file.unlink(missing_ok=True)


def _clean(home: Path) -> dict[str, str]:
    passed = {name: value for name, value in os.environ.items() if name in PASSED}
    return {**passed, **SETTINGS, "HOME": str(home), "PREFECT_HOME": str(home)}


def _of_the_server(home: Path, page: str, password: str) -> dict[str, str]:
    return {
        **_clean(home),
        "PREFECT_SERVER_API_AUTH_STRING": password,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": page,
        "PREFECT_SERVER_UI_API_URL": f"{page}/api",
        # a URL of its own, because Prefect's ends at the first ? of a path
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///file:{quote(str(home / DATABASE))}?uri=true",
    }


def _of_the_client(home: Path, page: str, password: str) -> dict[str, str]:
    return {**_clean(home), API_URL: f"{page}/api", "PREFECT_API_AUTH_STRING": password}


def _start(listener: socket.socket, home: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The server's process. It gets the listening socket, so that no other process takes its port before it is up."""
    command = [sys.executable, "-P", "-m", "pipeline.flows.application", str(listener.fileno()), str(os.getpid())]
    with (home / "server.log").open("a", encoding="utf-8") as log, signals.held():
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=home,  # Prefect reads settings from files of its working directory
            pass_fds=(listener.fileno(),),
            start_new_session=True,
        )


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    ends_at = time.monotonic() + PATIENCE
    while time.monotonic() < ends_at:
        if server.poll() is not None:
            raise Failed(f"the Prefect server ended at once (exit {server.returncode}); see {log}")
        if _healthy(url):
            return
        time.sleep(0.1)
    raise Failed(f"the Prefect server did not answer within {PATIENCE:g} s; see {log}")


def _healthy(url: str) -> bool:
    """Whether our own server says that it is well; asked directly, whatever proxies the environment names."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
