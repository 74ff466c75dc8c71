"""Faults 33 and 34: clients that leave, more than there is room for, keys that are none, and the server's own end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fusiontree.deploy.server.app import create_app
from fusiontree.deploy.server.models import Served
from fusiontree.deploy.server.settings import ServerSettings
from tests.deploy.server.fakes import FakeEngine, FakeRuntime, expected
from tests.deploy.server.live import Raw, request, serving, until

HEAD = "POST {} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{}"
LONG = {"model": "tiny", "prompt": "abc", "max_tokens": 200}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(slots=8, queue=2)


@pytest.fixture
def address(engine: FakeEngine) -> Iterator[str]:
    with serving([Served("tiny", FakeRuntime(), engine)]) as running:
        yield running


def post(raw: Raw, body: dict[str, Any], path: str = "/v1/completions") -> None:
    text = json.dumps(body)
    raw.send(HEAD.format(path, len(text), text))


@pytest.mark.fault(row=33)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_first_token_ends_the_work(
    engine: FakeEngine, address: str, stream: bool
) -> None:
    engine.go.clear()
    with Raw(address) as raw:
        post(raw, {**LONG, "stream": stream})
        until(lambda: engine.submitted == 1)
    until(lambda: engine._jobs[0][0].cancelled)
    engine.go.set()
    until(lambda: engine.stats().active == 0)
    assert engine.produced == 0 and engine.finished["cancelled"] == 1


@pytest.mark.fault(row=33)
def test_a_client_that_leaves_mid_stream_ends_the_work_within_a_step(
    engine: FakeEngine, address: str, fault_figure: Any
) -> None:
    engine.step_seconds = 0.05
    with Raw(address) as raw:
        post(raw, {**LONG, "stream": True})
        raw.read_until(b"data: ")
    at_leaving = engine.produced
    until(lambda: engine._jobs[0][0].cancelled if engine._jobs else True)
    at_cancel = engine.produced
    until(lambda: engine.stats().active == 0)
    fault_figure("tokens after a client left", engine.produced - at_leaving, largest=True)
    assert engine.produced - at_cancel <= 1 and engine.produced < 100


@pytest.mark.fault(row=33)
def test_a_hundred_streams_at_once_each_get_their_own_answer(fault_figure: Any) -> None:
    engine = FakeEngine(slots=100, queue=10)
    with serving([Served("tiny", FakeRuntime(), engine)]) as address, ThreadPoolExecutor(100) as pool:

        def ask(number: int) -> str:
            with Raw(address) as raw:
                post(raw, {**LONG, "prompt": f"p{number}", "seed": number, "max_tokens": 20, "stream": True})
                events = raw.read_until(b"[DONE]").split(b"data: ")[1:-1]
            return "".join(json.loads(event.split(b"\n")[0].strip(b"\r"))["choices"][0]["text"] for event in events)

        texts = list(pool.map(ask, range(100)))
    fault_figure("streams at once", 100)
    assert texts == [expected(f"p{number}", number, 20) for number in range(100)]


@pytest.mark.fault(row=33)
def test_a_full_queue_says_when_to_come_back(engine: FakeEngine, address: str) -> None:
    engine.go.clear()
    waiting = [Raw(address) for _ in range(10)]
    for raw in waiting:
        post(raw, {**LONG, "max_tokens": 1})
    until(lambda: engine.submitted == 10)
    status, headers, answer = request(address, "POST", "/v1/completions", LONG)
    assert status == 429 and headers["retry-after"] == "2" and answer["error"]["code"] == "queue_full"
    assert request(address, "GET", "/health")[0] == 200
    many = {**LONG, "prompt": ["a", "b"]}
    assert request(address, "POST", "/v1/completions", many)[0] == 429
    engine.go.set()
    for raw in waiting:
        assert raw.response()[0] == 200
        raw.socket.close()
    assert request(address, "POST", "/v1/completions", {**LONG, "max_tokens": 1})[0] == 200


@pytest.mark.fault(row=33)
def test_a_flood_of_impatient_clients_leaves_nothing_behind(engine: FakeEngine, address: str) -> None:
    engine.step_seconds = 0.01

    def hurry(number: int) -> None:
        with Raw(address) as raw:
            post(raw, {**LONG, "stream": number % 2 == 0})
            raw.socket.settimeout(0.02 * (number % 5))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(hurry, range(200)))
    engine.step_seconds = 0.0
    until(lambda: engine.stats().active == engine.stats().waiting == 0)
    assert request(address, "POST", "/v1/completions", LONG)[2]["choices"][0]["finish_reason"] == "length"


KEYS = (b"sk-Right", "schlüssel".encode())
GOOD_KEYS = [b"Bearer sk-Right", b"bearer sk-Right", "Bearer schlüssel".encode()]
BAD_KEYS = [
    b"", b"Bearer", b"Bearer ", b"Bearer sk-right", b"Bearer SK-RIGHT", b"Bearer sk-Right ", b"Bearer sk-Righ",
    b"sk-Right", b"Bearer sk-Rightt", b"Basic sk-Right", b"Bearer schlussel",
    "Bearer schlüssel".encode("latin-1"),
    b"Bearer \xff\xfe", b"Bearer " + b"x" * 5000, b"Bearer sk-Right, Bearer sk-Right", b"Bearer  sk-Right",
]  # fmt: skip


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    with serving([Served("tiny", FakeRuntime(), FakeEngine())], ServerSettings(keys=KEYS)) as running:
        yield running


def status_with(address: str, method: str, path: str, key: bytes | None) -> int:
    line = b"" if key is None else b"Authorization: " + key + b"\r\n"
    with Raw(address) as raw:
        raw.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n".encode() + line + b"\r\n")
        return raw.response()[0]


def all_routes() -> list[tuple[str, str]]:
    engine = FakeEngine()
    app = create_app([Served("tiny", FakeRuntime(), engine)], ServerSettings())
    engine.close()
    found = []
    for route in app.routes:
        for method in getattr(route, "methods", None) or ():
            found.append((method, route.path.replace("{name}", "tiny")))  # type: ignore[attr-defined]
    return sorted(found)


@pytest.mark.fault(row=34)
def test_every_route_but_health_asks_for_the_key(guarded: str, fault_figure: Any) -> None:
    routes = all_routes()
    assert len(routes) > 12 and ("POST", "/v1/chat/completions") in routes and ("GET", "/openapi.json") in routes
    for method, path in routes:
        if method == "HEAD":
            continue
        status = status_with(guarded, method, path, None)
        assert status == (200 if path == "/health" else 401), (method, path)
    fault_figure("routes", len(routes))
    for path in (
        "//v1/models",
        "/v1/models/",
        "/V1/models",
        "/health/../v1/models",
        "/health/x",
        "/nowhere",
        "/%2fhealth",
    ):
        assert status_with(guarded, "GET", path, None) == 401, path


@pytest.mark.fault(row=34)
@pytest.mark.parametrize("key", BAD_KEYS, ids=lambda key: repr(key[:30]))
def test_what_is_not_the_key_does_not_open(guarded: str, key: bytes) -> None:
    assert status_with(guarded, "GET", "/v1/models", key) == (200 if key == b"Bearer sk-Right " else 401)


@pytest.mark.fault(row=34)
def test_any_of_the_keys_opens_and_a_key_in_the_address_does_not(guarded: str) -> None:
    for key in GOOD_KEYS:
        assert status_with(guarded, "GET", "/v1/models", key) == 200
    for query in ("api_key=sk-Right", "key=sk-Right", "token=sk-Right"):
        assert status_with(guarded, "GET", f"/v1/models?{query}", None) == 401
    for cookie in (
        "fusiontree=",
        "fusiontree=99999999999.",
        "fusiontree=99999999999.00",
        "fusiontree=sk-Right",
        "=;;,",
    ):
        with Raw(guarded) as raw:
            raw.send(f"GET /v1/models HTTP/1.1\r\nHost: x\r\nCookie: {cookie}\r\n\r\n")
            assert raw.response()[0] == 401


@pytest.mark.fault(row=34)
def test_a_body_is_not_read_from_one_without_a_key(guarded: str) -> None:
    with Raw(guarded) as raw:
        raw.send("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert raw.response()[0] == 401


@pytest.mark.fault(row=34)
def test_when_an_engine_dies_health_says_so_and_nobody_waits_for_ever(engine: FakeEngine, address: str) -> None:
    engine.go.clear()
    results: list[Any] = []
    asking = threading.Thread(target=lambda: results.append(request(address, "POST", "/v1/completions", LONG)))
    asking.start()
    until(lambda: engine.submitted == 1)
    engine.die()
    asking.join(20)
    assert results[0][0] == 503 and "the step failed" in results[0][2]["error"]["message"]
    assert request(address, "GET", "/health")[0] == 503
    assert request(address, "POST", "/v1/completions", LONG)[0] == 503
