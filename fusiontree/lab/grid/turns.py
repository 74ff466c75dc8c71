"""How fast the trained models are and what memory a step takes, measured in turns: a slow moment hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from fusiontree.eval.subject import learned_positions
from fusiontree.eval.system import measure_speed, weight_bytes
from fusiontree.eval.system.memory import peak_growth, uncounted
from fusiontree.lab.grid.config import MeasureSection
from fusiontree.lab.grid.measure import AUTOCAST, Figures
from fusiontree.models import compile_blocks
from fusiontree.train.config import TrainingSection
from fusiontree.train.optim import Optimizers, build_optimizers

Show = Callable[[str], None]


def measure_turns(
    models: Mapping[str, Any], training: TrainingSection, settings: MeasureSection, show: Show
) -> dict[str, Figures]:
    """Name -> generation and training figures; the models are trained on noise at the end and of no use afterwards."""
    found: dict[str, Figures] = {name: {} for name in models}
    if settings.speed_repeats:
        for name, figures in _generation(models, settings, show).items():
            found[name].update(figures)
    if settings.step_repeats:
        for name, figures in _steps(models, training, settings.step_repeats, show).items():
            found[name].update(figures)
    return found


def _generation(models: Mapping[str, Any], settings: MeasureSection, show: Show) -> dict[str, Figures]:
    """Milliseconds per token of prefill and decode, at batch 1."""
    limits = [model.config.max_position_embeddings for model in models.values() if learned_positions(model)]
    prompt = min([settings.prompt_length, *(limit - settings.new_tokens for limit in limits)])
    new_tokens = settings.new_tokens
    if prompt < 1:  # a table of positions that ends before the answer would
        prompt, new_tokens = max(1, min(limits) // 2), max(2, min(limits) // 2)

    def told(name: str, turn: int) -> None:
        show(f"generation, {name}, {'warm-up' if turn < 0 else f'turn {turn + 1}'}")

    speeds = measure_speed(models, prompt, new_tokens, settings.speed_repeats, progress=told)
    return {
        name: {
            "prefill_ms_per_token": 1000 / speed.prefill_tokens_per_second,
            "decode_ms_per_token": 1000 / speed.decode_tokens_per_second,
            "prompt_length": prompt,
            "new_tokens": new_tokens,
            "decode_spread_ms": _spread([1000 * second / (new_tokens - 1) for second in speed.decode_seconds]),
        }
        for name, speed in speeds.items()
    }


def _spread(values: list[float]) -> list[float]:
    return [min(values), max(values)]


def _steps(models: Mapping[str, Any], training: TrainingSection, repeats: int, show: Show) -> dict[str, Figures]:
    """Whole training steps: forward, backward, clipping and update, in the precision of the run."""
    for model in models.values():
        model.train()
        if training.compile:
            compile_blocks(model)
    optimizers = {name: build_optimizers(model, training) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    memory: dict[str, int | None] = {}
    for turn in range(-1, repeats):
        for name, model in models.items():
            show(f"training step, {name}, {'warm-up' if turn < 0 else f'turn {turn + 1}'}")
            taken = _step(model, optimizers[name], training)
            if turn >= 0:
                seconds[name].append(taken)
    for name, model in models.items():
        memory[name] = _step_memory(model, optimizers[name], training)
    tokens = training.sequence_length * training.micro_batch_size * training.accumulation_steps
    return {
        name: {
            "step_ms": 1000 * statistics.median(times),
            "step_spread_ms": [1000 * value for value in _spread(times)],
            "tokens_per_second": tokens / statistics.median(times),
            "step_memory_bytes": memory[name],
        }
        for name, times in seconds.items()
    }


def _step(model: Any, optimizers: Optimizers, training: TrainingSection) -> float:
    """Seconds of one optimizer step on random tokens."""
    device = next(model.parameters()).device
    shape = (training.micro_batch_size, training.sequence_length)
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    dtype = AUTOCAST.get(training.precision)
    began = time.perf_counter()
    for _ in range(training.accumulation_steps):
        with torch.autocast(device.type, dtype) if dtype is not None else nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss
        (loss / training.accumulation_steps).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
    optimizers.step()
    optimizers.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _step_memory(model: Any, optimizers: Optimizers, training: TrainingSection) -> int | None:
    """Bytes at the peak of a step: weights and optimizer state, and what comes on top; None where nobody counts it."""
    device = next(model.parameters()).device
    if uncounted(device) is not None:
        return None
    with peak_growth(device) as grown:
        _step(model, optimizers, training)
        growth = grown()
    states = sum(tensor.nbytes for tensor in optimizers.state_tensors().values())
    return weight_bytes(model) + states + growth
