"""Events to the client as they come, and the end of all work for a client that has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fusiontree.deploy.requests import ChoiceEnd, Event, RequestEnd, TokenEvent
from fusiontree.deploy.scheduler_ticket import Ticket
from fusiontree.deploy.server.answers import Answer, Json
from fusiontree.deploy.server.errors import ApiError

T = TypeVar("T")
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold a stream back


async def events_of(tickets: Sequence[Ticket], patience: float) -> AsyncGenerator[tuple[int, Event] | None, None]:
    """(ticket, event) of all tickets as they come; None after `patience` seconds without. Leaving cancels them."""
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def forward(place: int, ticket: Ticket) -> None:
        async for event in ticket:
            queue.put_nowait((place, event))

    tasks = [asyncio.create_task(forward(place, ticket)) for place, ticket in enumerate(tickets)]
    running = len(tickets)
    try:
        while running:
            try:
                place, event = await asyncio.wait_for(queue.get(), patience)
            except asyncio.TimeoutError:
                yield None
                continue
            running -= isinstance(event, RequestEnd)
            yield place, event
    finally:
        for ticket in tickets:
            if not ticket.ended:
                ticket.cancel()
        for task in tasks:
            task.cancel()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; ClientDisconnect, and `work` is cancelled, when the client leaves first."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole_answer(answer: Answer, tickets: Sequence[Ticket], patience: float) -> Json:
    """Everything at once."""
    choices: list[list[TokenEvent]] = [[] for ticket in tickets for _ in range(ticket.request.n)]
    ends: dict[int, ChoiceEnd] = {}
    async with aclosing(events_of(tickets, patience)) as events:
        async for item in events:
            place, event = item or (0, None)
            if isinstance(event, RequestEnd):
                answer.spent(event.usage)
            elif isinstance(event, TokenEvent):
                choices[_number(tickets, place, event)].append(event)
            elif isinstance(event, ChoiceEnd):
                ends[_number(tickets, place, event)] = event
    return answer.whole([(tokens, ends[number]) for number, tokens in enumerate(choices)])


async def chunks(answer: Answer, tickets: Sequence[Ticket], patience: float) -> AsyncGenerator[Json | None, None]:
    """The answer chunk by chunk; None now and then while nothing comes."""
    for chunk in answer.opening(sum(ticket.request.n for ticket in tickets)):
        yield chunk
    async with aclosing(events_of(tickets, patience)) as events:
        async for item in events:
            place, event = item or (0, None)
            if isinstance(event, RequestEnd):
                answer.spent(event.usage)
            elif isinstance(event, ChoiceEnd):
                yield answer.end(_number(tickets, place, event), event)
            elif event is None:
                yield None
            elif (made := answer.token(_number(tickets, place, event), event)) is not None:
                yield made
    for chunk in answer.closing():
        yield chunk


def _number(tickets: Sequence[Ticket], place: int, event: TokenEvent | ChoiceEnd) -> int:
    """The answer's choice: those of the first prompt come first."""
    return place * tickets[place].request.n + event.choice


class EventStream(Response):
    """Server-sent events: `data: JSON` per chunk, `data: [DONE]` at the end, a comment while nothing comes.

    An error in the midst of a stream is an event {"error": …}, after which the stream ends without [DONE].
    """

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[Json | None, None]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            await while_connected(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self.source:
                text = ": still here\n\n" if chunk is None else _event(chunk)
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            last = "data: [DONE]\n\n"
        except ApiError as problem:
            last = _event(problem.body)
        finally:
            await self.source.aclose()
        await send({"type": "http.response.body", "body": last.encode(), "more_body": False})


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
