"""Prefill, time to first token and decoding, several models taking turns. Shapes: B rows, L tokens of prompt."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from fusiontree.errors import ConfigError
from fusiontree.eval.perplexity import evaluation_mode
from fusiontree.eval.subject import only_settings
from fusiontree.eval.system.holdings import cache_parts, weight_bytes


@dataclass(frozen=True)
class SpeedResult:
    """Medians over the repeats; percentiles over all tokens of all repeats but each first one.

    Rates in tokens per second over all rows, times in seconds; a token's latency is that of one step for all rows.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token: float
    token_latency_p50: float
    token_latency_p95: float
    token_latency_p99: float
    weight_bytes: int
    cache: dict[str, int]  # bytes at the end by part: kv, ssm, conv, other
    prompt_length: int
    batch_size: int
    new_tokens: int
    prefill_seconds: list[float] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)

    @property
    def cache_bytes(self) -> int:
        return sum(self.cache.values())


@dataclass(frozen=True)
class Timing:
    """One run of `generate`, in seconds, and the bytes of its cache at the end by part."""

    prefill: float
    first_token: float
    gaps: list[float]  # between one token and the next
    cache: dict[str, int]


def measure_speed(
    models: Mapping[str, Any],
    prompt_length: int,
    new_tokens: int,
    repeats: int = 5,
    *,
    batch_size: int = 1,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, SpeedResult]:
    """Greedy generation through `generate` on `batch_size` random prompts of the same length.

    The models take turns within each repeat, so a slow moment of the machine hits all of them. One unrecorded
    round warms up (`progress` is told the name and turn -1). No end token ends a row: every model produces exactly
    `new_tokens`.
    """
    if prompt_length < 1 or new_tokens < 2 or repeats < 1 or batch_size < 1:
        raise ConfigError(
            f"speed: prompt_length {prompt_length}, new_tokens {new_tokens}, repeats {repeats}, batch_size "
            f"{batch_size}: at least 1, 2, 1 and 1"
        )
    timings: dict[str, list[Timing]] = {name: [] for name in models}
    for turn in range(-1, repeats):
        for name, model in models.items():
            if progress is not None:
                progress(name, turn)
            timing = generate_once(model, random_prompt(model, batch_size, prompt_length, seed), new_tokens)
            if turn >= 0:
                timings[name].append(timing)
    return {name: _result(model, timings[name], (batch_size, prompt_length)) for name, model in models.items()}


def random_prompt(model: Any, batch_size: int, length: int, seed: int) -> Tensor:
    """Token ids (B, L) on the model's device."""
    draw = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (batch_size, length), generator=draw).to(next(model.parameters()).device)


def generate_once(model: Any, prompt: Tensor, new_tokens: int) -> Timing:
    """Write exactly `new_tokens` after prompt (B, L). Each token comes to the host, so a GPU's work is waited for."""
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        use_cache=True,
        return_dict_in_generate=True,
    )
    watch = _Stopwatch()
    with evaluation_mode(model), only_settings(model, settings), _first_forward(model) as prefill:
        start = _now(prompt.device)
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, streamer=watch
        )
        end = _now(prompt.device)
    arrivals = [*watch.times[1:-1], end]  # of the first put, the prompt; the last may come late
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    return Timing(prefill(), arrivals[0] - start, gaps, cache_parts(output.past_key_values))


class _Stopwatch:
    """A `generate` streamer that notes when each new token arrives; the first call carries the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


@contextlib.contextmanager
def _first_forward(model: Any) -> Iterator[Callable[[], float]]:
    """A function that tells how many seconds the model's first forward took."""
    device = next(model.parameters()).device
    marks: list[Any] = []

    def mark(*_: Any) -> None:
        if len(marks) < 2:
            marks.append(_mark(device))

    hooks = (model.register_forward_pre_hook(mark), model.register_forward_hook(mark))
    try:
        yield lambda: _between(marks[0], marks[1])
    finally:
        for hook in hooks:
            hook.remove()


def _mark(device: torch.device) -> Any:
    """A moment in the work of the device: on a GPU an event in its stream, elsewhere the time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _result(model: Any, timings: Sequence[Timing], shape: tuple[int, int]) -> SpeedResult:
    rows, length = shape
    gaps = sorted(gap for timing in timings for gap in timing.gaps)
    prefill, decode = [timing.prefill for timing in timings], [sum(timing.gaps) for timing in timings]
    first = [timing.first_token for timing in timings]
    steps = len(timings[0].gaps)
    return SpeedResult(
        prefill_tokens_per_second=rows * length / statistics.median(prefill),
        decode_tokens_per_second=rows * steps / statistics.median(decode),
        time_to_first_token=statistics.median(first),
        token_latency_p50=percentile(gaps, 50),
        token_latency_p95=percentile(gaps, 95),
        token_latency_p99=percentile(gaps, 99),
        weight_bytes=weight_bytes(model),
        cache=timings[-1].cache,
        prompt_length=length,
        batch_size=rows,
        new_tokens=steps + 1,
        prefill_seconds=prefill,
        first_token_seconds=first,
        decode_seconds=decode,
    )


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest of the values that `percent` % of them do not exceed."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]
