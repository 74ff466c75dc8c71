"""What recomputation saves of the memory that a training step holds, and what it costs in time.

Each size and mode in a process of its own: bytes that autograd keeps from forward to backward (every storage once,
weights left out), growth of the process above the resting model over whole steps, and seconds per step.
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

from benchmarks.length_scaling import reset_peak, resident
from benchmarks.machine import arguments, describe, set_threads, write_result
from fusiontree import HybridConfig, HybridLanguageModel

MODES = ("none", "branches", "block")
SIZES = ("256x6x2x512", "512x6x2x1024", "768x6x1x2048")  # hidden × layers × rows × tokens


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


def child(size: str, mode: str, rounds: int) -> dict[str, Any]:
    """One size and mode: bytes kept, growth of the process, seconds of each step."""
    hidden, layers, rows, length = map(int, size.split("x"))
    torch.manual_seed(0)
    model = HybridLanguageModel(config_of(hidden, layers, length)).train()
    model.model.gradient_checkpointing = mode != "none"
    model.config.checkpointing = "branches" if mode == "none" else mode
    ids = torch.randint(8192, (rows, length))
    positions = (torch.arange(length) % (length // 3 + 1)).expand(rows, -1)  # three documents per row
    loss(model, ids[:, :64], positions[:, :64]).backward()  # gradients stand, libraries are loaded
    kept = kept_bytes(model, ids, positions)
    rest = resident("VmRSS")
    reset_peak()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        loss(model, ids, positions).backward()
        seconds.append(time.perf_counter() - start)
    return {"kept": kept, "growth": resident("VmHWM") - rest, "seconds": seconds}


def measure(size: str, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """`child` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.activation_memory", "--child", size, mode]
    command += ["--rounds", str(options.rounds), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{size} {mode} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{size} {mode}: {result['kept'] / 1e6:,.0f} MB kept, {statistics.median(result['seconds']):.2f} s", flush=True
    )
    return result


def summarise(size: str, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per mode, with its saving and its time over `none`."""
    hidden, layers, rows, length = size.split("x")
    whole, seconds = found["none"], {mode: statistics.median(result["seconds"]) for mode, result in found.items()}
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
            "s/step": seconds[mode],
            "time / none": seconds[mode] / seconds["none"],
        }
        for mode, result in found.items()
    ]


def main() -> None:
    parser = arguments("activation_memory", __doc__)
    parser.add_argument(
        "--sizes", nargs="+", default=list(SIZES), metavar="HxLxBxT", help="hidden, layers, rows, tokens"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_threads(options.threads)
    if options.child:
        print(json.dumps(child(*options.child, options.rounds)))
        return
    if options.quick:
        options.sizes, options.rounds = ["128x2x1x128"], 1
    machine = describe()
    rows, raw = [], {}
    for size in options.sizes:
        raw[size] = {mode: measure(size, mode, options) for mode in MODES}
        rows += summarise(size, raw[size])
    remark = (
        "Kept: what autograd holds between forward and backward, every storage once, weights left out. Peak growth: of "
        "the process over whole steps, above the model with its gradients; it adds what stands while a step computes. "
        f"Packed rows, bf16 autocast, fp32 weights, no optimiser step; median of {options.rounds} steps."
    )
    write_result("activation_memory", machine, vars(options) | {"raw": raw}, {"rows": rows, "remarks": [remark]})


if __name__ == "__main__":
    main()
