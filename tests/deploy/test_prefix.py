"""Prompts that begin alike cost only what is new, give the same tokens, and the bytes kept are counted and bounded."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusiontree.deploy.prefix import PrefixCache, Snapshot, snapshot
from fusiontree.deploy.requests import Limits, Request
from fusiontree.deploy.runtime import InferenceRuntime
from fusiontree.deploy.sampling import GenerationOptions
from fusiontree.deploy.scheduler import Scheduler
from fusiontree.models.cache import HybridCache
from tests.deploy.tiny import save_tiny

SYSTEM = [(7 * i + 3) % 256 for i in range(100)]
OPTIONS = GenerationOptions(max_new_tokens=20, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> InferenceRuntime:
    runtime = InferenceRuntime(save_tiny(tmp_path_factory.mktemp("prefix") / "model"), device="cpu")
    runtime.stop_ids = frozenset()  # texts end where a test says
    return runtime


@pytest.fixture
def scheduler(runtime: InferenceRuntime) -> Iterator[Scheduler]:
    with Scheduler(runtime, Limits(prefill_chunk=16)) as running:
        yield running


def ask(scheduler: Scheduler, prompt: list[int], **fields: Any) -> tuple[list[int], int]:
    """The tokens of the answer, and how much of the prompt was at hand."""
    (completion,), usage = scheduler.submit(Request(prompt, OPTIONS, **fields)).result(timeout=60)
    assert completion.reason == "length"
    return [token.token for token in completion.tokens], usage.cached_tokens


def alone(runtime: InferenceRuntime, prompt: list[int]) -> list[int]:
    return [token.token for token in runtime.complete(Request(prompt, OPTIONS))[0][0].tokens]


def test_a_prompt_that_comes_again_costs_nothing(runtime: InferenceRuntime, scheduler: Scheduler) -> None:
    wanted = alone(runtime, SYSTEM)
    assert ask(scheduler, SYSTEM) == (wanted, 0)
    assert ask(scheduler, SYSTEM) == (wanted, 100)
    with_gates = scheduler.submit(Request(SYSTEM, OPTIONS, gates=True, logprobs=0)).result(60)[0][0]
    assert [token.token for token in with_gates.tokens] == wanted
    assert all(token.gates and token.logprob is not None for token in with_gates.tokens)


def test_a_grown_chat_costs_its_new_tokens(runtime: InferenceRuntime, scheduler: Scheduler) -> None:
    text = list(SYSTEM)
    for turn in range(3):
        answer, cached = ask(scheduler, text)
        assert answer == alone(runtime, text)
        # The last token of an answer was drawn but not read.
        assert cached == (0 if turn == 0 else len(text) - 6)
        text = text + answer + [1, 2, 3, 4, 5]


def test_a_marked_system_prompt_serves_the_second_request(runtime: InferenceRuntime, scheduler: Scheduler) -> None:
    first, second = [*SYSTEM, 1, 2, 3], [*SYSTEM, 9, 8, 7, 6]
    assert ask(scheduler, first, marks=(100,)) == (alone(runtime, first), 0)
    assert ask(scheduler, second) == (alone(runtime, second), 100)


def test_an_unmarked_common_beginning_serves_the_third_request(runtime: InferenceRuntime, scheduler: Scheduler) -> None:
    prompts = [[*SYSTEM[:77], i, i + 1, i + 2] for i in range(3)]
    assert [ask(scheduler, prompt) for prompt in prompts] == [
        (alone(runtime, prompt), cached) for prompt, cached in zip(prompts, (0, 0, 77), strict=True)
    ]


def test_a_chat_marks_the_end_of_its_system_prompt(runtime: InferenceRuntime, scheduler: Scheduler) -> None:
    def said(text: str) -> tuple[str, int]:
        messages = [
            {"role": "system", "content": "Answer briefly and politely, always."},
            {"role": "user", "content": text},
        ]
        (completion,), usage = scheduler.submit(runtime.chat_request(messages, OPTIONS)).result(60)
        assert completion.text == runtime.chat(messages, max_new_tokens=20, temperature=1.0, seed=3)
        return completion.text, usage.cached_tokens

    assert said("one")[1] == 0
    assert said("two")[1] == len("Answer briefly and politely, always.\n\nUser: ")


def state(runtime: InferenceRuntime, tokens: list[int]) -> Snapshot:
    cache = HybridCache(runtime.model.config)
    with torch.no_grad():
        out = runtime.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    return snapshot(tokens, [layer.parts() for layer in cache.layers], out.logits[:, -1])


def test_bytes_are_counted_as_they_lie_in_memory_and_the_longest_unused_go_first(runtime: InferenceRuntime) -> None:
    entries = [state(runtime, [i] * 40) for i in range(4)]
    size = entries[0].nbytes
    tensors = [t for part in entries[0].parts for t in part.values() if t is not None]
    storages = sum(t.untyped_storage().nbytes() for t in [*tensors, entries[0].logits])  # type: ignore[union-attr]
    assert size == storages + 40 * 4
    cache = PrefixCache(max_bytes=3 * size)
    for entry in entries[:3]:
        cache.put(entry)
    assert (cache.nbytes, len(cache)) == (3 * size, 3)
    assert cache.longest([0] * 50, whole=False) is entries[0]
    cache.put(entries[3])
    assert [cache.holds([i] * 40) for i in range(4)] == [True, False, True, True]
    assert (cache.nbytes, len(cache), cache.hits) == (3 * size, 3, 1)
    cache.put(entries[3])
    assert (cache.nbytes, len(cache)) == (3 * size, 3)
    small = PrefixCache(max_bytes=size - 1)
    small.put(entries[0])
    assert (small.nbytes, len(small)) == (0, 0)


def test_only_a_whole_beginning_serves_and_the_longest_does(runtime: InferenceRuntime) -> None:
    cache = PrefixCache(max_bytes=1 << 24)
    short, long = state(runtime, [1, 2]), state(runtime, [1, 2, 3, 4])
    cache.put(short)
    cache.put(long)
    assert cache.longest([1, 2, 3, 4, 5], whole=False) is long
    assert cache.longest([1, 2, 3, 5, 5], whole=False) is short
    assert cache.longest([1, 2, 3, 4], whole=False) is long
    assert cache.longest([1, 2, 3, 4], whole=True) is short, "its gates are not known"
    assert cache.longest([2, 2, 3], whole=False) is None
    assert cache.branch([1, 2, 3, 9]) == 3


def test_a_snapshot_is_not_changed_by_what_goes_on_from_it(runtime: InferenceRuntime) -> None:
    entry = state(runtime, SYSTEM)
    before = [None if t is None else t.clone() for part in entry.parts for t in part.values()]
    with torch.no_grad():
        for _ in range(3):
            cache = entry.cache(runtime.model.config)
            for token in range(20):
                runtime.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    after = [t for part in entry.parts for t in part.values()]
    assert all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(before, after, strict=True))
