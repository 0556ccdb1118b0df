"""Before a run: whatever answers at PREFECT_API_URL in a server's place is named in one line, with its likely cause.

The servers are real HTTP servers in threads. One process asks them all, as the process that shows a run does."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.flows import report
from stages.errors import BadInput
from tests.conftest import environment

ASK = """
import json, os, sys
from prefect.settings import PREFECT_API_URL, temporary_settings
from pipeline.flows.health import complaint
for name, (url, variables) in json.loads(sys.argv[1]).items():
    os.environ.update(variables)
    with temporary_settings({PREFECT_API_URL: url}):
        print(json.dumps([name, complaint()]), flush=True)
    for variable in variables:
        del os.environ[variable]
"""
PAGE = b"<html>Prefect</html>"


class Fake(BaseHTTPRequestHandler):
    """GET /<status>/... answers with that status and a page; /hole never answers; /slow says that it is well, and is
    silent afterwards; /api says that it is well, and knows no user."""

    def do_GET(self) -> None:
        case, last = self.path.split("/")[1] or "503", self.path.rpartition("/")[2]  # a proxy gets whole URLs
        if case == "hole" or (case == "slow" and last != "health"):
            self.server.over.wait()  # type: ignore[attr-defined]
            return
        if case in ("slow", "api"):
            status, body, kind = (200, b"true", "application/json") if last == "health" else (401, b"{}", "text/plain")
        else:
            status, body, kind = int(case) if case.isdigit() else 200, PAGE, "text/html"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *_: object) -> None:
        """Be quiet."""


@contextmanager
def fake() -> Iterator[str]:
    """The address of the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    server.over = threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.over.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def said() -> dict[str, str | None]:
    """Case -> the complaint about it, without the address."""
    with fake() as at:
        urls = {case: (f"{at}/{case}/api", {}) for case in ("401", "403", "404", "500", "503", "slow", "hole")}
        urls |= {
            "no /api": (f"{at}/web", {}),
            "wrong password": (f"{at}/api", {}),
            "proxy": ("http://prefect.example:4200/api", {"http_proxy": at}),
            "dead proxy": (f"{at}/api", {"HTTP_PROXY": "http://127.0.0.1:9"}),
            "dead": ("http://me:secret@127.0.0.1:9/api", {}),
            "no URL": ("prefect", {}),
        }
        done = subprocess.run(
            [sys.executable, "-c", ASK, json.dumps(urls)],
            env={**environment(**report.OURS), "DO_NOT_TRACK": "1", "PREFECT_SERVER_EPHEMERAL_ENABLED": "false"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    return {name: line and line.replace(at, "AT") for name, line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("401", ["does not know us (found status 401)", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"]),
        ("wrong password", ["does not know us (found status 401)", "PREFECT_API_AUTH_STRING"]),
        ("403", ["refuses us (found status 403)", "PREFECT_API_KEY"]),
        ("404", ["no Prefect API is at AT/404/api (found status 404)"]),
        ("no /api", ["a web page is at AT/web (expected Prefect's API). Fix: set it to AT/web/api"]),
        ("500", ["is not well (found status 500)"]),
        ("503", ["a proxy or gateway answers", "(found status 503)"]),
        (
            "proxy",
            ["(found status 503; HTTP_PROXY sends the request to a proxy). Fix: add prefect.example to NO_PROXY"],
        ),
        ("dead proxy", ["Connection refused; HTTP_PROXY sends", "Fix: add 127.0.0.1 to NO_PROXY"]),
        ("hole", ["no Prefect server answers at AT/hole/api (no answer in time)"]),
        ("dead", ["no Prefect server answers at http://127.0.0.1:9/api (", "Connection refused"]),
        ("no URL", ["no Prefect server answers at prefect"]),
    ],
)
def test_the_line_names_the_likely_cause(said, case, words):
    line = said[case]
    assert line and "\n" not in line
    for word in words:
        assert word in line
    assert "secret" not in line


def test_a_slow_server_that_is_well_is_not_refused(said):
    assert said["slow"] is None


def test_settings_that_prefect_does_not_take_are_bad_input(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    env = environment(PREFECT_API_URL="http://127.0.0.1:9/api", PREFECT_LOGGING_LEVEL="SHOUT")
    with report.FlowProcess(env, None, pytest.fail) as process, pytest.raises(BadInput) as refused:
        process.ask()
    assert "Prefect's settings for http://127.0.0.1:9/api cannot be used (ValidationError" in str(refused.value)
    assert str(refused.value).endswith("unset the variable, or use --no-prefect")
