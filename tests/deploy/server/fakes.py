"""A runtime and an engine without a model: they honour the interface, and the test decides when a step happens.

Token `t` of a choice is a letter that depends on prompt, seed, choice and `t` alone, so that a mixed-up answer shows.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fusiontree.deploy.requests import (
    ChoiceEnd,
    EngineClosed,
    FinishReason,
    QueueFull,
    Request,
    RequestEnd,
    Stats,
    TokenEvent,
    Usage,
)  # fmt: skip
from fusiontree.deploy.sampling import GenerationOptions
from fusiontree.deploy.scheduler_ticket import Ticket
from fusiontree.errors import ConfigError
from tests.deploy.tiny import VOCAB, byte_tokenizer, tiny_model

MAX_LENGTH = 256


def letter(ids: Sequence[int], seed: int, choice: int, place: int) -> int:
    """The token id, a lower-case letter in the byte tokenizer, of one place of one answer."""
    digest = hashlib.blake2b(f"{list(ids)}:{seed}:{choice}:{place}".encode(), digest_size=2).digest()
    return TOKENIZER.encode(chr(97 + digest[0] % 26))[0]


TOKENIZER = byte_tokenizer()


def expected(prompt: str, seed: int, count: int, choice: int = 0) -> str:
    """What the engine answers to a text."""
    ids = TOKENIZER.encode(prompt)
    return TOKENIZER.decode([letter(ids, seed, choice, place) for place in range(count)])


class FakeRuntime:
    """What the server reads of an `InferenceRuntime`."""

    def __init__(self) -> None:
        self.tokenizer = TOKENIZER
        self.model = tiny_model()
        self.max_length = MAX_LENGTH
        self.fingerprint = "0123456789abcdef0123"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if not text:
            raise ConfigError("the prompt is empty or not a text; give at least one character")
        return list(self.tokenizer.encode(text))

    def chat_request(self, messages: Sequence[Any], options: GenerationOptions | None = None, **fields: Any) -> Request:
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return Request(self.encode(text), options or GenerationOptions(), **fields)


class FakeEngine:
    """A thread that writes one token of every request per step, `slots` of them at a time."""

    def __init__(self, slots: int = 32, queue: int = 64, step_seconds: float = 0.0) -> None:
        self.slots, self.queue, self.step_seconds = slots, queue, step_seconds
        self.go = threading.Event()  # cleared: no step happens
        self.go.set()
        self.failure: BaseException | None = None
        self.steps = self.produced = self.submitted = 0
        self.finished: Counter[FinishReason] = Counter()
        self._jobs: list[tuple[Ticket, list[int]]] = []
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Ticket:
        ids = list(request.prompt)
        if max(ids) >= VOCAB:
            raise ConfigError(f"token {max(ids)} of the prompt does not exist; the vocabulary has {VOCAB} tokens")
        with self._lock:
            if self._closed or self.failure:
                raise EngineClosed("the server is shutting down")
            if len(self._jobs) >= self.slots + self.queue:
                raise QueueFull("all slots are busy", 1.2)
            ticket = Ticket(request, len(ids))
            self._jobs.append((ticket, [0] * request.n))
            self.submitted += 1
        return ticket

    def stats(self) -> Stats:
        with self._lock:
            active = min(self.slots, len(self._jobs))
            waiting = len(self._jobs) - active
        return Stats(
            slots=self.slots, active=active, prefilling=0, waiting=waiting, submitted=self.submitted,
            finished=dict(self.finished), prompt_tokens=0, cached_tokens=0, completion_tokens=self.produced,
            steps=self.steps, tokens_per_second=12.5, state_bytes=active * 1000, prefix_bytes=2048, prefix_entries=1,
            prefix_hits=0,
        )  # fmt: skip

    def drain(self, timeout: float | None = None) -> bool:
        return True

    def close(self) -> None:
        self._closed = True
        self.go.set()
        self._thread.join(5)

    def die(self) -> None:
        """What a bug in a step does."""
        self.failure = RuntimeError("the step failed")

    def _run(self) -> None:
        while not self._closed and self.failure is None:
            self.go.wait(0.05)
            if self.go.is_set() and self._jobs:
                self._step()
            time.sleep(self.step_seconds or 0.0005)
        with self._lock:
            for ticket, counts in self._jobs:
                self._end(ticket, counts, "error" if self.failure else "cancelled")
            self._jobs.clear()

    def _step(self) -> None:
        with self._lock:
            self.steps += 1
            for job in [job for job in self._jobs if job[0].cancelled]:
                self._end(*job, "cancelled")
                self._jobs.remove(job)
            for ticket, counts in self._jobs[: self.slots]:
                for choice in range(len(counts)):
                    self._token(ticket, counts, choice)
            for job in [job for job in self._jobs if job[1][0] >= job[0].request.options.max_new_tokens]:
                self._end(*job, "length")
                self._jobs.remove(job)

    def _token(self, ticket: Ticket, counts: list[int], choice: int) -> None:
        request = ticket.request
        token = letter(request.prompt, request.options.seed or 0, choice, counts[choice])  # type: ignore[arg-type]
        counts[choice] += 1
        self.produced += 1
        wanted = request.logprobs
        top = tuple((token + k, -0.5 - k) for k in range(wanted or 0))
        ticket.put(
            TokenEvent(
                choice,
                token,
                TOKENIZER.decode([token]),
                None if wanted is None else -0.5,
                top,
                (0.25, None) if request.gates else None,
            )
        )

    def _end(self, ticket: Ticket, counts: list[int], reason: FinishReason) -> None:
        for choice in range(len(counts)):
            ticket.put(ChoiceEnd(choice, reason, error="the step failed" if reason == "error" else None))
            self.finished[reason] += 1
        ticket.put(RequestEnd(Usage(ticket.prompt_tokens, 0, sum(counts), 0.01, 0.02, 0.03)))
