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


def together(runtime: InferenceRuntime, rows: torch.Tensor, tokens: int) -> tuple[float, list[Usage], int]:
    """Seconds until all streams that came at once are done, what each reports, and the number of decoding steps."""
    options = GenerationOptions(max_new_tokens=tokens)
    with Scheduler(runtime, Limits(slots=len(rows), prefix_bytes=0)) as scheduler:
        begin = time.perf_counter()
        tickets = [scheduler.submit(Request(row, options)) for row in rows.tolist()]
        usages = [ticket.result()[1] for ticket in tickets]
        return time.perf_counter() - begin, usages, scheduler.stats().steps


def one_at_a_time(runtime: InferenceRuntime, rows: torch.Tensor, tokens: int) -> float:
    """Seconds for one request after the other."""
    begin = time.perf_counter()
    for row in rows.tolist():
        runtime.complete(Request(row, GenerationOptions(max_new_tokens=tokens)))
    return time.perf_counter() - begin


def in_one_batch(runtime: InferenceRuntime, rows: torch.Tensor, tokens: int) -> float:
    """Seconds of transformers' `generate` on all rows, which all have one length and end together: its best case."""
    begin = time.perf_counter()
    runtime.model.generate(rows, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return time.perf_counter() - begin


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of all lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def row_of(streams: int, tokens: int, timed: dict[str, Any], floor_ms: float) -> dict[str, Any]:
    """One line of the table from the fastest round of each arm."""
    seconds, usages, _ = min(timed["together"], key=lambda result: result[0])
    alone, batch = min(timed["alone"]), min(timed["batch"])
    first = [usage.first_token_seconds or 0.0 for usage in usages]
    each = [(u.total_seconds - (u.first_token_seconds or 0.0)) / max(1, tokens - 1) for u in usages]
    return {
        "streams": streams,
        "tokens/s": streams * tokens / seconds,
        "one at a time": 1 / alone,
        "generate, one batch": streams * tokens / batch,
        "ours / one at a time": streams * tokens / seconds * alone,
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
    """All arms, taking turns; the lone requests are timed on at most four, whose pace does not depend on how many."""
    sizes, dtype = sizes_from(options), DTYPES[options.dtype]
    runtime = load(sizes, dtype)
    seconds = 0.05 if options.quick else 1.0
    read = read_rate(32 if options.quick else 512, seconds)
    flops = matrix_rate(dtype, 128, sizes.hidden_size, seconds)
    weights = sum(parameter.numel() for parameter in runtime.model.parameters())
    rows, raw = [], []
    for streams in options.streams:
        ids = prompts(runtime, streams, options.prompt)
        timed: dict[str, list[Any]] = {"together": [], "alone": [], "batch": []}
        together(runtime, ids[:2], 2)
        for _ in range(options.rounds):
            timed["together"].append(together(runtime, ids, options.tokens))
            few = ids[:4]
            timed["alone"].append(one_at_a_time(runtime, few, options.tokens) / len(few) / options.tokens)
            timed["batch"].append(in_one_batch(runtime, ids, options.tokens))
        floor = max(weight_bytes(runtime.model) / read, 2 * weights * streams / flops)
        rows.append(row_of(streams, options.tokens, timed, 1000 * floor))
        raw.append({"streams": streams, "seconds": [t[0] for t in timed["together"]], "steps": timed["together"][0][2]})
        print(rows[-1], flush=True)
    remark = (
        f"{weights:,} parameters, {options.dtype}, prompts of {options.prompt} random tokens, {options.tokens} new "
        f"tokens each, greedy; the fastest of {options.rounds} rounds, tokens/s with the prompts' reading included. "
        f"Floor of a step: all weights read once at {read / 1e9:.1f} GB/s, or their products with one token of every "
        f"stream at {flops / 1e9:,.0f} GFLOP/s, whichever takes longer."
    )
    return {"rows": rows, "remarks": [remark], "raw": raw}


if __name__ == "__main__":
    main()
