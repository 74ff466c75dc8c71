"""Time and peak memory of a prefill from 1K to 32K tokens, each length in a process of its own.

With local heads and the state space branch only, both should grow linearly; one global head adds a quadratic part to
the time, and its keys and values to the memory.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.contestants import our_config, sizes_from
from benchmarks.machine import arguments, describe, set_threads, write_result
from fusiontree.eval.system.memory import peak_growth


def child(options: argparse.Namespace) -> None:
    """Measure one length and print JSON: seconds (median) and peak bytes above the resting model."""
    from fusiontree import HybridLanguageModel

    sizes = sizes_from(options)
    torch.manual_seed(0)
    config = our_config(sizes, global_heads=options.global_heads, max_position_embeddings=max(options.lengths))
    model = HybridLanguageModel(config).to(torch.bfloat16).eval()
    ids = torch.randint(sizes.vocab_size, (1, options.child), generator=torch.Generator().manual_seed(0))
    seconds = []
    with torch.no_grad():
        model(ids[:, :128], use_cache=True, logits_to_keep=1)  # libraries and kernels load on the first call
        with peak_growth(ids.device) as grown:
            for _ in range(options.rounds):
                start = time.perf_counter()
                model(ids, use_cache=True, logits_to_keep=1)
                seconds.append(time.perf_counter() - start)
            peak = grown()
    print(json.dumps({"seconds": statistics.median(seconds), "peak_bytes": peak, "raw": seconds}))


def measure(length: int, global_heads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run `child` for one length in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.length_scaling", "--child", str(length)]
    command += ["--global-heads", str(global_heads), "--rounds", str(options.rounds)]
    command += ["--threads", str(torch.get_num_threads()), "--lengths", *map(str, options.lengths)]
    command += ["--quick"] * options.quick + (["--set", *options.set] if options.set else [])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"length {length}, {global_heads} global heads failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    rate, peak = length / result["seconds"], result["peak_bytes"] / 1e6
    print(f"{global_heads} global heads, {length:>6} tokens: {rate:,.0f} tokens/s, {peak:,.0f} MB", flush=True)
    return result


def exponent(lengths: list[int], values: list[float]) -> float:
    """The slope over the longer half in log-log: 1 is linear, 2 quadratic."""
    middle = (len(lengths) - 1) // 2
    return math.log(values[-1] / values[middle]) / math.log(lengths[-1] / lengths[middle])


def main() -> None:
    parser = arguments("length_scaling", __doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--global-heads", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_threads(options.threads)
    if options.child:
        options.global_heads = options.global_heads[0]
        return child(options)
    if options.quick:
        options.lengths, options.rounds = [256, 512, 1024], 1
    machine = describe()
    rows, remarks, raw = [], [], {}
    for heads in options.global_heads:
        found = {length: measure(length, heads, options) for length in options.lengths}
        raw[str(heads)] = found
        for length, result in found.items():
            time_part = {"seconds": result["seconds"], "tokens/s": length / result["seconds"]}
            rows.append({"global heads": heads, "tokens": length} | time_part | {"peak MB": result["peak_bytes"] / 1e6})
        time_slope = exponent(options.lengths, [result["seconds"] for result in found.values()])
        memory_slope = exponent(options.lengths, [result["peak_bytes"] for result in found.values()])
        remarks.append(f"{heads} global heads: time grows as L^{time_slope:.2f}, peak memory as L^{memory_slope:.2f}.")
        print(remarks[-1], flush=True)
    remarks.append("Prefill, batch 1, bf16 weights; peak memory is what the process grows by above the resting model.")
    return write_result("length_scaling", machine, vars(options) | {"raw": raw}, {"rows": rows, "remarks": remarks})


if __name__ == "__main__":
    main()
