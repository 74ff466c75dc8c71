"""Perplexity and bits per byte by how much text the model sees, and by where in it a token stands.

By length, here L = 8 and stride S = 4: windows in which L tokens go in (·) and the last S predictions are scored (x).
The same tokens are scored at every length, each once, and each sees at least L - S + 1 tokens:

    · · · · ·                   the first token that is scored sees 5
              x x x x
            · · · · ·
                      x x x x

By position, disjoint windows of the longest length: each token is scored once and counted by how many it saw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.registry import Family
from fusiontree.eval.subject import Pair, Subject
from fusiontree.eval.task import Progress, TaskSettings
from fusiontree.eval.tasks.options import whole_number
from fusiontree.eval.tasks.streams import Stream, read_streams

USUAL_LENGTHS = tuple(1024 << power for power in range(7))  # 1K … 64K
FIRST_EDGE = 16


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) of a stream, predicted from the `context` tokens before them and from each other."""

    stream: int
    begin: int
    end: int
    context: int


@dataclass(frozen=True)
class Plan:
    """What is scored: targets from `first` on in each stream, up to `last` (exclusive) in it."""

    streams: list[Stream]
    lengths: tuple[int, ...]
    given_stride: int | None
    lasts: list[int]

    @property
    def longest(self) -> int:
        return self.lengths[-1]

    @property
    def first(self) -> int:
        """The first token with enough before it for the longest length."""
        return self.longest - self.stride(self.longest) + 1

    @property
    def edges(self) -> list[int]:
        """Where buckets of tokens seen begin, and one past the last."""
        inner = [FIRST_EDGE << power for power in range(32) if FIRST_EDGE << power < self.longest]
        return [1, *inner, self.longest + 1]

    def stride(self, length: int) -> int:
        return min(self.given_stride or max(1, length // 2), length)

    def windows(self, length: int) -> Iterator[Window]:
        """Every target once, each seeing at least `length - stride + 1` tokens."""
        for number, last in enumerate(self.lasts):
            for begin in range(self.first, last, self.stride(length)):
                end = min(begin + self.stride(length), last)
                yield Window(number, begin, end, min(begin, length - (end - begin) + 1))

    def disjoint(self) -> Iterator[Window]:
        """The whole text in windows of the longest length."""
        for number, last in enumerate(self.lasts):
            for begin in range(0, last - 1, self.longest):
                yield Window(number, begin + 1, min(begin + self.longest + 1, last), 1)


class ContextPerplexity:
    """The task `perplexity`."""

    name = "perplexity"
    version = 1
    main_metric = "perplexity"

    def measure(self, subject: Subject, settings: TaskSettings, progress: Progress) -> dict[str, Any]:
        """Tables `by_length` and `by_position`; the metrics without a length are those of the longest.

        DataError when no text is long enough.
        """
        plan = make_plan(subject, settings)
        kinds: list[tuple[str, list[Window]]] = [(f"length {n}", list(plan.windows(n))) for n in plan.lengths]
        kinds.append(("position", list(plan.disjoint())))
        found: dict[str, list[dict[str, Any]]] = {}
        total, done = sum(len(windows) for _, windows in kinds), 0
        for kind, windows in kinds:
            edges = plan.edges if kind == "position" else [1, plan.longest + 1]
            found[kind] = []
            for start in range(0, len(windows), subject.batch_size):
                batch = windows[start : start + subject.batch_size]
                key = f"{kind}, stream {batch[0].stream}, token {batch[0].begin}"
                found[kind] += progress.once(key, partial(score, subject, plan, batch, edges))
                done += len(batch)
                progress(done, total)
        return _found(plan, found)


def make_plan(subject: Subject, settings: TaskSettings) -> Plan:
    """Reads as much of the text as is needed. ConfigError and DataError for what cannot be done."""
    lengths = tuple(sorted(set(settings.lengths)))
    if lengths and lengths[0] < 2:
        raise ConfigError(f"--lengths {lengths[0]}: at least 2 tokens")
    stride = whole_number(settings, "stride", 0) or None
    allowed = lengths or tuple(n for n in USUAL_LENGTHS if n <= subject.max_length) or (subject.max_length,)
    enough = None
    if settings.limit is not None:
        enough = allowed[-1] + 1 + (settings.limit - 1) * min(stride or allowed[-1] // 2 or 1, allowed[-1])
    streams = read_streams(subject, settings, allowed, enough)
    most = max(len(stream.ids) for stream in streams)
    fitting = tuple(n for n in allowed if n < most)
    if not fitting or (lengths and fitting != lengths):
        needs = allowed[-1] if lengths else allowed[0]
        raise DataError(
            f"{settings.data}: the longest stretch of text has {most} tokens; length {needs} needs {needs + 1}: give "
            "more text or smaller --lengths"
        )
    plan = Plan([stream for stream in streams if len(stream.ids) > fitting[-1]], fitting, stride, [])
    left = settings.limit if settings.limit is not None else math.inf
    for stream in plan.streams:
        room = len(stream.ids) - plan.first
        blocks = min(left, math.ceil(room / plan.stride(plan.longest)))
        left -= blocks
        plan.lasts.append(min(len(stream.ids), plan.first + int(blocks) * plan.stride(plan.longest)) if blocks else 0)
    return plan


def score(subject: Subject, plan: Plan, windows: Sequence[Window], edges: Sequence[int]) -> list[dict[str, Any]]:
    """Per window: nats, tokens and bytes, as a list over buckets of tokens seen."""
    pairs = [_pair(subject, plan.streams[window.stream], window) for window in windows]
    rows = []
    for window, (scores, _) in zip(windows, subject.score(pairs), strict=True):
        stream = plan.streams[window.stream]
        places = np.arange(window.begin, window.end)
        seen = places - (window.begin - window.context)
        bucket = np.searchsorted(edges, seen, side="right") - 1
        values = {
            "nats": np.where(stream.is_text[places], -scores.double().numpy(), 0.0),
            "tokens": stream.is_text[places].astype(float),
            "bytes": (stream.byte_ends[places] - stream.byte_ends[places - 1]).astype(float),
        }
        sums = {key: np.bincount(bucket, each, minlength=len(edges) - 1).tolist() for key, each in values.items()}
        rows.append({"stream": window.stream, "begin": window.begin, **sums})
    return rows


def _pair(subject: Subject, stream: Stream, window: Window) -> Pair:
    context = stream.ids[window.begin - window.context : window.begin].tolist()
    lead = subject.text.encode("", special=True)
    # A model that was always given a BOS is given one: in place of the token furthest away.
    return [*lead[:1], *context[1:]] if lead else context, stream.ids[window.begin : window.end].tolist()


def _found(plan: Plan, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    rows = []
    for length in plan.lengths:
        stride = plan.stride(length)
        head = {"length": length, "stride": stride, "sees_at_least": length - stride + 1}
        rows.append({**head, **_numbers(found[f"length {length}"], 0), "windows": len(found[f"length {length}"])})
    positions = [
        {"from": begin, "to": end - 1, **_numbers(found["position"], bucket)}
        for bucket, (begin, end) in enumerate(zip(plan.edges, plan.edges[1:], strict=False))
    ]
    metrics: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for suffix, row in [("", rows[-1]), *((f"@{row['length']}", row) for row in rows)]:
        for name in ("perplexity", "bits_per_byte"):
            metrics[name + suffix] = row[name]
            errors[name + suffix] = row[f"{name}_error"]
    samples = [
        {"length": n, **each, **{key: each[key][0] for key in ("nats", "tokens", "bytes")}}
        for n in plan.lengths
        for each in found[f"length {n}"]
    ]
    tables = {"by_length": rows, "by_position": [row for row in positions if row["tokens"]]}
    return {"metrics": metrics, "errors": errors, "tables": tables, "samples": samples}


def _numbers(windows: Sequence[Mapping[str, Any]], bucket: int) -> dict[str, Any]:
    """Loss in nats per token and what follows from it; errors from the spread over windows."""
    nats, tokens, size = (np.array([each[key][bucket] for each in windows]) for key in ("nats", "tokens", "bytes"))
    if not tokens.sum():
        return {"tokens": 0}
    loss, error = _ratio(nats, tokens)
    bits, bits_error = _ratio(nats / math.log(2), size)
    perplexity = math.exp(min(loss, 700.0))  # exp overflows a double past 709
    return {
        "loss": loss,
        "perplexity": perplexity,
        "bits_per_byte": bits,
        "loss_error": error,
        "perplexity_error": perplexity * error,
        "bits_per_byte_error": bits_error,
        "tokens": int(tokens.sum()),
        "bytes": int(size.sum()),
    }


def _ratio(above: Any, below: Any) -> tuple[float, float]:
    """Sum over sum, and its standard error (delta method, windows as the independent units; NaN for a single one)."""
    if not below.sum():
        return math.nan, math.nan
    ratio, count = above.sum() / below.sum(), len(above)
    if count < 2:
        return float(ratio), math.nan
    rest = above - ratio * below
    return float(ratio), float(np.sqrt(count / (count - 1) * np.square(rest).sum()) / below.sum())


FAMILY = Family(
    "perplexity",
    "perplexity and bits per byte of text files (--data), by context length and by position",
    lambda _: ContextPerplexity(),
    reads=("limit", "lengths", "data"),
    options={
        "stride": "tokens scored per window; left out: half of each length",
        "documents": "joined (one stream, divided by the end token; the default) or apart (no window across two)",
        "field": "key of a JSONL file's text; left out: text",
    },
)
