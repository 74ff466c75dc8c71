"""The caller's end of a request: its events as they come, for threads and for asyncio, and the way to cancel it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from fusiontree.deploy.requests import ChoiceEnd, Completion, Event, Request, RequestEnd, TokenEvent, Usage


class Ticket:
    """One accepted request. Its events may be read once, by one reader, in any thread or event loop.

    Leaving a loop over it early cancels the request.
    """

    def __init__(self, request: Request, prompt_tokens: int, wake: Callable[[], None] = lambda: None) -> None:
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.cancelled = False
        self.ended = False  # the last event has been put
        self._wake = wake
        self._events: deque[Event] = deque()
        self._arrived = threading.Condition()
        self._listener: Callable[[], None] | None = None

    def cancel(self) -> None:
        """End the request before the next token; it still gets its last events. Does nothing to one that has ended."""
        self.cancelled = True
        self._wake()

    def put(self, event: Event) -> None:
        """The engine's side: hand an event over."""
        with self._arrived:
            self._events.append(event)
            self.ended = isinstance(event, RequestEnd)
            listener = self._listener
            self._arrived.notify()
        if listener is not None:
            with contextlib.suppress(RuntimeError):  # the reader's event loop is closed
                listener()

    def get(self, timeout: float | None = None) -> Event:
        """The next event; TimeoutError when none comes within `timeout` seconds."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: self._events, timeout):
                raise TimeoutError(f"no event within {timeout} s")
            return self._events.popleft()

    def arrived(self) -> list[Event]:
        """The events that are here already."""
        with self._arrived:
            events = list(self._events)
            self._events.clear()
        return events

    def __iter__(self) -> Iterator[Event]:
        try:
            while not isinstance(event := self.get(), RequestEnd):
                yield event
            yield event
        finally:
            if not self.ended:
                self.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(arrived.set)

        with self._arrived:
            self._listener = tell
        try:
            event: Event | None = None
            while not isinstance(event, RequestEnd):
                arrived.clear()
                with self._arrived:
                    event = self._events.popleft() if self._events else None
                if event is None:
                    await arrived.wait()
                else:
                    yield event
        finally:
            if not self.ended:
                self.cancel()

    def result(self, timeout: float | None = None) -> tuple[list[Completion], Usage]:
        """Wait for the whole answer: one completion per choice. TimeoutError, and the request is cancelled, if late."""
        until = None if timeout is None else time.monotonic() + timeout
        tokens: list[list[TokenEvent]] = [[] for _ in range(self.request.n)]
        ends: dict[int, ChoiceEnd] = {}
        try:
            while not isinstance(event := self.get(None if until is None else until - time.monotonic()), RequestEnd):
                if isinstance(event, TokenEvent):
                    tokens[event.choice].append(event)
                else:
                    ends[event.choice] = event
        finally:
            if not self.ended:
                self.cancel()
        return [_collected(tokens[choice], ends[choice]) for choice in range(self.request.n)], event.usage


def _collected(tokens: list[TokenEvent], end: ChoiceEnd) -> Completion:
    text = "".join(token.text for token in tokens) + end.text
    return Completion(text, tuple(tokens), end.reason, end.error)
