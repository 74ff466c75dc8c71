"""Fault 34, the end: `fusiontree serve` itself under SIGTERM, with a dead engine, and with settings that cannot be."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deploy.server.live import Raw, request, until
from tests.deploy.tiny import save_tiny
from tests.faults.process import Child, call

STEP = 0.05  # seconds that a slowed step takes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", eos_token_id=None)


def slow_steps(fatal: str) -> None:
    """In the server's process: steps take a while, and raise once the file `fatal` exists."""
    from fusiontree.deploy.scheduler_engine import Engine

    step = Engine.step

    def slow(engine: Engine) -> None:
        time.sleep(STEP)
        if os.path.exists(fatal):
            raise RuntimeError("a cosmic ray")
        step(engine)

    Engine.step = slow  # type: ignore[method-assign]


@contextmanager
def served(model: Path, folder: Path, *more: str) -> Iterator[tuple[Child, str]]:
    """A running `fusiontree serve` and its address."""
    prepare = functools.partial(slow_steps, str(folder / "fatal"))
    words = ["serve", model, "--port", "0", "--device", "cpu", *more]
    with Child(words, folder / "out.txt", prepare) as child:
        child.until(lambda: "serving tiny at" in child.output)
        found = re.search(r"http://[\d.:]+", child.output)
        assert found is not None
        yield child, found[0]


def begin_stream(address: str, max_tokens: int) -> Raw:
    """A stream whose first token has come."""
    body = json.dumps({"model": "tiny", "prompt": "abc", "max_tokens": max_tokens, "stream": True, "logprobs": 0})
    raw = Raw(address)
    raw.send(
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    raw.send(f"Content-Length: {len(body)}\r\n\r\n{body}")
    raw.read_until(b"data: ")
    return raw


@pytest.mark.fault(row=34)
def test_sigterm_lets_a_stream_end_and_takes_no_other(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path) as (child, address):
        raw = begin_stream(address, 40)
        child.send(signal.SIGTERM)

        def refused() -> bool:
            try:
                request(address, "GET", "/health")
            except OSError:
                return True
            return False

        until(refused)
        assert b"[DONE]" in raw.read_all()
        assert child.wait(30) == 0, child.output


@pytest.mark.fault(row=34)
def test_a_drain_has_an_end(model: Path, tmp_path: Path, fault_figure) -> None:  # type: ignore[no-untyped-def]
    with served(model, tmp_path, "--drain-seconds", "1") as (child, address):
        raw = begin_stream(address, 250)
        begin = time.monotonic()
        child.send(signal.SIGTERM)
        assert child.wait(30) == 0, child.output
        took = time.monotonic() - begin
        assert b"[DONE]" not in raw.read_all()
    fault_figure("seconds of a drain allowed 1", took, largest=True)
    assert took < 250 * STEP


@pytest.mark.fault(row=34)
def test_a_dead_engine_is_told_by_health_and_ends_the_process(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path) as (child, address):
        raw = begin_stream(address, 200)
        (tmp_path / "fatal").touch()
        rest = raw.read_until(b'"error"')
        assert b"[DONE]" not in rest
        status, _, body = request(address, "GET", "/health")
        assert status == 503 and body["error"]["code"] == "unavailable"
        assert child.wait(30) == 1
        assert "an engine has stopped working" in child.output and "cosmic ray" in child.output


def test_what_cannot_be_served_is_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("\n\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, told in (
            (["--port", port], "cannot listen on 127.0.0.1"),
            (["--api-key", ""], "the API key must be"),
            (["--api-key-file", tmp_path / "keys"], "no key is in it"),
            (["--api-key-file", tmp_path / "none"], "No such file"),
            (["--port", "0", "--beside", str(model)], "same name"),
            (["--port", "0", "--report", tmp_path], "is not a run folder"),
        ):
            code, output = call(["serve", model, "--device", "cpu", *words], tmp_path / "out.txt")
            assert code == 2 and told in output and output.count("\n") == 1, output
