"""S3 as a real HTTP server: moto's, on a port of its own in a thread, with a door in front that tests can close,
tamper with or count at.

moto looks whether a name is taken and then writes it, in two steps; S3 does it in one, so here one conditional put
goes after the other."""

from __future__ import annotations

import logging
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Answer = list[bytes]
StartResponse = Callable[..., Any]
Door = Callable[[dict[str, Any], Callable[[StartResponse], Answer], StartResponse], Answer]
"""(environ, the way through, start_response) -> answer."""


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    path: str
    query: str


class ObjectServer:
    """One bucket, `bucket`; others are missing."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()
        self.seen: list[Request] = []
        self.door: Door | None = None
        self._server = make_server("127.0.0.1", 0, self._handle, threaded=True, request_handler=_Quiet)
        self.endpoint = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.reset()

    def reset(self) -> None:
        """An empty bucket."""
        self.door = None
        for method, path in (("POST", "/moto-api/reset"), ("PUT", "/bucket")):
            urllib.request.urlopen(urllib.request.Request(self.endpoint + path, method=method, data=b"")).read()
        self.seen.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def env(self) -> dict[str, str]:
        """What a client needs in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
            "AWS_SECRET_ACCESS_KEY": "hush-hush-hush",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }

    @contextmanager
    def behind(self, door: Door) -> Iterator[None]:
        """Put a door in front for a while."""
        self.door = door
        try:
            yield
        finally:
            self.door = None

    def _handle(self, environ: dict[str, Any], start_response: StartResponse) -> Answer:
        self.seen.append(Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", "")))

        def through(start_response: StartResponse) -> Answer:
            if "HTTP_IF_NONE_MATCH" in environ:
                with self._one_at_a_time:
                    return list(self._app(environ, start_response))
            return list(self._app(environ, start_response))

        return self.door(environ, through, start_response) if self.door else through(start_response)


@contextmanager
def serving() -> Iterator[ObjectServer]:
    """A server for as long as the block lasts."""
    server = ObjectServer()
    try:
        yield server
    finally:
        server.close()


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        logging.getLogger("object_server").debug(message, *args)
