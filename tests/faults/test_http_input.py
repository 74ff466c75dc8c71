"""Faults 29 to 31: bodies too large or no JSON, and arguments out of range, get an error's JSON and nothing worse."""

from __future__ import annotations

import gzip
import json
import random
import resource
from collections.abc import Iterator
from typing import Any

import pytest

from fusiontree.deploy.server.models import Served
from fusiontree.deploy.server.settings import ServerSettings
from tests.deploy.server.fakes import FakeEngine, FakeRuntime
from tests.deploy.server.live import Raw, request, serving

MiB = 1024 * 1024
LIMIT = MiB
GOOD = {"model": "tiny", "prompt": "abc", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PATHS = {"/v1/completions": GOOD, "/v1/chat/completions": CHAT}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    settings = ServerSettings(max_body_bytes=LIMIT, body_seconds=20)
    with serving([Served("tiny", FakeRuntime(), FakeEngine())], settings) as running:
        yield running


def is_error(answer: tuple[int, dict[str, str], Any], *statuses: int) -> dict[str, Any]:
    """The error, after a look at its form."""
    assert answer[0] in statuses, answer
    error = answer[2]["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def still_well(address: str) -> None:
    assert request(address, "POST", "/v1/completions", GOOD)[0] == 200


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.fault(row=29)
def test_a_body_of_100_mb_is_refused_before_it_is_read(address: str, fault_figure: Any) -> None:
    before = peak_mib()
    with Raw(address) as raw:
        raw.send(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {100 * MiB}\r\n\r\n")
        status, _, body = raw.response()
        is_error((status, {}, json.loads(body)), 413)
        piece = b"x" * MiB
        for _ in range(100):  # who sends it all the same is read to the end, and gets the next request answered
            raw.send(piece)
        raw.send("GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.response()[0] == 200
    grown = peak_mib() - before
    fault_figure("MiB grown by a body of 100 MiB", grown, largest=True)
    assert grown < 30


@pytest.mark.fault(row=29)
def test_a_chunked_body_without_a_length_is_counted_while_it_comes(address: str, fault_figure: Any) -> None:
    before = peak_mib()
    with Raw(address) as raw:
        raw.send(
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n"
        )
        piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for _ in range(2 * LIMIT // 65536):
            raw.send(piece)
        status, _, body = raw.response()
        is_error((status, {}, json.loads(body)), 413)
    assert peak_mib() - before < 30
    still_well(address)


@pytest.mark.fault(row=29)
def test_a_compressed_body_is_not_unpacked(address: str) -> None:
    bomb = gzip.compress(b" " * (64 * MiB))
    before = peak_mib()
    answer = request(address, "POST", "/v1/completions", bomb, {"Content-Encoding": "gzip"})
    is_error(answer, 415)
    assert peak_mib() - before < 30


@pytest.mark.fault(row=29)
@pytest.mark.parametrize("length", ["-5", "1e9", "99999999999999999999999", "5, 6", "\xb2"])
def test_a_length_that_is_none_is_refused(address: str, length: str) -> None:
    with Raw(address) as raw:
        raw.send(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n")
        assert raw.read_until(b"\r\n\r\n").split()[1] in (b"400", b"413")


NOT_JSON: list[bytes] = [
    b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe{}", b"{'model': 'tiny'}", b'{"model": "tiny"} {}', b"\x00",
    b"[" * 100_000, b'{"a":' * 100_000, b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"model": "tiny", "prompt": "a", "temperature": NaN}', b'{"model": "tiny", "prompt": "a", "top_p": Infinity}',
    b'{"model": "tiny", "prompt": "a", "temperature": -Infinity}', b'{"model": "tiny", "prompt": "\\ud83d"}',
    b'{"model": "tiny", "prompt": "\xed\xa0\xbd"}', b'{"model": "\\ud83d", "prompt": "a"}',
    b'{"\\udc00": 1}', b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
]  # fmt: skip


@pytest.mark.fault(row=30)
@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:30]))
@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_json_object_is_refused(address: str, path: str, body: bytes) -> None:
    is_error(request(address, "POST", path, body), 400)


@pytest.mark.fault(row=30)
@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "a/b/c"]
)
def test_another_content_type_is_refused(address: str, kind: str) -> None:
    error = is_error(request(address, "POST", "/v1/completions", GOOD, {"Content-Type": kind}), 400)
    assert "application/json" in error["message"]


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 1.5, -0.0, 1e308, "", "a", "\u0000", "\ud83d", "ü" * 50, [],
    {}, [[]], [None], [1, "a"], {"a": {}}, [[[[]]]], "x" * 5000, [0] * 300, {"role": "user", "content": "x"}, [{}],
    "tiny",
]  # fmt: skip


