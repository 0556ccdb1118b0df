"""The process of a run's own Prefect server: Prefect's application, behind a look at where a request is from.

A listening socket and an environment come in (`pipeline.flows.server`), Prefect's API and page go out. The environment
sets the password, the protection against forged requests (CSRF) and the origin of the page (CORS). A browser on this
machine runs pages of others too, and each may send requests to loopback. So this file refuses every request whose
`Host` is not the server's address, or whose `Origin` is another page.
"""

from __future__ import annotations

import socket
import sys

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from stages.runtime.process import die_with_parent


def main(fd: int, parent: int) -> None:
    """Serve on the listening socket `fd` until the run, process `parent`, ends or kills this one."""
    die_with_parent(parent)  # signals stay blocked, as it was started: those to the whole process tree are for the run
    import uvicorn
    from prefect.server.api.server import create_app

    listener = socket.socket(fileno=fd)
    host, port = listener.getsockname()
    application = only_its_own_page(create_app(), f"{host}:{port}")
    uvicorn.Server(uvicorn.Config(application, log_level="warning")).run([listener])


def only_its_own_page(application: ASGIApp, address: str) -> ASGIApp:
    """The application for requests to `address` (HOST:PORT) that its own page sends, or that no page sends. Every
    other request gets 403."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            page = f"http://{address}"
            if headers.getlist("host") != [address] or set(headers.getlist("origin")) - {page}:
                await PlainTextResponse("Forbidden: another host or origin", 403)(scope, receive, send)
                return
        await application(scope, receive, send)

    return answer


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
