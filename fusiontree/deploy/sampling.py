"""From logits to the next token: checked options, and a draw that depends only on a row's own logits and its seed.

Shapes: B rows, V vocabulary.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict

from fusiontree.errors import ConfigError

MAX_STOPS = 16
MAX_STOP_LENGTH = 200
NOT_FINITE = "the model's output is not finite; its weights are damaged or its dtype overflows"
_CANDIDATES = 256  # most probable tokens among which a nucleus is looked for before all are sorted


class Options(TypedDict, total=False):
    """Keyword arguments of every generating method; see `GenerationOptions` for their meaning and defaults."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
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
    presence_penalty: float = 0.0
    """Taken from the logit of every token that was generated already."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it was generated already."""
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
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), (int, float), getattr(self, name), "a number from -2 to 2", -2, 2)
        if self.seed is not None:
            _check("seed", self.seed, int, self.seed, "a whole number of at least 0", 0)
        stops = self.stops
        if len(stops) > MAX_STOPS or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops):
            raise ConfigError(f"stop must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters")

    @property
    def penalises(self) -> bool:
        """Whether the text so far changes the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

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


class Draw(NamedTuple):
    """What decides the next token of one row besides its logits."""

    ids: Sequence[int]
    """The text so far."""
    prompt: int
    """How many of `ids` were not generated."""
    options: GenerationOptions
    seed: int


def next_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """The next token of each row of logits (B, V), None where they are not finite.

    A row's token does not depend on the other rows; the same seed and position always draw the same number.
    """
    scores = logits.float()
    finite = torch.isfinite(scores.amax(dim=1)).tolist()
    if penalised := [row for row, draw in enumerate(draws) if draw.options.penalises]:
        scores = scores.clone()
        for row in penalised:
            _penalise(scores[row], draws[row])
    tokens = scores.argmax(dim=1)
    if drawn := [row for row, draw in enumerate(draws) if draw.options.temperature > 0 and finite[row]]:
        rows = torch.tensor(drawn, device=scores.device)
        tokens[rows] = _draw(scores[rows], [draws[row] for row in drawn])
    return [token if good else None for token, good in zip(tokens.tolist(), finite, strict=True)]


def _penalise(scores: Tensor, draw: Draw) -> None:
    """Change one row's scores (V,) in place."""
    options = draw.options
    if options.repetition_penalty != 1:
        ids = torch.tensor(draw.ids, device=scores.device)
        seen = scores[ids]
        scores[ids] = torch.where(seen < 0, seen * options.repetition_penalty, seen / options.repetition_penalty)
    if options.presence_penalty or options.frequency_penalty:
        generated = torch.tensor(draw.ids[draw.prompt :], dtype=torch.long, device=scores.device)
        count = torch.bincount(generated, minlength=len(scores)).to(scores.dtype)
        scores -= options.presence_penalty * (count > 0) + options.frequency_penalty * count


def _draw(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """One token per row (B,) by the inverse of its cumulative distribution, in the order of ids."""

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=scores.device)[:, None]

    # A temperature next to 0 must not make the division overflow.
    scores = (scores - scores.amax(1, keepdim=True)) / column([max(draw.options.temperature, 1e-6) for draw in draws])
    if limited := [row for row, draw in enumerate(draws) if draw.options.top_k or draw.options.top_p < 1]:
        some = scores[limited]
        lowest = _lowest(some, [draws[row].options for row in limited])
        scores[limited] = some.masked_fill(some < lowest[:, None], -math.inf)
    weights = scores.exp()
    cumulative = weights.double().cumsum(1)
    point = column([uniform(draw.seed, len(draw.ids)) for draw in draws], torch.float64) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, point, right=True)[:, 0]
    # Rounding must not step past the last token that may be drawn.
    last = scores.shape[1] - 1 - (weights.flip(1) > 0).int().argmax(1)
    return torch.minimum(drawn, last)


def _lowest(scores: Tensor, options: Sequence[GenerationOptions]) -> Tensor:
    """Per row of scores (B, V) the lowest that may be drawn; ties with it may be drawn too."""
    size, device = scores.shape[1], scores.device
    top_k = torch.tensor([min(o.top_k or size, size) for o in options], device=device)
    share = torch.tensor([float(o.top_p) for o in options], dtype=torch.float64, device=device)
    count = min(size, max(_CANDIDATES, *(o.top_k for o in options)))
    best = scores.topk(count).values
    lowest = best.gather(1, (top_k.clamp_max(count) - 1)[:, None])[:, 0]
    lowest = torch.where(top_k < size, lowest, -math.inf)
    # Sums run from left to right, so that they do not depend on the number of rows.
    allowed = torch.where(scores >= lowest[:, None], scores, -math.inf).exp().double().cumsum(1)
    enough = share * allowed[:, -1]
    return torch.where(share < 1, torch.maximum(lowest, _nucleus(scores, enough)), lowest)


def _nucleus(scores: Tensor, enough: Tensor) -> Tensor:
    """Per row of scores (B, V) the highest such that those from it up add up to `enough` (B,)."""
    size, lowest = scores.shape[1], scores.amin(1)
    rows = torch.arange(len(scores), device=scores.device)
    for count in (_CANDIDATES, 16 * _CANDIDATES, size):
        ordered = scores[rows].topk(min(count, size)).values
        cumulative = ordered.exp().double().cumsum(1)
        place = torch.searchsorted(cumulative, enough[rows, None])
        found = place[:, 0] < ordered.shape[1]
        lowest[rows[found]] = ordered[found].gather(1, place[found])[:, 0]
        rows = rows[~found]
        if not len(rows):
            break
    return lowest


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a hash of seed and position: no generator state to keep, save or fork."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
