"""Tickets: events reach threads and event loops in order, and leaving early cancels."""

import asyncio
import threading

import pytest

from fusiontree.deploy.requests import ChoiceEnd, Event, Limits, Request, RequestEnd, TokenEvent, Usage
from fusiontree.deploy.scheduler_ticket import Ticket
from fusiontree.errors import ConfigError

EVENTS: list[Event] = [
    TokenEvent(0, 5, "a"), TokenEvent(1, 6, "x"), TokenEvent(0, 7, "b"), ChoiceEnd(1, "stop", "y"),
    ChoiceEnd(0, "length"), RequestEnd(Usage(3, 0, 3)),
]  # fmt: skip


def put_all(ticket: Ticket) -> threading.Thread:
    def run() -> None:
        for event in EVENTS:
            ticket.put(event)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_thread_reads_all_events_and_then_stops() -> None:
    ticket = Ticket(Request([1], n=2), 1)
    thread = put_all(ticket)
    assert list(ticket) == EVENTS
    thread.join(5)
    assert not ticket.cancelled


def test_an_event_loop_reads_all_events_while_another_thread_puts_them() -> None:
    async def read(ticket: Ticket) -> list[Event]:
        async def collect() -> list[Event]:
            return [event async for event in ticket]

        reading = asyncio.create_task(collect())
        await asyncio.sleep(0)  # it waits before the first event comes
        thread = put_all(ticket)
        events = await asyncio.wait_for(reading, 5)
        thread.join(5)
        return events

    ticket = Ticket(Request([1], n=2), 1)
    assert asyncio.run(read(ticket)) == EVENTS
    assert not ticket.cancelled


def test_the_whole_answer_is_collected_choice_by_choice() -> None:
    ticket = Ticket(Request([1], n=2), 1)
    put_all(ticket).join(5)
    completions, usage = ticket.result(timeout=5)
    assert [(c.text, c.reason, len(c.tokens)) for c in completions] == [("ab", "length", 2), ("xy", "stop", 1)]
    assert usage.completion_tokens == 3


def test_leaving_a_loop_early_cancels() -> None:
    woken: list[int] = []
    ticket = Ticket(Request([1]), 1, wake=lambda: woken.append(1))
    ticket.put(EVENTS[0])
    for _ in ticket:
        break
    assert ticket.cancelled and woken

    async def leave(ticket: Ticket) -> None:
        ticket.put(EVENTS[0])
        events = ticket.__aiter__()
        await events.__anext__()
        await events.aclose()  # type: ignore[attr-defined]

    ticket = Ticket(Request([1]), 1)
    asyncio.run(leave(ticket))
    assert ticket.cancelled


def test_a_wait_that_is_too_long_ends_and_cancels() -> None:
    ticket = Ticket(Request([1]), 1)
    with pytest.raises(TimeoutError):
        ticket.result(timeout=0.01)
    assert ticket.cancelled


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []}, {"prompt": [-1]}, {"prompt": [True]}, {"prompt": 3}, {"n": 0}, {"n": 17}, {"n": 1.0},
        {"logprobs": 21}, {"logprobs": -1}, {"deadline": 0}, {"deadline": float("nan")}, {"deadline": "1"},
    ],
)  # fmt: skip
def test_impossible_requests_are_refused_by_name(fields: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Request(**{"prompt": "x", **fields})


def test_impossible_limits_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="slots"):
        Limits(slots=0)
