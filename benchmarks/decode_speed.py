"""Decoding tokens per second through `generate`, batch 1, greedy, the models taking turns."""

from __future__ import annotations

from dataclasses import asdict

import torch

from benchmarks.contestants import NAMES, as_settings, build, sizes_from
from benchmarks.machine import arguments, describe, set_threads, write_result
from fusiontree.eval import SpeedResult, measure_speed

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def summarise(results: dict[str, SpeedResult], dtype: str) -> list[dict]:
    """One row per model, with our decoding rate over its."""
    ours = results["fusiontree"].decode_tokens_per_second if "fusiontree" in results else None
    return [
        {
            "model": name,
            "dtype": dtype,
            "decode tokens/s": result.decode_tokens_per_second,
            "ours / this": ours / result.decode_tokens_per_second if ours else "–",
            "token p50 ms": 1000 * result.token_latency_p50,
            "token p95 ms": 1000 * result.token_latency_p95,
            "prefill tokens/s": result.prefill_tokens_per_second,
            "first token s": result.time_to_first_token,
            "cache MB": result.cache_bytes / 1e6,
        }
        for name, result in results.items()
    ]


def main() -> None:
    parser = arguments("decode_speed", __doc__)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"])
    options = parser.parse_args()
    if options.quick:
        options.prompt, options.tokens, options.rounds, options.dtypes = 64, 8, 1, ["bfloat16"]
    set_threads(options.threads)
    machine = describe()
    sizes = sizes_from(options)
    rows, details = [], {}
    for dtype in options.dtypes:
        models = build(tuple(options.models), sizes, DTYPES[dtype])
        results = measure_speed(
            models, options.prompt, options.tokens, options.rounds,
            progress=lambda name, turn: print(f"{'warm-up' if turn < 0 else f'round {turn + 1}'}: {name}", flush=True),
        )  # fmt: skip
        rows += summarise(results, dtype)
        details[dtype] = as_settings(sizes, models) | {"raw": {name: asdict(value) for name, value in results.items()}}
    remark = f"Prompt {options.prompt} random tokens, {options.tokens} new tokens, median of {options.rounds} rounds."
    write_result("decode_speed", machine, vars(options) | {"runs": details}, {"rows": rows, "remarks": [remark]})


if __name__ == "__main__":
    main()
