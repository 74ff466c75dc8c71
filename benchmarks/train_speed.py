"""Training tokens per second: forward, backward and AdamW step, bf16 autocast, the models taking turns."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants import NAMES, Sizes, as_settings, build, sizes_from
from benchmarks.machine import arguments, describe, set_threads, write_result
from fusiontree import HybridLanguageModel
from fusiontree.models import compile_blocks


def training_step(model: Any) -> Callable[[Tensor], None]:
    """One optimiser step on a batch of ids (B, L), the way a plain PyTorch loop does it; ours, as its engine does,
    takes the loss without the logits."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()
    extra = {"skip_logits": True} if isinstance(model, HybridLanguageModel) else {}

    def step(ids: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False, **extra).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(models: dict[str, Any], batch: int, length: int, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds per step, `rounds` of each; every round runs each model once, in an order that rotates."""
    vocab = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(0)
    steps = {name: training_step(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for turn in range(-warmup, rounds):
        ids = torch.randint(vocab, (batch, length), generator=generator)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            steps[name](ids)
            elapsed = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(elapsed)
            label = "warm-up" if turn < 0 else f"round {turn + 1}/{rounds}"
            print(f"{label}: {name} {elapsed:.2f} s, {ids.numel() / elapsed:,.0f} tokens/s", flush=True)
    return seconds


def summarise(seconds: dict[str, list[float]], tokens: int, arm: str) -> list[dict[str, Any]]:
    """One row per model, with our rate over its rate."""
    rates = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "model": name,
            "mode": arm,
            "tokens/s (median)": rate,
            "slowest": tokens / max(seconds[name]),
            "fastest": tokens / min(seconds[name]),
            "ours / this": rates["fusiontree"] / rate if "fusiontree" in rates else "–",
        }
        for name, rate in rates.items()
    ]


def run_arm(options: argparse.Namespace, sizes: Sizes, arm: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Build fresh models, time them eager or compiled."""
    models = build(tuple(options.models), sizes)
    settings = as_settings(sizes, models)
    if arm == "compiled":
        for model in models.values():
            compile_blocks(model) if isinstance(model, HybridLanguageModel) else model.compile()
    seconds = measure(models, options.batch, options.length, options.rounds, options.warmup)
    return summarise(seconds, options.batch * options.length, arm), settings | {"seconds": seconds}


def main() -> None:
    parser = arguments("train_speed", __doc__)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="a second arm with torch.compile on every model")
    parser.add_argument("--falcon-chunk", type=int, default=Sizes.chunk_size, help="Falcon-H1's SSD chunk")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.length, options.rounds, options.warmup = 2, 64, 1, 1
    set_threads(options.threads)
    machine = describe()
    sizes = sizes_from(options)
    arms = ["eager", "compiled"] if options.compile else ["eager"]
    done = {arm: run_arm(options, sizes, arm) for arm in arms}
    rows = [row for arm_rows, _ in done.values() for row in arm_rows]
    settings = vars(options) | {"arms": {arm: details for arm, (_, details) in done.items()}}
    remark = f"Batch {options.batch} × {options.length}, bf16 autocast, fp32 weights, fused AdamW step included."
    write_result("train_speed", machine, settings, {"rows": rows, "remarks": [remark]})


if __name__ == "__main__":
    main()
