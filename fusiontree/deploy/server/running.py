"""Run the application: a socket, signals, and the end, which is orderly whoever asks for it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from fusiontree.deploy.server.protocol import MAX_HEADER_BYTES, protocol_for
from fusiontree.deploy.server.settings import ServerSettings
from fusiontree.errors import ConfigError

FAILED = 1  # exit code after the death of an engine
BACKLOG = 2048
_WATCH_SECONDS = 0.2
_log = logging.getLogger("fusiontree.serve")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as problem:
        raise ConfigError(f"cannot listen on {host} port {port}: {problem}") from None


def address_of(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: FastAPI, settings: ServerSettings, listening: socket.socket, ready: Callable[[], None]) -> int:
    """Serve until SIGTERM or SIGINT (0, after what runs has ended or `drain_seconds`) or an engine's death (1)."""
    _allow_open_files(settings.max_connections)
    config = uvicorn.Config(
        app,
        http=protocol_for(settings),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    server = _Server(config, ready)
    return asyncio.run(server.until_the_end(listening, settings.failure_seconds))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready
        self.failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a second SIGINT does not wait. uvicorn's own would kill the process at the end."""
        self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
        self.should_exit = True

    async def until_the_end(self, listening: socket.socket, grace: float) -> int:
        watching = asyncio.create_task(self._watch(grace))
        try:
            await self.serve([listening])
        finally:
            watching.cancel()
        return FAILED if self.failed else 0

    async def _watch(self, grace: float) -> None:
        """End the process some time after an engine has died, so that who asks /health learns of it first."""
        models = self.config.app.state.models  # type: ignore[union-attr]
        while (problem := models.failure()) is None:
            await asyncio.sleep(_WATCH_SECONDS)
        _log.critical("an engine has stopped working: %s", problem)
        self.failed = True
        await asyncio.sleep(grace)
        self.should_exit = True


def _allow_open_files(connections: int) -> None:
    """Raise the soft limit of open files so that the limit of connections is the one that is met."""
    try:
        import resource
    except ImportError:  # no such limits on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
