"""Training steps of FusionTree, eager and compiled block by block, taking turns: bf16 autocast, AdamW included."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants import Sizes, as_settings, build, sizes_from
from benchmarks.machine import arguments, describe, set_threads, write_result
from fusiontree import HybridLanguageModel
from fusiontree.models import compile_blocks

ARMS = ("eager", "compiled")
ROWS = ("packed", "whole")
Step = Callable[[int], float]


def documents(batch: int, length: int, seed: int) -> Tensor:
    """Position ids (B, L) of four documents per row, cut anywhere, as packing leaves them."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(1, length, (batch, 3), generator=generator)
    begins = torch.zeros(batch, length, dtype=torch.long).scatter_(1, cuts, cuts).cummax(dim=1).values
    return torch.arange(length) - begins


def training_step(model: HybridLanguageModel, batch: int, length: int, packed: bool) -> Step:
    """Seconds of one optimiser step on the tokens and documents of a seed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
        positions = documents(batch, length, seed) if packed else None
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, position_ids=positions, labels=ids, skip_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step


def measure(models: dict[str, HybridLanguageModel], batch: int, length: int, packed: bool, rounds: int) -> dict:
    """Per arm: seconds of the first step (compilation included) and of `rounds` more after a second."""
    steps = {name: training_step(model, batch, length, packed) for name, model in models.items()}
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for name, step in steps.items():
        first[name] = step(0)
        step(1)
        print(f"{'packed' if packed else 'whole'}: first step {name} {first[name]:.1f} s", flush=True)
    for turn in range(rounds):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            seconds[name].append(steps[name](turn + 2))
        print(f"round {turn + 1}/{rounds}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()), flush=True)
    return {"first": first, "seconds": seconds}


def summarise(found: dict[str, Any], tokens: int, rows: str) -> list[dict[str, Any]]:
    """One line per arm, with its rate over the eager one."""
    rates = {name: tokens / statistics.median(values) for name, values in found["seconds"].items()}
    return [
        {
            "rows": rows,
            "mode": name,
            "tokens/s (median)": rate,
            "slowest": tokens / max(found["seconds"][name]),
            "fastest": tokens / min(found["seconds"][name]),
            "this / eager": rate / rates["eager"],
            "first step s": found["first"][name],
        }
        for name, rate in rates.items()
    ]


def pair(sizes: Sizes) -> dict[str, HybridLanguageModel]:
    """Two models of equal weights, one of them compiled."""
    models = {name: build(("fusiontree",), sizes)["fusiontree"] for name in ARMS}
    compile_blocks(models["compiled"])
    return models


def main() -> None:
    parser = arguments("compile_speed", __doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="several documents per row, or one")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.length, options.rounds, options.rows = 2, 64, 1, ["packed"]
    set_threads(options.threads)
    machine, sizes = describe(), sizes_from(options)
    rows, raw = [], {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # or what is compiled today would cost nothing tomorrow
        for kind in options.rows:
            models = pair(sizes)
            raw[kind] = measure(models, options.batch, options.length, kind == "packed", options.rounds)
            rows += summarise(raw[kind], options.batch * options.length, kind)
    remark = (
        f"Batch {options.batch} × {options.length}, bf16 autocast, fp32 weights, fused AdamW step included. Packed "
        "rows hold four documents each. The first step includes compiling, with nothing in the compiler's cache."
    )
    settings = vars(options) | as_settings(sizes, models) | {"raw": raw}
    write_result("compile_speed", machine, settings, {"rows": rows, "remarks": [remark]})


if __name__ == "__main__":
    main()