def fuzzed(draw: random.Random, good: dict[str, Any]) -> bytes:
    """A good body of which some fields are something else, renamed, or gone; sometimes with bytes exchanged."""
    fields = [*good, "n", "stop", "seed", "stream", "logprobs", "top_p", "temperature", "stream_options", "user", "zzz"]
    body = dict(good)
    for _ in range(draw.randint(1, 3)):
        body[draw.choice(fields)] = draw.choice(VALUES)
    if draw.random() < 0.2:
        body.pop(draw.choice(list(body)))
    data = bytearray(json.dumps(body).encode())
    if draw.random() < 0.2:
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


@pytest.mark.fault(row=30)
def test_500_fuzzed_bodies_never_make_the_server_fail(address: str, fault_figure: Any) -> None:
    draw = random.Random(30)
    seen: dict[int, int] = {}
    for turn in range(500):
        path, good = list(PATHS.items())[turn % 2]
        body = fuzzed(draw, good)
        status, headers, answer = request(address, "POST", path, body)
        seen[status] = seen.get(status, 0) + 1
        if status != 200:
            is_error((status, headers, answer), 400, 404)
    fault_figure("fuzzed bodies", 500)
    assert seen[400] > 300 and seen[200] > 0
    still_well(address)


OUT_OF_RANGE: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"), ({"max_tokens": 254}, "maximum context length is 256"),
    ({"max_tokens": "5"}, "max_tokens"), ({"max_tokens": True}, "max_tokens"), ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": 1.01}, "top_p"),
    ({"top_p": 0}, "top_p"), ({"top_p": -1}, "top_p"), ({"top_k": -1}, "top_k"), ({"n": 0}, "n"), ({"n": 17}, "n"),
    ({"n": 10**6}, "n"), ({"stop": ["x"] * 10_000}, "stop"), ({"stop": ""}, "stop"), ({"stop": "x" * 201}, "stop"),
    ({"stop": [1]}, "stop"), ({"prompt": ""}, "the prompt is empty"), ({"prompt": []}, "prompt"),
    ({"prompt": "x" * 300}, "has 300 tokens; at most 256"), ({"prompt": [-1]}, "prompt"),
    ({"prompt": [260]}, "token 260"),    ({"prompt": [2**40]}, "prompt"),
    ({"prompt": ["a"] * 65}, "prompt"), ({"prompt": None}, "prompt"),
    ({"logprobs": 21}, "logprobs"), ({"logprobs": -1}, "logprobs"), ({"seed": 2**63}, "seed"), ({"seed": 0.5}, "seed"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"best_of": 3}, "best_of"), ({"echo": True}, "echo"),
    ({"suffix": "z"}, "suffix"), ({"prompt": ["a", ""]}, "the prompt is empty"),

    ({"stream_options": {"x": 1}}, "stream_options"),
    ({"gates": "yes"}, "gates"), ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
]  # fmt: skip
CHAT_OUT_OF_RANGE: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages"), ({"messages": [{"content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
    ({"top_logprobs": 3}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_completion_tokens": 3}, "not both"), ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"max_tokens": 250}, "maximum context length"),
]  # fmt: skip


@pytest.mark.fault(row=31)
@pytest.mark.parametrize(("fields", "words"), OUT_OF_RANGE, ids=lambda value: str(value)[:40])
def test_arguments_out_of_range_are_refused_by_name(address: str, fields: dict[str, Any], words: str) -> None:
    error = is_error(request(address, "POST", "/v1/completions", {**GOOD, **fields}), 400)
    assert words in error["message"] or words == error["param"]


@pytest.mark.fault(row=31)
@pytest.mark.parametrize(("fields", "words"), CHAT_OUT_OF_RANGE, ids=lambda value: str(value)[:40])
def test_arguments_of_a_chat_out_of_range_are_refused_by_name(address: str, fields: dict[str, Any], words: str) -> None:
    error = is_error(request(address, "POST", "/v1/chat/completions", {**CHAT, **fields}), 400)
    assert words in error["message"] or words == error["param"]


@pytest.mark.fault(row=31)
def test_what_just_fits_is_answered(address: str) -> None:
    status, _, answer = request(address, "POST", "/v1/completions", {**GOOD, "max_tokens": 253})
    assert status == 200 and answer["usage"]["total_tokens"] == 256
