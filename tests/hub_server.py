"""A hub of one's own: what huggingface_hub needs for one commit, over real HTTP, keeping what it was sent.

Repositories have branches, each a list of commits; a commit is a dict of path -> bytes. Large files go through
git-lfs's batch API and are checked against their SHA-256. Every request needs the one token; `refuse` makes the next
requests of a kind fail."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

Tree = dict[str, bytes]
TOKEN = "hf_a_secret_of_the_test"
REPO = r"/api/(?P<kind>model|dataset)s/(?P<repo>[^/]+/[^/]+)"


@dataclass
class Commit:
    message: str
    files: Tree

    @property
    def sha(self) -> str:
        content = repr((self.message, sorted(self.files.items())))
        return hashlib.sha1(content.encode()).hexdigest()


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("initial commit", {})]})

    def head(self, revision: str) -> Commit:
        found = [log[-1] for name, log in self.branches.items() if revision in (name, log[-1].sha)]
        if not found:
            raise Refused(404, "Revision Not Found")
        return found[0]


class Refused(Exception):
    """A status, what the server says, and what else its answer holds."""


@dataclass
class Hub:
    """What it holds; `url` is where it listens."""

    url: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    blobs: Tree = field(default_factory=dict)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Pattern of a path -> how such a request fails."""
    before: dict[str, Callable[[], None]] = field(default_factory=dict)
    """Pattern of a path -> what happens before such a request is answered."""
    seen: list[str] = field(default_factory=list)
    """Method and path of each request."""

    def files(self, repo: str, branch: str = "main", kind: str = "model") -> Tree:
        return self.repositories[kind, repo].branches[branch][-1].files

    def messages(self, repo: str, branch: str = "main", kind: str = "model") -> list[str]:
        return [commit.message for commit in self.repositories[kind, repo].branches[branch]]

    def create(self, body: Any, **_: str) -> Any:
        key = (body.get("type", "model"), f"{body['organization']}/{body['name']}")
        if key in self.repositories:
            raise Refused(409, "You already created this repo", {"url": self._url_of(*key)})
        self.repositories[key] = Repository(private=body["visibility"] == "private")
        return {"url": self._url_of(*key), "id": key[1]}

    def _url_of(self, kind: str, repo: str) -> str:
        return f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{repo}"

    def info(self, body: Any, kind: str, repo: str, revision: str | None = None) -> Any:
        found = self._repository(kind, repo)
        head = found.head(revision or "main")
        siblings = [{"rfilename": path} for path in head.files]
        return {"id": repo, "sha": head.sha, "private": found.private, "siblings": siblings, "tags": []}

    def tree(self, body: Any, kind: str, repo: str, revision: str) -> Any:
        head = self._repository(kind, repo).head(revision)
        return [{"type": "file", "path": p, "size": len(c), "oid": _blob(c)} for p, c in head.files.items()]

    def branch(self, body: Any, kind: str, repo: str, name: str) -> Any:
        branches = self._repository(kind, repo).branches
        if name in branches:
            raise Refused(409, "Reference already exists")
        branches[name] = list(branches["main"])
        return {}

    def validate_yaml(self, body: Any) -> Any:
        _, front, _ = body["content"].split("---\n", 2)
        found = yaml.safe_load(front)
        if body["repoType"] == "model" and "/" not in found.get("base_model", "/"):
            raise Refused(400, "base_model is no id of a model")
        return {"errors": [], "warnings": []}

    def preupload(self, body: Any, kind: str, repo: str, revision: str) -> Any:
        there = self._repository(kind, repo).head(revision).files
        return {"files": [_upload_mode(file, there) for file in body["files"]]}

    def lfs_batch(self, body: Any, repo: str) -> Any:
        return {"transfer": "basic", "objects": [self._lfs_object(one) for one in body["objects"]]}

    def _lfs_object(self, one: Any) -> Any:
        upload = {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}
        return one if one["oid"] in self.blobs else {**one, "actions": upload}

    def lfs_put(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the bytes are not those of the oid")
        self.blobs[oid] = body
        return {}

    def commit(self, body: list[Any], kind: str, repo: str, revision: str) -> Any:
        found = self._repository(kind, repo)
        header, *operations = body
        if (parent := header["value"].get("parentCommit")) and parent != found.head(revision).sha:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(found.head(revision).files)
        for operation in operations:
            self._apply(operation["key"], operation["value"], files)
        made = Commit(header["value"]["summary"], files)
        found.branches[revision].append(made)
        return {"commitUrl": f"{self.url}/{repo}/commit/{made.sha}", "commitOid": made.sha}

    def _apply(self, key: str, value: Any, files: Tree) -> None:
        if key == "deletedFile":
            del files[value["path"]]
        elif key == "lfsFile":
            files[value["path"]] = self.blobs[value["oid"]]
        else:
            files[value["path"]] = base64.b64decode(value["content"])

    def _repository(self, kind: str, repo: str) -> Repository:
        if (kind, repo) not in self.repositories:
            raise Refused(404, "Repository not found")
        return self.repositories[kind, repo]


ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate_yaml),
    ("GET", rf"{REPO}(/revision/(?P<revision>[^/]+))?", Hub.info),
    ("GET", rf"{REPO}/tree/(?P<revision>[^/]+)", Hub.tree),
    ("POST", rf"{REPO}/branch/(?P<name>[^/]+)", Hub.branch),
    ("POST", rf"{REPO}/preupload/(?P<revision>[^/]+)", Hub.preupload),
    ("POST", rf"{REPO}/commit/(?P<revision>[^/]+)", Hub.commit),
    ("POST", r"/(datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Hub.lfs_put),
]


def _upload_mode(file: Any, there: Tree) -> Any:
    large = file["path"].endswith(".safetensors")
    known = there.get(file["path"])
    oid = None if known is None else hashlib.sha256(known).hexdigest() if large else _blob(known)
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


def _blob(content: bytes) -> str:
    """As git names it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    """One that listens on a port of its own."""
    held = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.body()
            path = urlsplit(self.path).path
            held.seen.append(f"{self.command} {path}")
            try:
                self.send(200, answered(held, self.command, path, self.headers, body))
            except Refused as refused:
                status, message, *more = refused.args
                self.send(status, {"error": message, **(more[0] if more else {})})

        do_GET = do_POST = do_PUT = answer

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def send(self, status: int, content: Any) -> None:
            encoded = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answered(held: Hub, method: str, path: str, headers: Any, body: bytes) -> Any:
    """What the hub says to a request. Raises Refused."""
    for pattern, happens in held.before.items():
        if re.search(pattern, path):
            happens()
    for pattern, (status, message) in held.refuse.items():
        if re.search(pattern, path):
            raise Refused(status, message)
    for wanted, pattern, handle in ROUTES:
        if method == wanted and (match := re.fullmatch(pattern, path)):
            if handle is not Hub.lfs_put and headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "Invalid username or password.")
            arguments = {name: unquote(value) for name, value in match.groupdict().items() if value}
            return handle(held, decoded(headers.get("Content-Type", ""), body), **arguments)
    raise Refused(404, f"{method} {path} is not known here")


def decoded(kind: str, body: bytes) -> Any:
    if "ndjson" in kind:
        return [json.loads(line) for line in body.splitlines()]
    return json.loads(body) if "json" in kind and body else body
