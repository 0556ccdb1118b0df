"""A TCP gate before a real server, which a test may hold or cut. It stands where a network would."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self


class Gate:
    """Forwards `port` to `target`, both on loopback. `let` is how many connections it takes before it is cut."""

    def __init__(self, target: int, let: float = float("inf")) -> None:
        self._target, self._let = target, let
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._answers = threading.Event()
        self._answers.set()
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def hold(self) -> None:
        """Keep every answer back until `release`; requests still come in."""
        self._answers.clear()

    def release(self) -> None:
        """Let answers through again."""
        self._answers.set()

    def cut(self) -> None:
        """Be as a server that was killed."""
        self._let = 0
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._answers.set()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if not self._let:
                    client.close()
                    continue
                self._let -= 1
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open += [client, server]
                threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, self._answers), daemon=True).start()

    def _pump(self, source: socket.socket, drain: socket.socket, gate: threading.Event | None) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if gate:
                    gate.wait()
                drain.sendall(data)
        for end in (source, drain):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
