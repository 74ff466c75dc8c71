"""A server that listens on a port of this machine, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from fusiontree.deploy.server.app import create_app
from fusiontree.deploy.server.models import Served
from fusiontree.deploy.server.protocol import protocol_for
from fusiontree.deploy.server.running import address_of, bind
from fusiontree.deploy.server.settings import ServerSettings

PATIENCE = 30.0


@contextlib.contextmanager
def serving(
    served: Sequence[Served], settings: ServerSettings | None = None, report: Path | None = None, index: Any = None
) -> Iterator[str]:
    """The address of a running server; it is shut down at the end."""
    settings = settings or ServerSettings()
    listening = bind("127.0.0.1", 0)
    app = create_app(served, settings, report, index)
    config = uvicorn.Config(
        app, http=protocol_for(settings), ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield address_of(listening)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server did not end"


def until(met: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.002)


class Raw:
    """A plain socket to a server, for what no HTTP client would do."""

    def __init__(self, address: str, timeout: float = PATIENCE) -> None:
        host, port = address.removeprefix("http://").rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes | str) -> None:
        self.socket.sendall(data.encode("latin-1") if isinstance(data, str) else data)

    def read_until(self, mark: bytes) -> bytes:
        """What arrives up to and with `mark`."""
        found = b""
        while mark not in found:
            piece = self.socket.recv(65536)
            assert piece, f"closed after {found!r}"
            found += piece
        return found

    def read_all(self) -> bytes:
        """What arrives until the other side closes."""
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.socket.recv(65536):
                found += piece
        return found

    def response(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer with a content-length."""
        head, _, rest = self.read_until(b"\r\n\r\n").partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
        while len(rest) < int(headers.get("content-length", 0)):
            rest += self.socket.recv(65536)
        return int(lines[0].split()[1]), headers, rest


def request(
    address: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and parsed body of one request; `body` is bytes as they are, or becomes JSON."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = {"Host": "x", "Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    with Raw(address) as raw:
        raw.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + data)
        status, found, content = raw.response()
    return status, found, json.loads(content) if "json" in found.get("content-type", "") else content
