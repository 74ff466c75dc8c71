"""How fast a causal language model runs and how many bytes it holds, several models side by side."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusiontree.errors import ConfigError
from fusiontree.eval.perplexity import evaluation_mode


@dataclass(frozen=True)
class SpeedResult:
    """Medians over the repeats, at batch size 1. Rates in tokens per second, times in seconds."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token: float
    token_latency_p50: float
    token_latency_p95: float
    weight_bytes: int
    cache_bytes: int
    prompt_length: int
    new_tokens: int
    prefill_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)


@dataclass
class _Samples:
    prefill: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    token_gaps: list[float] = field(default_factory=list)
    cache_bytes: int = 0


class _Stopwatch:
    """A `generate` streamer that notes when each new token arrives; the first call carries the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def measure_speed(
    models: Mapping[str, Any],
    prompt_length: int,
    new_tokens: int,
    repeats: int = 5,
    *,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, SpeedResult]:
    """Prefill, time to first token and greedy decoding through `generate`, batch 1, on a random prompt.

    The models take turns within each repeat, so a slow moment of the machine hits all of them. One unrecorded
    round warms up. End tokens are suppressed: every model produces exactly `new_tokens`.
    """
    if prompt_length < 1 or new_tokens < 2 or repeats < 1:
        raise ConfigError(
            f"speed: prompt_length {prompt_length}, new_tokens {new_tokens}, repeats {repeats}: at least 1, 2 and 1"
        )
    smallest = min(model.config.vocab_size for model in models.values())
    prompt = torch.randint(smallest, (1, prompt_length), generator=torch.Generator().manual_seed(seed))
    samples = {name: _Samples() for name in models}
    for turn in range(-1, repeats):
        for name, model in models.items():
            if progress is not None:
                progress(name, turn)
            _measure_once(model, prompt, new_tokens, _Samples() if turn < 0 else samples[name])
    return {name: _result(models[name], samples[name], prompt_length, new_tokens) for name in models}


def _measure_once(model: Any, prompt: Tensor, new_tokens: int, samples: _Samples) -> None:
    device = next(model.parameters()).device
    prompt = prompt.to(device)
    with evaluation_mode(model):
        start = _now(device)
        model(prompt, use_cache=True, logits_to_keep=1)
        samples.prefill.append(_now(device) - start)
        watch = _Stopwatch()
        start = _now(device)
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            return_dict_in_generate=True,
            streamer=watch,
        )
        end = _now(device)
    arrivals = [*watch.times[1:-1], end]
    samples.first_token.append(arrivals[0] - start)
    samples.decode.append(end - arrivals[0])
    samples.token_gaps += [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    samples.cache_bytes = cache_bytes(output.past_key_values)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _result(model: nn.Module, samples: _Samples, prompt_length: int, new_tokens: int) -> SpeedResult:
    gaps = sorted(samples.token_gaps)
    return SpeedResult(
        prefill_tokens_per_second=prompt_length / statistics.median(samples.prefill),
        decode_tokens_per_second=(new_tokens - 1) / statistics.median(samples.decode),
        time_to_first_token=statistics.median(samples.first_token),
        token_latency_p50=statistics.median(gaps),
        token_latency_p95=gaps[min(len(gaps) - 1, int(0.95 * len(gaps)))],
        weight_bytes=weight_bytes(model),
        cache_bytes=samples.cache_bytes,
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        prefill_seconds=samples.prefill,
        decode_seconds=samples.decode,
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters in memory, tied ones once (`parameters()` yields each tensor once)."""
    return sum(parameter.nbytes for parameter in model.parameters())


def cache_bytes(cache: Any) -> int:
    """Bytes of memory that a generation cache keeps alive: the storages of all its tensors, shared ones once."""
    storages: dict[int, int] = {}
    _collect_storages(cache, storages, set())
    return sum(storages.values())


def _collect_storages(item: Any, storages: dict[int, int], seen: set[int]) -> None:
    if isinstance(item, Tensor):
        storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        return
    if id(item) in seen or isinstance(item, (str, bytes, int, float, type, nn.Module)):
        return
    seen.add(id(item))
    children = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else None
    for child in children if children is not None else getattr(item, "__dict__", {}).values():
        _collect_storages(child, storages, seen)
