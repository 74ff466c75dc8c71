"""`fusiontree bench` on FusionTree whole and pruned, Falcon-H1 and Llama: speed and peak memory by prompt length.

Random weights, equal parameters for all but the pruned one, in which every other layer has lost its attention branch.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.contestants import NAMES, Sizes, as_settings, build, sizes_from
from benchmarks.machine import arguments, describe, set_threads, write_result
from fusiontree.deploy import LayerPlan, PrunePlan, apply_plan, console_progress
from fusiontree.deploy.plan import identity_of
from fusiontree.eval.system import bench as room
from fusiontree.eval.system.tables import remarks


def models_of(sizes: Sizes, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """The contestants, ours first and its pruned twin behind it."""
    models = build(NAMES, sizes, dtype)
    ours = models.pop("fusiontree")
    layers = [LayerPlan(layer=layer, keep="mamba") for layer in range(0, sizes.num_layers, 2)]
    return {"fusiontree": ours, "pruned": apply_plan(ours, PrunePlan(model=identity_of(ours), layers=layers)), **models}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per model and size."""
    return [
        {
            "prompt": row["length"],
            "batch": row["batch_size"],
            "model": row["model"],
            "prefill tokens/s": row["speed"]["prefill_tokens_per_second"],
            "decode tokens/s": row["speed"]["decode_tokens_per_second"],
            "first token s": row["speed"]["time_to_first_token"],
            "p50 ms": 1000 * row["speed"]["token_latency_p50"],
            "p95 ms": 1000 * row["speed"]["token_latency_p95"],
            "p99 ms": 1000 * row["speed"]["token_latency_p99"],
            "peak MB": row["memory"]["peak"] / 1e6,
            **{f"{part} MB": row["memory"][part] / 1e6 for part in ("weights", "kv", "ssm", "conv", "activations")},
        }
        for row in rows
        if row["error"] is None
    ]


def measure(models: dict[str, PreTrainedModel], settings: room.BenchSettings, folder: Path) -> room.Outcome:
    """Each model saved, loaded as the command loads it, and measured; what `folder` has is not measured again."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
    contestants = [room.Contestant.load(name, room.Source(str(folder / name)), "cpu") for name in models]
    return room.bench(contestants, settings, folder / "out", progress=console_progress)


def main() -> None:
    parser = arguments("prompt_lengths", __doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep models and rows there, to go on with other sizes later")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.tokens, options.rounds = [64, 128], 4, 1
    set_threads(options.threads)
    machine = describe()
    sizes = replace(sizes_from(options), max_length=max(16384, *options.lengths) + options.tokens)
    models = models_of(sizes, torch.bfloat16)
    settings = room.BenchSettings(
        tuple(options.lengths), tuple(options.batch_sizes), new_tokens=options.tokens, repeats=options.rounds
    )
    with tempfile.TemporaryDirectory() as temporary:
        outcome = measure(models, settings, options.folder or Path(temporary))
    write_result("prompt_lengths", machine, _settings(options, sizes, models, outcome), _result(options, outcome))


def _settings(
    options: argparse.Namespace, sizes: Sizes, models: dict[str, PreTrainedModel], outcome: room.Outcome
) -> dict[str, Any]:
    return {**vars(options), "folder": None, **as_settings(sizes, models), "raw": outcome.kept}


def _result(options: argparse.Namespace, outcome: room.Outcome) -> dict[str, Any]:
    remark = (
        f"bf16, {options.tokens} new tokens, median of {options.rounds} rounds, the models taking turns. Pruned: ours "
        "without the attention branch of every other layer. Peak memory is that of one generation in a process of its "
        "own; the parts add up to it but for some bytes of positions (see docs/benchmarking.md)."
    )
    return {"rows": summarise(outcome.kept), "remarks": [remark, *remarks(outcome.kept)]}


if __name__ == "__main__":
    main()
