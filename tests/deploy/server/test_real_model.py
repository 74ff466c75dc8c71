"""The server over the real scheduler and a tiny model: the same answers as the runtime gives alone."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from fusiontree.deploy import InferenceRuntime
from fusiontree.deploy.requests import Limits
from fusiontree.deploy.scheduler import Scheduler
from fusiontree.deploy.server.models import Served
from tests.deploy.server.live import Raw, request, serving, until
from tests.deploy.tiny import save_tiny
from tests.faults.payloads import TEMPLATES

Running = tuple[str, InferenceRuntime, Scheduler]
LAYERS = [{"mixers": ["mamba", "attention"]}, {"mixers": ["mamba"]}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = save_tiny(tmp_path_factory.mktemp("models") / "tiny", layers=LAYERS, eos_token_id=None)
    runtime = InferenceRuntime(folder, device="cpu")
    scheduler = Scheduler(runtime, Limits(slots=32, queue=200, prefix_bytes=4 * 1024 * 1024))
    with serving([Served("tiny", runtime, scheduler)]) as address:
        yield address, runtime, scheduler


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running[0]}/v1", api_key="none", max_retries=0, timeout=60)


def test_answers_are_those_of_the_runtime(running: Running, client: openai.OpenAI) -> None:
    runtime = running[1]
    greedy = client.completions.create(model="tiny", prompt="the river", max_tokens=12, temperature=0)
    assert greedy.choices[0].text == runtime.generate("the river", max_new_tokens=12)
    drawn = client.completions.create(model="tiny", prompt="the river", max_tokens=12, seed=5, top_p=0.9)
    assert drawn.choices[0].text == runtime.generate("the river", max_new_tokens=12, temperature=1.0, seed=5, top_p=0.9)
    messages: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    parts = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0, stream=True)
    said = "".join(part.choices[0].delta.content or "" for part in parts)
    assert said == runtime.chat(messages, max_new_tokens=12)


def test_gates_and_log_probabilities_of_a_pruned_model(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="the river", max_tokens=6, temperature=0, logprobs=3, extra_body={"gates": True}
    )
    choice = answer.choices[0]
    for gate in choice.gates:  # type: ignore[attr-defined]
        both, one = gate["layers"]
        assert 0 < both < 1 and one is None
    for value, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
        assert value <= 0 and value == pytest.approx(max(top.values()))
    assert client.models.retrieve("tiny").model_dump()["layers"] == [["mamba", "attention"], ["mamba"]]


def test_stop_strings_and_a_prompt_seen_before(running: Running, client: openai.OpenAI) -> None:
    text = running[1].generate("x" * 64, max_new_tokens=30)
    stop = text[10:12]
    answer = client.completions.create(model="tiny", prompt="x" * 64, max_tokens=30, temperature=0, stop=[stop])
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"
    again = client.completions.create(model="tiny", prompt="x" * 64, max_tokens=30, temperature=0)
    assert again.choices[0].text == text and again.usage.prompt_tokens_details.cached_tokens == 64


@pytest.mark.fault(row=27)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_chat_template_that_reaches_out_is_an_error_and_runs_nothing(
    running: Running, tmp_path: Path, template: str
) -> None:
    address, runtime, _ = running
    canary = tmp_path / "canary"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "{{ 7 * 7 }}"}], "max_tokens": 1}
    runtime.tokenizer.chat_template = template.replace("CANARY", str(canary))
    try:
        status, _, answer = request(address, "POST", "/v1/chat/completions", body)
    finally:
        runtime.tokenizer.chat_template = None
    assert status == 400 and "the chat template cannot be used" in answer["error"]["message"]
    assert not canary.exists()
    assert request(address, "POST", "/v1/chat/completions", body)[0] == 200


@pytest.mark.fault(row=27)
def test_a_message_is_never_a_template(running: Running) -> None:
    address, runtime, _ = running
    text = "{{ 7 * 7 }}{% for x in range(9) %}a{% endfor %}"
    messages = [{"role": "user", "content": text}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 1}
    used = request(address, "POST", "/v1/chat/completions", body)[2]["usage"]["prompt_tokens"]
    assert used == len(runtime.encode(f"User: {text}\nAssistant:"))


@pytest.mark.fault(row=33)
def test_a_hundred_streams_equal_one_at_a_time(running: Running, client: openai.OpenAI) -> None:
    def text(number: int) -> str:
        parts = client.completions.create(
            model="tiny", prompt=f"prompt {number}", max_tokens=8, seed=number, stream=True
        )
        return "".join(part.choices[0].text for part in parts)

    with ThreadPoolExecutor(100) as pool:
        together = list(pool.map(text, range(100)))
    alone = [
        running[1].generate(f"prompt {number}", max_new_tokens=8, temperature=1.0, seed=number) for number in range(100)
    ]
    assert together == alone


@pytest.mark.fault(row=33)
@pytest.mark.slow
def test_memory_is_flat_over_2000_requests_with_random_disconnects(running: Running, fault_figure: Any) -> None:
    address, _, scheduler = running

    def some(number: int) -> None:
        draw = random.Random(number)
        body = {"model": "tiny", "prompt": f"{number} " + "x" * draw.randint(1, 40), "seed": number}
        body |= {"max_tokens": draw.randint(1, 6), "stream": draw.random() < 0.7, "gates": draw.random() < 0.3}
        text = json.dumps(body)
        with Raw(address) as raw:
            raw.send("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            raw.send(f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n{text}")
            if draw.random() < 0.5:
                raw.socket.settimeout(draw.random() * 0.05)
                try:
                    raw.read_until(b"data: ")
                except (TimeoutError, AssertionError, OSError):
                    return
            else:
                assert raw.read_all().startswith(b"HTTP/1.1 200")

    def rest() -> float:
        until(lambda: scheduler.stats().active == scheduler.stats().waiting == scheduler.stats().prefilling == 0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1024**2

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(some, range(500)))
        before = rest()
        list(pool.map(some, range(500, 2000)))
        grown = rest() - before
    fault_figure("MiB grown over 1,500 requests with random disconnects", grown, largest=True)
    assert scheduler.stats().state_bytes == 0 and grown < 30
    assert request(address, "GET", "/health")[0] == 200
