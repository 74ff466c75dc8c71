"""How much work fits into the time given, on the machine at hand: a few steps are timed, the rest is arithmetic."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from fusiontree.train import RunConfig
from fusiontree.train.build import build_model, choose_device

TRAINING, HEALING, PRUNING = 0.55, 0.10, 0.08  # shares of the time; the rest is tokenizer, tables, samples, report
HEALING_COST = 1.4  # of a training step: the teacher's forward pass comes on top
FORWARD_COST = 1 / 3
OVERHEAD = 1.15  # optimizer, logging and saving, over forward and backward
TIMED_STEPS = 3


@dataclass(frozen=True)
class Pace:
    """What fits: optimizer steps of training and healing, batches per measured removal, and the faster precision."""

    steps: int
    healing_steps: int
    measured_batches: int
    precision: str


def find_pace(config: RunConfig, seconds: float) -> Pace:
    """Time both precisions on a throw-away model of `config` (vocabulary given) and share out `seconds`."""
    model = build_model(config).to(choose_device(config.system.device)).train()
    times = {name: _seconds_per_step(model, config, name) for name in ("bf16", "fp32")}
    precision = min(times, key=lambda name: times[name])
    step = times[precision] * OVERHEAD
    removals = 4 * model.config.num_hidden_layers + 1  # each branch alone, then about as often jointly
    return Pace(
        steps=max(20, int(TRAINING * seconds / step)),
        healing_steps=max(5, int(HEALING * seconds / (step * HEALING_COST))),
        measured_batches=min(32, max(1, int(PRUNING * seconds / (removals * step * FORWARD_COST)))),
        precision=precision,
    )


def _seconds_per_step(model: Any, config: RunConfig, precision: str) -> float:
    """Median seconds of forward and backward over one batch; the first run, which warms up, does not count."""
    shape = (config.training.micro_batch_size, config.training.sequence_length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
    times = []
    for _ in range(1 + TIMED_STEPS):
        began = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(tokens, labels=tokens, output_gates=True).loss
        loss.backward()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]) * config.training.accumulation_steps
