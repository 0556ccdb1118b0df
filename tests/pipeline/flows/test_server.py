"""A run's own Prefect server: only its user gets in, neither from another page nor from another account, and it
knows nothing of the user."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

from pipeline.errors import Failed
from pipeline.flows.report import flow_process
from pipeline.flows.server import API_URL, Own, own_server
from pipeline.registry import Registry
from pipeline.registry.workdir import prefect_home
from stages.runtime.process import descendants
from tests.conftest import run_cli

pytestmark = pytest.mark.slow

USERS = {
    "PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////nowhere/users.db",
    "PREFECT_SERVER_API_HOST": "0.0.0.0",
    "HF_TOKEN": "hf_a_secret",
    "AWS_SECRET_ACCESS_KEY": "a secret",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
}
"""Of a user: settings of another server, credentials, and a proxy for everything."""
AS_ANOTHER = 54321
"""A uid without a name."""
root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")


class Started(NamedTuple):
    own: Own
    pid: int
    home: Path


def started(home: Path, run: str) -> Iterator[Started]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(API_URL, raising=False)
        for name, value in USERS.items():
            patch.setenv(name, value)
        before = descendants(os.getpid())
        with own_server(home, run) as own:
            (pid,) = descendants(os.getpid()) - before
            yield Started(own, pid, home)
        assert pid not in descendants(os.getpid()) and not own.password.exists()


@pytest.fixture(scope="module")
def server() -> Iterator[Started]:
    """A server of a run's own, started in the environment of USERS. It is gone afterwards, and so is its password. Its
    home is where every account may look, as a registry is."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        above = Path(directory) / "100%?a=b#c"  # what ends or escapes a URL
        above.mkdir()
        yield from started(above / "prefect", "a-run")


def test_its_database_is_in_its_home_whatever_the_path(server):
    above = server.home.parent
    assert [path.name for path in above.parent.iterdir()] == ["100%?a=b#c"]
    assert [path.name for path in above.iterdir()] == ["prefect"] and (server.home / "prefect.db").stat().st_size


@pytest.fixture(scope="module")
def second(server) -> Iterator[Started]:
    """The server of another run in the same registry."""
    yield from started(server.home, "another-run")


def test_a_home_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    (tmp_path / "prefect").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Failed, match="is a link or another user's"), own_server(tmp_path / "prefect", "a-run"):
        pass
    assert not list((tmp_path / "elsewhere").iterdir()) and (tmp_path / "elsewhere").stat().st_mode & 0o077 == 0o055


