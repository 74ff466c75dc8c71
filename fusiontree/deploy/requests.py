"""What a caller asks of a serving engine and what comes back: requests, tickets, events, limits.

request = runtime.chat_request(messages, options=GenerationOptions(max_new_tokens=64), logprobs=5, gates=True)
ticket = engine.submit(request)              # QueueFull, EngineClosed or ConfigError instead of waiting
for event in ticket: ...                     # or: async for event in ticket; leaving the loop early cancels
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from fusiontree.deploy.sampling import GenerationOptions
from fusiontree.errors import ConfigError, FusionTreeError

if TYPE_CHECKING:
    from fusiontree.deploy.scheduler_ticket import Ticket

MAX_CHOICES = 16
MAX_LOGPROBS = 20

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "deadline", "error"]
"""stop: an end token or a stop string; length: max_new_tokens; deadline: `Request.deadline` passed."""


class QueueFull(FusionTreeError):
    """Too many requests wait already; `retry_after`: seconds after which there is likely room again, at least 1."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosed(FusionTreeError):
    """The engine drains, is closed, or has failed: it takes no more requests."""


@dataclass(frozen=True)
class Request:
    """One prompt and what is wanted of it. ConfigError for an impossible value, named with what is allowed.

    What depends on the model (ids beyond the vocabulary, more tokens than positions) is checked by `submit`.
    """

    prompt: str | Sequence[int]
    """Text, or token ids taken as they are."""
    options: GenerationOptions = field(default_factory=GenerationOptions)
    """Sampling, max_new_tokens, stop strings, seed. Choice i draws with seed + i."""
    n: int = 1
    """How many answers; the prompt is read once for all of them."""
    logprobs: int | None = None
    """None: no log-probabilities; 0: of each chosen token; k: of the k most probable alternatives too."""
    gates: bool = False
    """Whether each token brings its gates."""
    deadline: float | None = None
    """Seconds from `submit` after which the request ends wherever it is, None: never."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its special tokens (such as BOS) to a prompt given as text."""
    marks: tuple[int, ...] = ()
    """Prompt lengths in tokens, such as the end of a system prompt, whose state is worth keeping for other requests."""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            ids = self.prompt
            if not isinstance(ids, Sequence) or not ids or not all(_is_whole(i) and i >= 0 for i in ids):
                raise ConfigError("prompt must be a text or a list of at least one token id, each 0 or more")
        if not (_is_whole(self.n) and 1 <= self.n <= MAX_CHOICES):
            raise ConfigError(f"n must be a whole number from 1 to {MAX_CHOICES}; given {self.n!r}")
        if self.logprobs is not None and not (_is_whole(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS):
            raise ConfigError(f"logprobs must be a whole number from 0 to {MAX_LOGPROBS}; given {self.logprobs!r}")
        if self.deadline is not None and not (
            isinstance(self.deadline, (int, float)) and self.deadline > 0 and math.isfinite(self.deadline)
        ):
            raise ConfigError(f"deadline must be a number of seconds above 0; given {self.deadline!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. An end token brings none."""

    choice: int
    token: int
    text: str
    """The text that is certain by now, in whole characters: "" while a character or a stop string may be unfinished."""
    logprob: float | None = None
    """Natural logarithm of the token's probability, before temperature, penalties and restrictions."""
    top: tuple[tuple[int, float], ...] = ()
    """(id, log-probability) of the most probable tokens, the most probable first."""
    gates: tuple[float | None, ...] | None = None
    """Per layer the mean gate of the step that chose this token: 1 all Mamba, 0 all attention; None: one branch."""


@dataclass(frozen=True)
class ChoiceEnd:
    """The last event of one choice."""

    choice: int
    reason: FinishReason
    text: str = ""
    """What was held back in case a stop string followed."""
    error: str | None = None
    """What went wrong, in one line, where the reason is `error` or `deadline`."""


@dataclass(frozen=True)
class Usage:
    """What a request cost. Seconds count from `submit`."""

    prompt_tokens: int
    cached_tokens: int = 0
    """Of the prompt's tokens, those whose state was at hand already."""
    completion_tokens: int = 0
    queue_seconds: float = 0.0
    first_token_seconds: float | None = None
    total_seconds: float = 0.0


@dataclass(frozen=True)
class RequestEnd:
    """The last event of a request: all choices have ended. Its slots are free before the next step."""

    usage: Usage


Event: TypeAlias = TokenEvent | ChoiceEnd | RequestEnd


@dataclass(frozen=True)
class Completion:
    """One choice, collected from its events."""

    text: str
    tokens: tuple[TokenEvent, ...]
    reason: FinishReason
    error: str | None = None


@dataclass(frozen=True)
class Limits:
    """How much an engine takes on at once."""

    slots: int = 32
    """Choices that are decoded together."""
    queue: int = 256
    """Choices that wait for a slot; a request with more than there is room for is `QueueFull`."""
    prefill_chunk: int = 256
    """Prompt tokens read in one piece; decoding goes on between two pieces."""
    prefill_tokens: int = 512
    """Prompt tokens read between two decoding steps at most (of one request always one piece)."""
    prefix_bytes: int = 256 * 1024 * 1024
    """Bytes of states kept for prompts that begin alike; 0: none."""

    def __post_init__(self) -> None:
        for name, low in (("slots", 1), ("queue", 0), ("prefill_chunk", 1), ("prefill_tokens", 1), ("prefix_bytes", 0)):
            value = getattr(self, name)
            if not (_is_whole(value) and value >= low):
                raise ConfigError(f"{name} must be a whole number of at least {low}; given {value!r}")


@dataclass(frozen=True)
class Stats:
    """An engine at one moment. Counters only grow."""

    slots: int
    active: int
    """Slots that decode."""
    prefilling: int
    """Slots whose prompt is being read."""
    waiting: int
    """Requests in the queue."""
    submitted: int
    finished: dict[FinishReason, int]
    """Choices by how they ended."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    steps: int
    """Decoding steps: model calls, each over all active slots."""
    tokens_per_second: float
    """Generated tokens per second over the last seconds."""
    state_bytes: int
    """Of the slots in use."""
    prefix_bytes: int
    prefix_entries: int
    prefix_hits: int


class ServingEngine(Protocol):
    """What a server needs; `Scheduler` is the one that ships. Every method may be called from any thread."""

    def submit(self, request: Request) -> Ticket:
        """Queue a request and return at once. ConfigError: it does not fit the model; QueueFull; EngineClosed."""
        ...

    def stats(self) -> Stats:
        """The engine now, for metrics."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """Why the engine stopped working by itself; None while it is well."""
        ...

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until those taken are done; False when `timeout` seconds did not suffice."""
        ...

    def close(self) -> None:
        """Cancel what still runs and stop; may be called twice."""
        ...
