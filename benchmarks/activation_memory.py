"""What recomputation saves of the memory that a training step holds, and what it costs in time.

Each size and mode in a process of its own: bytes that autograd keeps from forward to backward (every storage once,
weights left out) and growth of the process above the resting model over whole steps. Seconds per step in one process,
the modes taking turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import arguments, describe, set_threads, write_result
from fusiontree import HybridConfig, HybridLanguageModel
from fusiontree.eval.system.memory import peak_growth

MODES = ("none", "branches", "block")
SIZES = ("256x6x2x512", "512x6x2x1024", "768x4x1x2048")  # hidden × layers × rows × tokens


def config_of(hidden: int, layers: int, length: int) -> HybridConfig:
    """The default block with heads of 64, a quarter of them for keys."""
    heads = hidden // 64
    return HybridConfig(
        vocab_size=8192,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=length,
    )


def kept_bytes(model: HybridLanguageModel, ids: Tensor, positions: Tensor) -> int:
    """Bytes of all storages that a forward pass leaves for its backward, but for the weights' own."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, tuple[int, Tensor]] = {}  # the tensors too: a freed one's address would be given away again

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            seen.setdefault(storage.data_ptr(), (storage.nbytes(), t))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss(model, ids, positions)
    return sum(size for size, _ in seen.values())


def loss(model: HybridLanguageModel, ids: Tensor, positions: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result: Tensor = model(ids, position_ids=positions, labels=ids, skip_logits=True).loss
    return result


def prepared(size: str) -> tuple[HybridLanguageModel, Tensor, Tensor]:
    """A model that has been through a short step, so that gradients stand and libraries are loaded; ids; positions."""
    hidden, layers, rows, length = map(int, size.split("x"))
    torch.manual_seed(0)
    model = HybridLanguageModel(config_of(hidden, layers, length)).train()
    ids = torch.randint(8192, (rows, length))
    positions = (torch.arange(length) % (length // 3 + 1)).expand(rows, -1)  # three documents per row
    loss(model, ids[:, :64], positions[:, :64]).backward()
    return model, ids, positions


def recompute(model: HybridLanguageModel, mode: str) -> None:
    model.model.gradient_checkpointing = mode != "none"
    model.config.checkpointing = "branches" if mode == "none" else mode


def memory(size: str, mode: str) -> dict[str, int]:
    """Bytes kept, and growth of this process over two steps."""
    model, *batch = prepared(size)
    recompute(model, mode)
    kept = kept_bytes(model, *batch)
    with peak_growth(batch[0].device) as grown:
        for _ in range(2):
            loss(model, *batch).backward()
        return {"kept": kept, "growth": grown()}


def times(size: str, rounds: int) -> dict[str, list[float]]:
    """Seconds per step, the modes taking turns."""
    model, *batch = prepared(size)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(rounds + 1):
        for mode in MODES:
            recompute(model, mode)
            start = time.perf_counter()
            loss(model, *batch).backward()
            if turn:
                seconds[mode].append(time.perf_counter() - start)
    return seconds


def in_child(*arguments: str) -> Any:
    """What this script prints as JSON in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.activation_memory", "--threads", str(torch.get_num_threads())]
    done = subprocess.run([*command, "--child", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    print(" ".join(arguments), done.stdout.strip(), flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def summarise(size: str, found: dict[str, dict[str, int]], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One line per mode, with its saving and its time over `none`."""
    hidden, layers, rows, length = size.split("x")
    whole, medians = found["none"], {mode: statistics.median(values) for mode, values in seconds.items()}
    return [
        {
            "hidden": int(hidden),
            "layers": int(layers),
            "rows × tokens": f"{rows} × {length}",
            "recomputed": mode,
            "kept MB": result["kept"] / 1e6,
            "saved": f"{1 - result['kept'] / whole['kept']:.0%}",
            "peak growth MB": result["growth"] / 1e6,
            "saved of peak": f"{1 - result['growth'] / whole['growth']:.0%}",
            "s/step": medians[mode],
            "time / none": medians[mode] / medians["none"],
        }
        for mode, result in found.items()
    ]


def main() -> None:
    parser = arguments("activation_memory", __doc__)
    parser.add_argument(
        "--sizes", nargs="+", default=list(SIZES), metavar="HxLxBxT", help="hidden, layers, rows, tokens"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_threads(options.threads)
    if options.child:
        kind, size, what = options.child
        print(json.dumps(memory(size, what) if kind == "memory" else times(size, int(what))))
        return
    if options.quick:
        options.sizes, options.rounds = ["128x2x1x128"], 1
    machine = describe()
    rows, raw = [], {}
    for size in options.sizes:
        found = {mode: in_child("memory", size, mode) for mode in MODES}
        seconds = in_child("times", size, str(options.rounds))
        raw[size] = {"memory": found, "seconds": seconds}
        rows += summarise(size, found, seconds)
    remark = (
        "Kept: what autograd holds between forward and backward, every storage once, weights left out. Peak growth: of "
        "the process over whole steps, above the model with its gradients; it adds what stands while a step computes. "
        f"Packed rows, bf16 autocast, fp32 weights, no optimiser step; median of {options.rounds} steps."
    )
    write_result("activation_memory", machine, vars(options) | {"raw": raw}, {"rows": rows, "remarks": [remark]})


if __name__ == "__main__":
    main()