def status(server: Started, path: str, body: object = None, password: str | None = None, **headers: str) -> int:
    """The status of an answer; `headers` with _ for -. A body makes it a POST."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.own.page}{path}", data, {"Content-Type": "application/json"})
    if password is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(password.encode()).decode()}")
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            answer.read()
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def password_of(server: Started) -> str:
    return server.own.password.read_text().strip()


def csrf(server: Started, **headers: str) -> dict[str, str]:
    """The headers that a page of the server's own sends with a change."""
    client = str(uuid.uuid4())
    token = base64.b64encode(password_of(server).encode()).decode()
    request = urllib.request.Request(
        f"{server.own.page}/api/csrf-token?client={client}", headers={"Authorization": f"Basic {token}"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return {**headers, "Prefect_Csrf_Token": json.load(answer)["token"], "Prefect_Csrf_Client": client}


def listening(pid: int) -> set[str]:
    """The addresses (hex) at which a process listens."""
    inodes = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    return {fields[1].partition(":")[0] for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes}


def test_it_listens_on_loopback_alone(server):
    assert listening(server.pid) == {"0100007F"}


def test_it_answers_its_user_and_its_own_page(server):
    password = password_of(server)
    assert status(server, "/", Accept="text/html") == 200
    assert status(server, "/api/flow_runs/filter", {}, password, **csrf(server)) == 200
    assert status(server, "/api/flow_runs/filter", {}, password, **csrf(server, Origin=server.own.page)) == 200


def test_it_answers_nobody_without_its_password(server):
    assert status(server, "/api/admin/settings") == 401
    assert status(server, "/api/admin/settings", password="another") == 401
    assert status(server, "/api/flow_runs/filter", {}, **csrf(server)) == 401


def test_it_takes_no_change_that_a_page_could_forge(server):
    assert status(server, "/api/flow_runs/filter", {}, password_of(server)) == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:{port}", "http://127.0.0.1:1"])
def test_a_page_of_another_origin_is_refused(server, origin):
    port = str(urlsplit(server.own.page).port)
    headers = csrf(server, Origin=origin.replace("{port}", port))
    assert status(server, "/api/flow_runs/filter", {}, password_of(server), **headers) == 403
    assert status(server, "/api/admin/version", password=password_of(server), Origin=headers["Origin"]) == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", ""])
def test_another_host_is_refused(server, host):
    """As after a DNS rebinding: the name is another page's, the address is ours."""
    headers = {"Host": host.replace("{port}", str(urlsplit(server.own.page).port))}
    assert status(server, "/api/admin/version", password=password_of(server), **headers) == 403
    assert status(server, "/", **headers) == 403


@pytest.mark.parametrize(("origin", "answer"), [("https://evil.example", "403"), (None, "101")])
def test_a_web_socket_of_another_page_is_refused(server, origin, answer):
    address = urlsplit(server.own.page)
    lines = [
        "GET /api/events/out HTTP/1.1",
        f"Host: {address.netloc}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Protocol: prefect",
        *([f"Origin: {origin}"] if origin else []),
    ]
    with socket.create_connection(("127.0.0.1", address.port or 0), timeout=60) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        assert connection.recv(4096).split()[1].decode() == answer


def test_its_password_is_its_users_alone(server):
    password = password_of(server)
    assert len(password) >= 32
    assert (server.own.password.stat().st_mode & 0o777, server.home.stat().st_mode & 0o777) == (0o600, 0o700)
    commands = [path.read_bytes() for pid in {server.pid, os.getpid()} for path in [Path(f"/proc/{pid}/cmdline")]]
    assert not any(password.encode() in command for command in commands)
    assert password not in (server.home / "server.log").read_text()


@root_only
def test_another_account_cannot_read_its_password(server):
    cat = subprocess.run(["cat", server.own.password], user=AS_ANOTHER, capture_output=True, text=True)
    assert cat.returncode != 0 and "Permission denied" in cat.stderr
    kept = subprocess.run(["cat", f"/proc/{server.pid}/environ"], user=AS_ANOTHER, capture_output=True, text=True)
    assert kept.returncode != 0 and not kept.stdout


def test_server_and_client_see_nothing_of_the_user(server):
    seen = dict(line.split("=", 1) for line in Path(f"/proc/{server.pid}/environ").read_text().split("\0") if line)
    for environment in (seen, server.own.environment):
        assert not USERS.keys() & environment.keys()
        assert environment["HOME"] == environment["PREFECT_HOME"] == str(server.home)
    assert Path(f"/proc/{server.pid}/cwd").resolve() == server.home.resolve()


def test_two_runs_at_once_have_a_server_and_a_password_each(server, second):
    for one, other in ((server, second), (second, server)):
        assert status(one, "/api/admin/version", password=password_of(one)) == 200
        assert status(one, "/api/admin/version", password=password_of(other)) == 401


def test_a_signal_to_the_whole_process_tree_leaves_it_to_the_run(second):
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(second.pid, number)
    assert status(second, "/api/admin/version", password=password_of(second)) == 200


def with_a_database(home: Path, server: Started) -> None:
    """Make the home of a server with a database, which saves the seconds that a new one takes."""
    home.mkdir(parents=True)
    with sqlite3.connect(server.home / "prefect.db") as source, sqlite3.connect(home / "prefect.db") as copy:
        source.backup(copy)
    shutil.copy(server.home / "memo_store.toml", home)


def test_a_run_names_its_page_and_password_and_keeps_its_history(server, settings, write, tmp_path):
    registry = tmp_path / "r"
    with_a_database(registry / "work" / "prefect", server)
    done = run_cli("run", write(settings), "--registry", registry, "--only", "warmup", env=USERS)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = [line for line in done.stdout.splitlines() if "Prefect" in line]
    run = json.loads(run_cli("runs", "--registry", registry, "--json").stdout)[0]["run"]
    password = registry / "work" / "prefect" / f"password-{run}"
    assert line.startswith("Prefect shows this run at http://127.0.0.1:")
    assert line.endswith(f" (its password: {password})") and not password.exists()
    with sqlite3.connect(registry / "work" / "prefect" / "prefect.db") as database:
        assert database.execute("select name, state_type from flow_run").fetchall() == [(run, "COMPLETED")]


def test_a_server_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    """A home that is a file: the run does without Prefect."""
    monkeypatch.delenv(API_URL, raising=False)
    (tmp_path / "prefect").write_text("")
    notes: list[str] = []
    with flow_process(tmp_path / "prefect", "a-run", notes.append) as process:
        assert process is None
    assert len(notes) == 1 and notes[0].startswith("Prefect does not show this run: "), notes


@root_only
def test_each_user_of_a_shared_registry_has_a_home_for_servers(tmp_path, monkeypatch):
    monkeypatch.delenv("SWITCHBACK_WORK", raising=False)
    root = tmp_path / "r"
    root.mkdir()
    root.chmod(0o2775)
    home = prefect_home(Registry(root))
    assert home == root / "work" / "prefect" and (root / "work").stat().st_mode & 0o7777 == 0o2775
    home.mkdir()
    assert prefect_home(Registry(root)) == home
    os.chown(home, AS_ANOTHER, AS_ANOTHER)
    assert prefect_home(Registry(root)) == root / "work" / f"prefect-{os.getuid()}"


NAMELESS = """
import sys
from pathlib import Path
from types import SimpleNamespace
from pipeline.flows.report import flow_process
notes = []
with flow_process(Path(sys.argv[1]), "nameless", notes.append) as process:
    process.begin("nameless", [SimpleNamespace(step=SimpleNamespace(name="only", inputs={}))])
    process.became("Completed", "only-1")
print(notes)
"""


@root_only
@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv gives a process a uid without a name")
@pytest.mark.parametrize("users", [True, False])
def test_an_account_without_home_and_name_is_shown(users, server, tmp_path):
    """With a server of the user's, and with one of the run's own. The capability is for this checkout, which may lie in
    root's home."""
    home = tmp_path / "prefect"
    with_a_database(home, server)
    for path in (home, *home.iterdir()):
        os.chown(path, AS_ANOTHER, AS_ANOTHER)
    env = {"PATH": os.environ["PATH"]}
    if users:
        env |= {name: value for name, value in server.own.environment.items() if name.startswith("PREFECT_API")}
    capability = "+dac_override,+dac_read_search"
    another = ["setpriv", f"--reuid={AS_ANOTHER}", "--clear-groups", f"--inh-caps={capability}"]
    done = subprocess.run(
        [*another, f"--ambient-caps={capability}", sys.executable, "-c", NAMELESS, home],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert ("Prefect shows this run at" in done.stdout) is not users, done.stdout
    assert "does not show" not in done.stdout
