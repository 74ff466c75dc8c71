"""Serving throughput: streams decoded together, beside one at a time and `generate` of transformers in one batch."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.contestants import build, sizes_from
from benchmarks.floor import matrix_rate, read_rate
from benchmarks.machine import arguments, describe, set_threads, write_result
from fusiontree.deploy import GenerationOptions, InferenceRuntime, Limits, Request, Scheduler
from fusiontree.deploy.requests import Usage
from fusiontree.eval import weight_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load(sizes: Any, dtype: torch.dtype) -> InferenceRuntime:
    """FusionTree with fresh weights and a byte tokenizer, as `serve` would load it; nothing ends a text early."""
    alphabet = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
        build(("fusiontree",), sizes, dtype)["fusiontree"].save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        runtime = InferenceRuntime(Path(folder), device="cpu", dtype=dtype)
    runtime.stop_ids = frozenset()
    return runtime


def prompts(runtime: InferenceRuntime, streams: int, length: int) -> torch.Tensor:
    """Random ids (streams, length), the same in every arm."""
    generator = torch.Generator().manual_seed(streams)
    return torch.randint(256, (streams, length), generator=generator)


def together(runtime: InferenceRuntime, rows: torch.Tensor, counts: list[int]) -> tuple[float, list[Usage]]:
    """Seconds until all streams that came at once are done, and what each reports."""
    with Scheduler(runtime, Limits(slots=len(rows), prefix_bytes=0)) as scheduler:
        begin = time.perf_counter()
        requests = [
            Request(row, GenerationOptions(max_new_tokens=n)) for row, n in zip(rows.tolist(), counts, strict=True)
        ]
        tickets = [scheduler.submit(request) for request in requests]
        usages = [ticket.result()[1] for ticket in tickets]
        return time.perf_counter() - begin, usages


def one_at_a_time(runtime: InferenceRuntime, rows: torch.Tensor, tokens: int) -> float:
    """Seconds for one request after the other."""
    begin = time.perf_counter()
    for row in rows.tolist():
        runtime.complete(Request(row, GenerationOptions(max_new_tokens=tokens)))
    return time.perf_counter() - begin


def in_one_batch(runtime: InferenceRuntime, rows: torch.Tensor, tokens: int) -> float:
    """Seconds of transformers' `generate` on all rows until the last one is done."""
    begin = time.perf_counter()
    runtime.model.generate(rows, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return time.perf_counter() - begin


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of all lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def row_of(counts: list[int], timed: dict[str, list[Any]], floor_ms: float) -> dict[str, Any]:
    """One line of the table from the fastest round of each arm."""
    seconds, usages = min(timed["together"], key=lambda result: result[0])
    alone, batch, total = min(timed["alone"]), min(timed["batch"]), sum(counts)
    first = [usage.first_token_seconds or 0.0 for usage in usages]
    each = [(u.total_seconds - (u.first_token_seconds or 0.0)) / max(1, u.completion_tokens - 1) for u in usages]
    return {
        "streams": len(counts),
        "new tokens": f"{min(counts)}-{max(counts)}" if min(counts) < max(counts) else str(counts[0]),
        "tokens/s": total / seconds,
        "one at a time": 1 / alone,
        "generate, one batch": total / batch,
        "ours / one at a time": total / seconds * alone,
        "ours / generate": batch / seconds,
        "first token p50 s": statistics.median(first),
        "first token p95 s": percentile(first, 0.95),
        "per token p50 ms": 1000 * statistics.median(each),
        "per token p95 ms": 1000 * percentile(each, 0.95),
        "floor ms/step": floor_ms,
    }


def main() -> None:
    parser = arguments("serving_speed", __doc__ or "")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 100])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    options = parser.parse_args()
    if options.quick:
        options.streams, options.prompt, options.tokens, options.rounds = [1, 3], 8, 4, 1
    set_threads(options.threads)
    write_result("serving_speed", describe(), vars(options), measured(options))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All arms, taking turns, with texts that end together and texts that do not."""
    sizes, dtype = sizes_from(options), DTYPES[options.dtype]
    runtime = load(sizes, dtype)
    seconds = 0.05 if options.quick else 1.0
    read = read_rate(32 if options.quick else 512, seconds)
    flops = matrix_rate(dtype, 128, sizes.hidden_size, seconds)
    weights = sum(parameter.numel() for parameter in runtime.model.parameters())
    rows, raw = [], []
    for streams in options.streams:
        ids = prompts(runtime, streams, options.prompt)
        floor = max(weight_bytes(runtime.model) / read, 2 * weights * streams / flops)
        for counts in lengths(streams, options.tokens):
            timed = rounds(runtime, ids, counts, options.rounds)
            rows.append(row_of(counts, timed, 1000 * floor))
            raw.append({"counts": counts, "together": [t[0] for t in timed["together"]]})
            raw[-1] |= {name: timed[name] for name in ("alone", "batch")}
            print(rows[-1], flush=True)
    remark = (
        f"{weights:,} parameters, {options.dtype}, prompts of {options.prompt} random tokens, greedy; the fastest of "
        f"{options.rounds} rounds, tokens/s with the prompts' reading included. A batch of `generate` runs until its "
        f"last text is done. Floor of a step: weights read once at {read / 1e9:.1f} GB/s, or their products with one "
        f"token of every stream at {flops / 1e9:,.0f} GFLOP/s, whichever takes longer."
    )
    return {"rows": rows, "remarks": [remark], "raw": raw}


def lengths(streams: int, tokens: int) -> list[list[int]]:
    """New tokens of each stream: the same for all, and spread evenly around that from a quarter to seven quarters."""
    spread = [round(tokens / 4 + 1.5 * tokens * i / max(1, streams - 1)) for i in range(streams)]
    return [[tokens] * streams, spread] if streams > 1 else [[tokens]]


def rounds(runtime: InferenceRuntime, ids: torch.Tensor, counts: list[int], number: int) -> dict[str, list[Any]]:
    """The three arms, `number` times; lone requests are timed on two, per token: their pace is that of any other."""
    timed: dict[str, list[Any]] = {"together": [], "alone": [], "batch": []}
    few, mean = ids[:2], sum(counts) // len(counts)
    together(runtime, few, [2] * len(few))
    for _ in range(number):
        timed["together"].append(together(runtime, ids, counts))
        timed["alone"].append(one_at_a_time(runtime, few, mean) / len(few) / mean)
        timed["batch"].append(in_one_batch(runtime, ids, max(counts)))
    return timed


if __name__ == "__main__":
    main()
