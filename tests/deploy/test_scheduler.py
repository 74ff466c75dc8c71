"""Continuous batching: every request gets what it gets alone, leaves no slot behind, and hears how it ended."""

import gc
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.deploy.requests import ChoiceEnd, EngineClosed, Limits, QueueFull, Request, RequestEnd, TokenEvent
from fusiontree.deploy.runtime import InferenceRuntime
from fusiontree.deploy.sampling import GenerationOptions
from fusiontree.deploy.scheduler import Scheduler
from fusiontree.deploy.scheduler_ticket import Ticket
from fusiontree.errors import ConfigError
from tests.deploy.tiny import save_tiny, tiny_model

WAIT = 60.0


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> InferenceRuntime:
    runtime = InferenceRuntime(save_tiny(tmp_path_factory.mktemp("scheduler") / "model"), device="cpu")
    runtime.stop_ids = frozenset()  # texts end where a test says
    return runtime


@pytest.fixture
def scheduler(runtime: InferenceRuntime) -> Iterator[Scheduler]:
    with Scheduler(runtime, Limits(slots=8, prefill_chunk=16, prefill_tokens=24)) as running:
        yield running


def request(number: int, **fields: Any) -> Request:
    """Prompts, lengths and ways of drawing of every kind, decided by `number`."""
    rng = random.Random(number)
    prompt = [rng.randrange(256) for _ in range(rng.choice([1, 3, 9, 17, 40, 70]))]
    options = GenerationOptions(
        max_new_tokens=rng.randint(1, 30), temperature=rng.choice([0.0, 0.8, 1.3]), top_k=rng.choice([0, 20]),
        top_p=rng.choice([1.0, 0.9]), repetition_penalty=rng.choice([1.0, 1.2]), seed=number,
        frequency_penalty=rng.choice([0.0, 0.5]), stop=rng.choice([(), ("a", "e")]),
    )  # fmt: skip
    return replace(Request(prompt, options), **fields)


def ids_of(ticket: Ticket) -> list[list[int]]:
    completions, _ = ticket.result(timeout=WAIT)
    assert not [c.error for c in completions if c.error]
    return [[token.token for token in completion.tokens] for completion in completions]


def slots_are_free(scheduler: Scheduler) -> bool:
    stats = scheduler.stats()
    return (stats.active, stats.prefilling, stats.waiting) == (0, 0, 0)


def wait_until(true: Any) -> None:
    until = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.002)


def test_a_hundred_streams_give_what_each_gives_alone(runtime: InferenceRuntime) -> None:
    requests = [request(number) for number in range(100)]
    alone = [[token.token for token in runtime.complete(r)[0][0].tokens] for r in requests]
    limits = Limits(slots=100, prefill_chunk=16, prefill_tokens=64, prefix_bytes=0)
    with Scheduler(runtime, limits) as scheduler:
        tickets = [scheduler.submit(r) for r in requests]
        together = [ids_of(ticket)[0] for ticket in tickets]
        wait_until(lambda: slots_are_free(scheduler))
        assert scheduler.stats().steps < sum(map(len, alone)) / 10, "they were not decoded together"
    assert together == alone
    assert len({tuple(ids) for ids in alone}) > 90


@pytest.mark.parametrize("slots", [1, 3])
def test_requests_join_and_leave_while_others_decode(runtime: InferenceRuntime, slots: int) -> None:
    requests = [request(number) for number in range(12)]
    alone = [[token.token for token in runtime.complete(r)[0][0].tokens] for r in requests]
    with Scheduler(runtime, Limits(slots=slots, prefill_chunk=8, prefill_tokens=8, prefix_bytes=0)) as scheduler:
        assert [ids_of(ticket)[0] for ticket in [scheduler.submit(r) for r in requests]] == alone


