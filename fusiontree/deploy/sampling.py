"""From logits to the next token: checked options, and a draw that depends only on seed and position."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from typing_extensions import TypedDict

from fusiontree.errors import CheckpointError, ConfigError

MAX_STOPS = 16
MAX_STOP_LENGTH = 200


class Options(TypedDict, total=False):
    """Keyword arguments of every generating method; see `GenerationOptions` for their meaning and defaults."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate; impossible values are a ConfigError that names the field and what is allowed."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the most probable token every time."""
    top_k: int = 0
    """Draw among this many tokens; 0 = all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that hold this much probability together."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that are already in the text less likely."""
    seed: int | None = None
    """None: 0 for a new text; a session goes on with its own."""
    stop: str | Sequence[str] = ()
    """The text ends before the first of these strings."""

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, int, self.max_new_tokens, "a whole number of at least 1", 1)
        _check("temperature", self.temperature, (int, float), self.temperature, "a number from 0 to 100", 0, 100)
        _check("top_k", self.top_k, int, self.top_k, "a whole number of at least 0", 0)
        _check("top_p", self.top_p, (int, float), self.top_p or -1, "a number above 0 and at most 1", 0, 1)
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            (int, float),
            self.repetition_penalty or -1,
            "a number above 0 and at most 100",
            0,
            100,
        )
        if self.seed is not None:
            _check("seed", self.seed, int, self.seed, "a whole number of at least 0", 0)
        stops = self.stops
        if len(stops) > MAX_STOPS or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops):
            raise ConfigError(f"stop must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _check(
    name: str,
    given: object,
    kind: type | tuple[type, ...],
    value: float,
    allowed: str,
    low: float,
    high: float = math.inf,
) -> None:
    right_type = isinstance(given, kind) and not isinstance(given, bool)
    if not (right_type and low <= value <= high and math.isfinite(value)):
        raise ConfigError(f"{name} must be {allowed}; given {given!r}")


def next_token(logits: Tensor, text_ids: Sequence[int], options: GenerationOptions, seed: int) -> int:
    """The token after `text_ids` for one row's logits (V,); the same seed and position always draw the same number."""
    scores = logits.float().cpu()[None]
    if not bool(torch.isfinite(scores.amax())):
        raise CheckpointError("the model's output is not finite; its weights are damaged or its dtype overflows")
    if options.repetition_penalty != 1.0:
        ids = torch.tensor([list(text_ids)])
        seen = scores.gather(1, ids)
        penalised = torch.where(seen < 0, seen * options.repetition_penalty, seen / options.repetition_penalty)
        scores = scores.scatter(1, ids, penalised)
    if options.temperature == 0:
        return int(scores.argmax())
    unread = torch.empty(1, 0, dtype=torch.long)  # these warpers look at the scores only
    scores = TemperatureLogitsWarper(float(options.temperature))(unread, scores)
    if options.top_k:
        scores = TopKLogitsWarper(options.top_k)(unread, scores)
    if options.top_p < 1:
        scores = TopPLogitsWarper(float(options.top_p))(unread, scores)
    cumulative = scores[0].double().softmax(-1).cumsum(-1)
    drawn = int(torch.searchsorted(cumulative, uniform(seed, len(text_ids)) * float(cumulative[-1]), right=True))
    return min(drawn, int(torch.nonzero(scores[0] > -math.inf).max()))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a hash of seed and position: no generator state to keep, save or fork."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
