"""Fault 32: clients that send or read slowly or not at all are shown the door; the others notice nothing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fusiontree.deploy.server.models import Served
from fusiontree.deploy.server.settings import ServerSettings
from tests.deploy.server.fakes import FakeEngine, FakeRuntime
from tests.deploy.server.live import Raw, request, serving, until

HEADER, BODY, STALL = 1.0, 1.5, 1.0
GOOD = {"model": "tiny", "prompt": "abc", "max_tokens": 2}
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
MARGIN = 10.0  # seconds; a busy machine is late
engine = FakeEngine()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    settings = ServerSettings(max_connections=400, header_seconds=HEADER, body_seconds=BODY, stall_seconds=STALL)
    with serving([Served("tiny", FakeRuntime(), engine)], settings) as running:
        yield running


def seconds_until_closed(raw: Raw, drip: bytes = b"") -> tuple[float, bytes]:
    """How long the server keeps the connection while a byte is sent now and then, and what it says."""
    begin, found = time.monotonic(), b""
    raw.socket.settimeout(0.1)
    while time.monotonic() - begin < HEADER + BODY + MARGIN:
        try:
            piece = raw.socket.recv(65536)
            if not piece:
                return time.monotonic() - begin, found
            found += piece
        except TimeoutError:
            if drip:
                raw.socket.send(drip)
        except OSError:
            return time.monotonic() - begin, found
    pytest.fail("the connection stays open")


def open_requests(address: str) -> float:
    """Requests being answered, the one that asks included."""
    lines = request(address, "GET", "/metrics")[2].splitlines()
    return float(next(line for line in lines if line.startswith(b"fusiontree_http_requests_open ")).split()[1])


@pytest.mark.fault(row=32)
def test_a_header_that_drips_is_ended(address: str) -> None:
    with Raw(address) as raw:
        raw.send("POST /v1/completions HTTP/1.1\r\nX-Slow: ")
        took, said = seconds_until_closed(raw, b"a")
    assert took >= HEADER * 0.9 and said.startswith(b"HTTP/1.1 408")


@pytest.mark.fault(row=32)
@pytest.mark.parametrize("length", ["Content-Length: 5000", "Transfer-Encoding: chunked"])
def test_a_body_that_drips_is_ended(address: str, length: str) -> None:
    with Raw(address) as raw:
        raw.send(f"{HEAD}{length}\r\n\r\n" + ("1000\r\n" if "chunked" in length else ""))
        took, said = seconds_until_closed(raw, b" ")
    assert took >= BODY * 0.9 and said.startswith(b"HTTP/1.1 408")
    assert b"took too long" in said and said.count(b"HTTP/1.1") == 1


@pytest.mark.fault(row=32)
def test_an_idle_connection_is_ended_and_so_is_the_next_header_on_a_kept_one(address: str) -> None:
    with Raw(address) as raw:
        took, _ = seconds_until_closed(raw)
        assert took >= HEADER * 0.9
    with Raw(address) as raw:
        for _ in range(2):  # a kept connection serves again
            raw.send("GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert raw.response()[0] == 200
        raw.send("GET /hea")
        _, said = seconds_until_closed(raw)
        assert said.startswith(b"HTTP/1.1 408")


@pytest.mark.fault(row=32)
def test_a_client_that_does_not_read_is_let_go(address: str) -> None:
    much = {"model": "tiny", "prompt": "abc", "max_tokens": 250, "n": 8, "stream": True, "logprobs": 20}
    body = json.dumps(much)
    with Raw(address) as raw:
        raw.send(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}")
        until(lambda: open_requests(address) == 2)
        until(lambda: open_requests(address) == 1)
        with pytest.raises((ConnectionError, AssertionError)):
            raw.read_until(b"[DONE]")


@pytest.mark.fault(row=32)
def test_a_thousand_idle_sockets_do_not_keep_others_out(address: str, fault_figure: Any) -> None:
    host, port = address.removeprefix("http://").split(":")
    idle: list[socket.socket] = []
    slowest = 0.0
    try:
        for number in range(1000):
            idle.append(socket.create_connection((host, int(port)), 10))
            if number % 100 == 99:
                begin = time.monotonic()
                assert request(address, "POST", "/v1/completions", GOOD)[0] == 200
                slowest = max(slowest, time.monotonic() - begin)
    finally:
        for one in idle:
            one.close()
    fault_figure("idle sockets", 1000)
    fault_figure("slowest answer meanwhile, s", slowest, largest=True)
    assert slowest < 2


@pytest.mark.fault(row=32)
def test_a_header_without_end_is_refused(address: str) -> None:
    with Raw(address) as raw:
        raw.send("GET / HTTP/1.1\r\nX: " + "a" * 70_000)
        assert raw.read_all().startswith(b"HTTP/1.1 4")