VARIANTS = [
    {"layers": [{"mixers": ["mamba"]}, {"mixers": ["attention"]}]},
    {"global_heads": 4},
    {"global_heads": 0, "sliding_window": 1},
    {"num_key_value_heads": 1, "srte": "learned", "gate_granularity": "head"},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_other_models_too(tmp_path: Path, overrides: dict[str, Any]) -> None:
    runtime = InferenceRuntime(save_tiny(tmp_path / "model", tiny_model(**overrides)), device="cpu")
    requests = [request(number) for number in range(10)]
    alone = [[token.token for token in runtime.complete(r)[0][0].tokens] for r in requests]
    with Scheduler(runtime, Limits(slots=10, prefill_chunk=16)) as scheduler:
        assert [ids_of(ticket)[0] for ticket in [scheduler.submit(r) for r in requests]] == alone


def test_choices_share_the_prompt_and_draw_with_seeds_of_their_own(
    runtime: InferenceRuntime, scheduler: Scheduler
) -> None:
    several = request(5, n=3, options=GenerationOptions(max_new_tokens=12, temperature=1.0, seed=7))
    wanted = [
        ids_of(scheduler.submit(replace(several, n=1, options=replace(several.options, seed=7 + choice))))[0]
        for choice in range(3)
    ]
    before = scheduler.stats().prompt_tokens
    assert ids_of(scheduler.submit(several)) == wanted
    assert scheduler.stats().prompt_tokens - before == len(several.prompt)


def test_log_probabilities_and_gates_are_those_of_a_plain_forward(
    runtime: InferenceRuntime, scheduler: Scheduler
) -> None:
    noise = [scheduler.submit(request(number)) for number in range(4)]
    wanted = Request([5, 6, 7, 8], GenerationOptions(max_new_tokens=6), logprobs=3, gates=True)
    (completion,), _ = scheduler.submit(wanted).result(timeout=WAIT)
    for ticket in noise:
        ids_of(ticket)
    ids = [5, 6, 7, 8, *(token.token for token in completion.tokens)]
    with torch.no_grad():
        out = runtime.model(torch.tensor([ids]), output_gates=True)
    known = out.logits[0].log_softmax(-1)
    for place, event in enumerate(completion.tokens, start=3):
        assert event.logprob == pytest.approx(float(known[place, event.token]), abs=1e-4)
        assert [i for i, _ in event.top] == known[place].topk(3).indices.tolist()
        assert [value for _, value in event.top] == pytest.approx(known[place].topk(3).values.tolist(), abs=1e-4)
        assert event.gates == pytest.approx([float(gate[0, place].mean()) for gate in out.gates], abs=1e-4)
    plain, _ = scheduler.submit(replace(wanted, logprobs=None, gates=False)).result(timeout=WAIT)
    assert plain[0].text == completion.text and plain[0].tokens[0].logprob is None and plain[0].tokens[0].gates is None


def test_a_long_prompt_does_not_keep_others_from_decoding(runtime: InferenceRuntime) -> None:
    with Scheduler(runtime, Limits(slots=4, prefill_chunk=8, prefill_tokens=8, prefix_bytes=0)) as scheduler:
        short = scheduler.submit(Request([1], GenerationOptions(max_new_tokens=200, seed=1, temperature=1.0)))
        wait_until(lambda: scheduler.stats().active == 1)
        before = scheduler.stats().completion_tokens
        long = scheduler.submit(Request(list(range(240)), GenerationOptions(max_new_tokens=1)))
        first = next(event for event in long if isinstance(event, TokenEvent))
        assert first.token >= 0
        # 240 tokens are 30 pieces, with a decoding step after each.
        assert scheduler.stats().completion_tokens - before >= 25
        short.cancel()


def test_a_cancelled_request_frees_its_slot_within_a_step(scheduler: Scheduler) -> None:
    for at in ("decoding", "waiting"):
        blockers = [scheduler.submit(Request([3], GenerationOptions(max_new_tokens=250))) for _ in range(7)]
        ticket = scheduler.submit(Request([4], GenerationOptions(max_new_tokens=250), n=1 if at == "decoding" else 2))
        if at == "decoding":
            assert isinstance(ticket.get(WAIT), TokenEvent)
        ticket.cancel()
        tail = [event for event in ticket if not isinstance(event, TokenEvent)]
        ends, usage = tail[:-1], tail[-1]
        assert [end.reason for end in ends if isinstance(end, ChoiceEnd)] == ["cancelled"] * ticket.request.n
        assert isinstance(usage, RequestEnd) and usage.usage.completion_tokens < 250
        for blocker in blockers:
            blocker.cancel()
        wait_until(lambda: slots_are_free(scheduler))


def test_a_deadline_ends_a_request(scheduler: Scheduler) -> None:
    endless = Request([3], GenerationOptions(max_new_tokens=255), deadline=0.03)
    (completion,), usage = scheduler.submit(endless).result(timeout=WAIT)
    assert completion.reason == "deadline" and "0.03 s" in (completion.error or "")
    assert usage.total_seconds >= 0.03 and usage.completion_tokens == len(completion.tokens) < 255


def test_a_full_queue_refuses_with_a_time_to_come_back(runtime: InferenceRuntime) -> None:
    with Scheduler(runtime, Limits(slots=2, queue=3)) as scheduler:
        endless = Request([3], GenerationOptions(max_new_tokens=250))
        tickets = [scheduler.submit(endless) for _ in range(5)]
        with pytest.raises(QueueFull, match="2 slots") as refusal:
            scheduler.submit(endless)
        assert refusal.value.retry_after >= 1
        for ticket in tickets:
            ticket.cancel()
        wait_until(lambda: slots_are_free(scheduler))
        assert ids_of(scheduler.submit(request(1)))


def test_what_does_not_fit_is_refused_before_it_is_queued(scheduler: Scheduler) -> None:
    for wrong, said in (
        (Request([260]), "token 260"), (Request([1] * 250, GenerationOptions(max_new_tokens=7)), "256 positions"),
        (Request(""), "empty"), (Request([1], n=9), "n is 9"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            scheduler.submit(wrong)
    assert slots_are_free(scheduler) and scheduler.stats().submitted == 0


def test_draining_finishes_what_runs_and_takes_no_more(runtime: InferenceRuntime) -> None:
    with Scheduler(runtime) as scheduler:
        ticket = scheduler.submit(Request([3], GenerationOptions(max_new_tokens=30)))
        assert scheduler.drain(timeout=WAIT)
        assert len(ids_of(ticket)[0]) == 30
        with pytest.raises(EngineClosed, match="shutting down"):
            scheduler.submit(request(1))
        assert scheduler.drain(timeout=0)


def test_closing_ends_everybody(runtime: InferenceRuntime) -> None:
    scheduler = Scheduler(runtime, Limits(slots=1))
    tickets = [scheduler.submit(Request([3], GenerationOptions(max_new_tokens=250))) for _ in range(3)]
    assert not scheduler.drain(timeout=0.01)
    scheduler.close()
    scheduler.close()
    assert {ticket.result(timeout=WAIT)[0][0].reason for ticket in tickets} == {"cancelled"}


def test_when_the_model_breaks_everybody_hears_it(runtime: InferenceRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    with Scheduler(runtime, Limits(slots=2)) as scheduler:
        tickets = [scheduler.submit(Request([3], GenerationOptions(max_new_tokens=250))) for _ in range(4)]
        assert isinstance(tickets[0].get(WAIT), TokenEvent)

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(runtime.model, "forward", broken)
        for ticket in tickets:
            (completion,), _ = ticket.result(timeout=WAIT)
            assert completion.reason == "error" and "device is gone" in (completion.error or "")
        assert isinstance(scheduler.failure, RuntimeError)
        with pytest.raises(EngineClosed, match="device is gone"):
            scheduler.submit(request(1))


def test_a_prompt_that_cannot_be_read_hurts_nobody_else(
    runtime: InferenceRuntime, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = runtime.model.forward

    def short_of_memory(*args: Any, **kwargs: Any) -> Any:
        if 255 in kwargs["input_ids"]:
            raise RuntimeError("not enough memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(runtime.model, "forward", short_of_memory)
    good = [scheduler.submit(Request([1, 2], GenerationOptions(max_new_tokens=20, seed=s))) for s in range(3)]
    (completion,), _ = scheduler.submit(Request([255])).result(timeout=WAIT)
    assert completion.reason == "error" and "not enough memory" in (completion.error or "")
    assert [len(ids_of(ticket)[0]) for ticket in good] == [20] * 3
    assert scheduler.failure is None


def test_numbers_that_are_not_finite_end_only_their_own_request(
    runtime: InferenceRuntime, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = runtime.model.forward

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits[(kwargs["input_ids"] == 255).any(1)] = float("nan")
        return out

    monkeypatch.setattr(runtime.model, "forward", spoiled)
    good = scheduler.submit(Request([1, 2], GenerationOptions(max_new_tokens=20)))
    (completion,), _ = scheduler.submit(Request([255])).result(timeout=WAIT)
    assert completion.reason == "error" and "not finite" in (completion.error or "")
    assert len(ids_of(good)[0]) == 20


def test_two_thousand_requests_with_random_cancels_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, gate_rank=4)
    runtime = InferenceRuntime(save_tiny(tmp_path / "model", model), device="cpu")
    ended = threading.Semaphore(0)
    rng = random.Random(0)
    with Scheduler(runtime, Limits(slots=16, queue=64, prefix_bytes=200_000)) as scheduler:

        def client(seed: int) -> None:
            own = random.Random(seed)
            for _ in range(250):
                prompt = [own.randrange(256) for _ in range(own.randint(1, 12))]
                ticket = scheduler.submit(Request(prompt, GenerationOptions(max_new_tokens=own.randint(1, 12))))
                leave = own.choice([0, 1, 3, 99, 99])
                if not leave:
                    ticket.cancel()
                for count, _ in enumerate(ticket, start=1):
                    if count == leave:
                        break
                ended.release()

        seeds = rng.sample(range(1000), 8)
        clients = [threading.Thread(target=client, args=(seed,)) for seed in seeds]
        for thread in clients:
            thread.start()
        for _ in range(600):
            assert ended.acquire(timeout=WAIT)
        early = resident_bytes()
        for thread in clients:
            thread.join(WAIT)
        wait_until(lambda: slots_are_free(scheduler))
        gc.collect()
        assert resident_bytes() - early < 8 * 2**20
        stats = scheduler.stats()
        assert stats.submitted == sum(stats.finished.values()) == 2000
        assert min(stats.finished["cancelled"], stats.finished["length"]) > 200
        assert stats.state_bytes == 0 and stats.prefix_bytes <= 200_000
        assert not [o for o in gc.get_objects() if type(o) is Ticket]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
