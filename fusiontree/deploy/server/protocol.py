"""uvicorn's HTTP protocol with deadlines for what clients send and read; uvicorn itself has none but for idle time."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fusiontree.deploy.server.errors import error_body
from fusiontree.deploy.server.settings import ServerSettings

MAX_HEADER_BYTES = 64 * 1024
SEND_BYTES = 128 * 1024  # what the kernel keeps for a client that does not read; left alone it grows to megabytes


class DeadlineProtocol(H11Protocol):
    """Closes a connection whose header, body or reading of the answer takes too long; too many make room.

    Made for one server by `protocol_for`. What h11 knows of the connection says which deadline holds.
    """

    settings: ClassVar[ServerSettings]
    idle: ClassVar[dict[DeadlineProtocol, None]]
    """Connections without a request in progress, the one that has idled longest first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._phase: tuple[str, int] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a header; over the limit, the longest idle connection goes, or this one."""
        super().connection_made(transport)
        if (plain := transport.get_extra_info("socket")) is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        if len(self.connections) > self.settings.max_connections:
            (next(iter(self.idle), self)).transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Note how far the request has come."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The answer is sent; the next request may come."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks."""
        super().connection_lost(exc)
        self.idle.pop(self, None)
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """The client does not read: it has so long to go on."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.settings.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _watch(self) -> None:
        """Start the clock of the phase that the connection is in, unless it runs already."""
        phase = self._now()
        if phase == self._phase:
            return
        self._phase = phase
        if self._timer is not None:
            self._timer.cancel()
        self.idle.pop(self, None)
        self._timer = None
        if phase is None or self.transport.is_closing():
            return
        if phase[0] != "body":
            self.idle[self] = None
        if phase[0] != "kept":  # uvicorn's own clock runs then
            seconds = self.settings.header_seconds if phase[0] == "header" else self.settings.body_seconds
            self._timer = self.loop.call_later(seconds, self._too_late)

    def _now(self) -> tuple[str, int] | None:
        """What is being waited for from the client, and in which request: its header, its body, nothing."""
        request = id(self.cycle)
        if self.conn.their_state is h11.SEND_BODY:
            return "body", request
        if self.conn.their_state is h11.IDLE:
            return ("header" if self.timeout_keep_alive_task is None else "kept"), request
        return None

    def _too_late(self) -> None:
        """Say so where an answer can still be sent, and close."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body("the request took too long to arrive", "invalid_request_error")).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            if self.cycle is not None:
                self.cycle.disconnected = True  # nothing more may be sent on this connection
        self.transport.close()


def protocol_for(settings: ServerSettings) -> type[DeadlineProtocol]:
    """The protocol class of one server."""
    return type("ServerProtocol", (DeadlineProtocol,), {"settings": settings, "idle": {}})
