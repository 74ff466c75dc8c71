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


@dataclass(frozen=True)
class Pace:
    """What fits: optimizer steps of training and healing, batches per measured removal, and the faster precision."""

    steps: int
    healing_steps: int
    measured_batches: int
    precision: str


def find_pace(config: RunConfig, seconds: float) -> Pace:
    """Time a throw-away model of `config` (vocabulary given) in the faster precision, and share out `seconds`."""
    settings = config.training
    model = build_model(config).to(choose_device(config.system.device)).train()
    rows = max(1, settings.micro_batch_size // 4)  # a quarter of a step is enough to see which precision is faster
    trials = {name: _seconds(model, rows, settings.sequence_length, name, repeats=1) for name in ("bf16", "fp32")}
    precision = min(trials, key=lambda name: trials[name])
    batch = _seconds(model, settings.micro_batch_size, settings.sequence_length, precision, repeats=2)
    step = batch * settings.accumulation_steps * OVERHEAD
    # Each branch alone, then about as often jointly, then a trade in each layer.
    removals = 5 * model.config.num_hidden_layers + 1
    return Pace(
        steps=max(20, int(TRAINING * seconds / step)),
        healing_steps=max(5, int(HEALING * seconds / (step * HEALING_COST))),
        measured_batches=min(32, max(2, int(PRUNING * seconds / (removals * step * FORWARD_COST)))),
        precision=precision,
    )


def _seconds(model: Any, rows: int, length: int, precision: str, repeats: int) -> float:
    """Mean seconds of forward and backward over rows × length tokens; the first run, which warms up, does not count."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (rows, length), generator=generator).to(model.device)
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(tokens, labels=tokens, output_gates=True).loss
        loss.backward()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - began)
    return statistics.fmean(times[1:])
