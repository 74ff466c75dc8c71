"""What OpenAI's own client for Python gets from the server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from fusiontree.deploy.server.models import Served
from fusiontree.deploy.server.settings import ServerSettings
from tests.deploy.server.fakes import MAX_LENGTH, FakeEngine, FakeRuntime, expected
from tests.deploy.server.live import serving, until

KEY = "sk-test-Key"
engine = FakeEngine()


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    served = [Served("full", FakeRuntime(), engine), Served("pruned", FakeRuntime(), FakeEngine())]
    with serving(served, ServerSettings(keys=(KEY.encode(),), max_tokens=200)) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=30)


def test_models_are_listed_with_what_the_page_needs(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["full", "pruned"]
    model = client.models.retrieve("full").model_dump()
    assert model["layers"] == [["mamba", "attention"]] * 2
    assert model["max_model_len"] == MAX_LENGTH and model["parameters"] > 1000


def test_a_completion_with_all_its_parts(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="full", prompt="abc", max_tokens=5, seed=3, n=2, logprobs=2, extra_body={"gates": True, "top_k": 5}
    )
    assert [choice.text for choice in answer.choices] == [expected("abc", 3, 5, choice) for choice in (0, 1)]
    first = answer.choices[0]
    assert first.finish_reason == "length" and answer.object == "text_completion"
    assert "".join(first.logprobs.tokens) == first.text
    assert first.logprobs.token_logprobs == [-0.5] * 5 and len(first.logprobs.top_logprobs[0]) == 2
    assert first.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert [gate["layers"] for gate in first.gates] == [[0.25, None]] * 5  # type: ignore[attr-defined]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 10)


def test_many_prompts_of_texts_and_of_ids(client: openai.OpenAI) -> None:
    texts = client.completions.create(model="full", prompt=["abc", "xyz"], max_tokens=4, seed=1, n=2).choices
    wanted = [expected(prompt, 1, 4, choice) for prompt in ("abc", "xyz") for choice in (0, 1)]
    assert [choice.text for choice in texts] == wanted and [choice.index for choice in texts] == [0, 1, 2, 3]
    ids = [list(FakeRuntime().encode(prompt)) for prompt in ("abc", "xyz")]
    same = client.completions.create(model="full", prompt=ids, max_tokens=4, seed=1, n=2).choices
    assert [choice.text for choice in same] == wanted
    (one,) = client.completions.create(model="full", prompt=ids[0], max_tokens=4, seed=1).choices
    assert one.text == wanted[0]


def test_a_completion_as_a_stream_is_the_same(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="full", prompt="abc", max_tokens=6, seed=3, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = ["", ""]
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [expected("abc", 3, 6, choice) for choice in (0, 1)]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert {choice.finish_reason for chunk in chunks for choice in chunk.choices} == {None, "length"}


def test_a_chat_whole_and_as_a_stream(client: openai.OpenAI) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    ]
    wanted = expected("system: be brief\nuser: hello\n", 7, 8)
    whole = client.chat.completions.create(
        model="full", messages=messages, seed=7, max_completion_tokens=8, logprobs=True, top_logprobs=1
    )
    assert whole.choices[0].message.content == wanted and whole.object == "chat.completion"
    entry = whole.choices[0].logprobs.content[0]
    assert entry.token == wanted[0] and bytes(entry.bytes) == wanted[0].encode() and len(entry.top_logprobs) == 1

    parts = list(client.chat.completions.create(model="full", messages=messages, seed=7, max_tokens=8, stream=True))
    assert parts[0].choices[0].delta.role == "assistant" and parts[0].object == "chat.completion.chunk"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == wanted
    assert [part.choices[0].finish_reason for part in parts][-1] == "length"
    assert parts[-1].usage is None and len({part.id for part in parts}) == 1


def test_chat_without_a_number_of_tokens_goes_as_far_as_the_server_allows(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="full", messages=[{"role": "user", "content": "hi"}])
    assert answer.usage.completion_tokens == 200
    answer = client.chat.completions.create(model="full", messages=[{"role": "user", "content": "x" * 100}])
    assert answer.usage.total_tokens == MAX_LENGTH


def test_a_seed_repeats_and_no_seed_does_not(client: openai.OpenAI) -> None:
    def text(**more: int) -> str:
        return client.completions.create(model="pruned", prompt="abc", max_tokens=12, **more).choices[0].text

    assert text(seed=-5) == text(seed=-5) != text(seed=5)
    assert text() != text()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": "other"}, openai.NotFoundError, "does not exist; there is: full, pruned"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 201}, openai.BadRequestError, "this server allows 200"),
        ({"prompt": "x" * 200, "max_tokens": 100}, openai.BadRequestError, "maximum context length is 256"),
        ({"prompt": [260]}, openai.BadRequestError, "token 260 of the prompt does not exist"),
        ({"prompt": ""}, openai.BadRequestError, "the prompt is empty"),
        (
            {"extra_body": {"temprature": 1}},
            openai.BadRequestError,
            "Unrecognized request argument supplied: temprature",
        ),
        ({"logit_bias": {"5": 1.0}}, openai.BadRequestError, "cannot do that"),
    ],
)
def test_what_cannot_be_done_is_an_error_the_client_knows(
    client: openai.OpenAI, arguments: dict, error: type[openai.APIStatusError], words: str
) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "full", "prompt": "abc", **arguments})
    assert words in caught.value.body["message"]  # type: ignore[index]
    assert caught.value.type == "invalid_request_error"


def test_a_wrong_key_is_an_authentication_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key=KEY.lower()).models.list()
    assert caught.value.code == "invalid_api_key"


def test_closing_a_stream_ends_the_work(client: openai.OpenAI) -> None:
    engine.step_seconds = 0.01
    stream = client.completions.create(model="full", prompt="abc", max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: engine.stats().active == 0)
    engine.step_seconds = 0.0
    assert engine.finished["cancelled"] == 1
