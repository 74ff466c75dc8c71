"""What the engine knows of the requests it works on: a job per request, a stream per choice."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fusiontree.deploy.requests import ChoiceEnd, FinishReason, RequestEnd, TokenEvent, Usage
from fusiontree.deploy.sampling import NOT_FINITE, Draw
from fusiontree.deploy.scheduler_ticket import Ticket
from fusiontree.deploy.text_stream import TextStream
from fusiontree.models.cache import HybridCache

if TYPE_CHECKING:
    from fusiontree.deploy.runtime import InferenceRuntime


class Job:
    """One request from `submit` to its last event."""

    def __init__(self, ticket: Ticket, ids: list[int], runtime: InferenceRuntime) -> None:
        self.ticket = ticket
        self.ids = ids
        self.request = ticket.request
        self.streams = [Stream(self, choice, runtime) for choice in range(self.request.n)]
        self.running = len(self.streams)
        self.cached = 0
        self.produced = 0
        self._begin = time.monotonic()
        self._started: float | None = None
        self._first: float | None = None
        deadline = self.request.deadline
        self._until = None if deadline is None else self._begin + deadline

    @property
    def seconds(self) -> float:
        """Since `submit`."""
        return time.monotonic() - self._begin

    def start(self, cached: int) -> None:
        """Its prompt is being read from now on; the state after `cached` tokens was at hand."""
        self.cached, self._started = cached, time.monotonic()

    def count_token(self) -> None:
        """One more token has come out."""
        self.produced += 1
        if self._first is None:
            self._first = time.monotonic()

    def ending(self) -> tuple[FinishReason, str | None] | None:
        """Why the request must end now whatever its tokens say; None: it need not."""
        if self.ticket.cancelled:
            return "cancelled", None
        if self._until is not None and time.monotonic() >= self._until:
            return "deadline", f"the deadline of {self.request.deadline:g} s has passed"
        return None

    def stream_ended(self) -> None:
        """One of its streams has put its last event; after the last one the request has ended."""
        self.running -= 1
        if not self.running:
            self.ticket.put(RequestEnd(self._usage()))

    def _usage(self) -> Usage:
        def since(moment: float) -> float:
            return moment - self._begin

        now = time.monotonic()
        return Usage(
            prompt_tokens=len(self.ids),
            cached_tokens=self.cached,
            completion_tokens=self.produced,
            queue_seconds=since(now if self._started is None else self._started),
            first_token_seconds=None if self._first is None else since(self._first),
            total_seconds=since(now),
        )


class Stream:
    """One choice: its tokens so far and the text they make."""

    def __init__(self, job: Job, choice: int, runtime: InferenceRuntime) -> None:
        self.job = job
        self.choice = choice
        self.options = job.request.options
        self.seed = (self.options.seed or 0) + choice
        self.ids = list(job.ids)
        self.reason: FinishReason | None = None
        self._stop_ids = runtime.stop_ids
        self._text = TextStream(runtime.tokenizer, self.ids, self.options.stops)

    @property
    def draw(self) -> Draw:
        """What decides its next token besides the logits."""
        return Draw(self.ids, len(self.job.ids), self.options, self.seed)

    def push(
        self,
        token: int | None,
        logprob: float | None,
        top: tuple[tuple[int, float], ...],
        gates: tuple[float | None, ...] | None,
    ) -> None:
        """Take the next token, None where the model gave nothing finite; puts the events that follow from it."""
        if token is None:
            self.end("error", NOT_FINITE)
            return
        if token in self._stop_ids:
            self.end("stop")
            return
        self.ids.append(token)
        self.job.count_token()
        text = self._text.push(token)
        self.job.ticket.put(TokenEvent(self.choice, token, text, logprob, top, gates))
        if self._text.stopped:
            self.end("stop")
        elif len(self.ids) - len(self.job.ids) == self.options.max_new_tokens:
            self.end("length")

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """Put the last event."""
        self.reason = reason
        self.job.ticket.put(ChoiceEnd(self.choice, reason, self._text.finish(), error))
        self.job.stream_ended()


class Reading:
    """A job whose prompt is being read, piece by piece."""

    def __init__(self, job: Job, cache: HybridCache, fed: int, cuts: set[int], chunk: int) -> None:
        self.job = job
        self.cache = cache
        self.fed = fed
        self._cuts = cuts
        self._chunk = chunk
        self.alone = fed > 0
        """Whether it must be read by itself."""

    def is_short(self) -> bool:
        """Whether it can be read whole, together with others."""
        return not self.alone and self.fed == 0 and self.next_end() == len(self.job.ids)

    def next_end(self) -> int:
        """Where the next piece ends: at a multiple of the chunk, whatever else goes on, or where a state is kept."""
        ends = {len(self.job.ids), (self.fed // self._chunk + 1) * self._chunk, *self._cuts}
        return min(end for end in ends if end > self.fed)

    def is_cut(self) -> bool:
        """Whether the state is to be kept here."""
        return self.fed in self._cuts
