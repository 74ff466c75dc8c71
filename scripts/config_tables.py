"""Writes the tables of docs/configs.md: size and memory forecast of every config that ships.

python scripts/config_tables.py          prints them
python scripts/config_tables.py --write  puts them in the document, between its markers
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tables import main

from fusiontree.cli.info import human, read_target
from fusiontree.models import account
from fusiontree.train.forecast import Forecast, by_stage, forecast

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "configs.md"
# Config, processes, device: how each is meant to be run.
RUNS = [
    ("demo", 1, "cpu"),
    ("wikipedia_small", 1, "cpu"),
    ("pretrain_optimized", 1, "cpu"),
    ("results/fusiontree", 1, "cpu"),
    ("results/llama", 1, "cpu"),
    ("results/mamba2", 1, "cpu"),
    ("hf_streaming", 1, "cuda"),
    ("multilingual_mix", 1, "cuda"),
    ("ddp", 8, "cuda"),
    ("pretrain_wikipedia", 1, "cuda"),
    ("pretrain_wikipedia", 2, "cuda"),
    ("pretrain_wikipedia", 8, "cuda"),
    ("pretrain_v1", 8, "cuda"),
    ("pretrain_v2", 8, "cuda"),
    ("pretrain_v3", 8, "cuda"),
    ("pretrain_v4", 8, "cuda"),
]
# How pretrain_wikipedia may be run otherwise on two GPUs.
OTHERWISE = {
    "as it is": [],
    "ZeRO-3": ["system.deepspeed=configs/deepspeed/zero3.json"],
    "ZeRO-3, offloaded": ["system.deepspeed=configs/deepspeed/zero3_offload.json"],
    "FSDP2": ["system.engine=fsdp", "system.deepspeed=null"],
    "DDP": ["system.engine=ddp", "system.deepspeed=null"],
    "nothing computed again": ["training.activation_checkpointing=none"],
    "whole layers computed again": ["training.activation_checkpointing=block"],
    "fp32": ["training.precision=fp32"],
    "length 2048": ["training.sequence_length=2048"],
    "micro-batch 2, accumulation 4": ["training.micro_batch_size=2", "training.accumulation_steps=4"],
}


def config_table() -> Iterator[str]:
    """One line per config and number of processes."""
    yield "| config | parameters | tokens per step | engine | processes | device, each | activations | host, each |"
    yield "|---|---:|---:|---|---:|---:|---:|---:|"
    for name, processes, device in RUNS:
        found = read_target(ROOT / "configs" / f"{name}.yaml")
        assert found.run is not None
        training = found.run.training
        tokens = training.sequence_length * training.micro_batch_size * training.accumulation_steps
        coming = forecast(found.run, found.config, processes, device)
        size = account(found.config).total_parameters
        yield (
            f"| `{name}` | {size / 1e6:,.1f} M | {tokens:,} | {engine_of(name)} | {processes} × {shown(device)} | "
            f"**{gigabytes(coming.total)}** | {gigabytes(coming.parts.get('activations', 0))} | {host(coming)} |"
        )


def engine_of(name: str) -> str:
    """As a person says it."""
    run = read_target(ROOT / "configs" / f"{name}.yaml").run
    assert run is not None
    file = Path(run.system.deepspeed or "").stem
    named = {"zero2": "ZeRO-2", "zero3": "ZeRO-3", "zero3_offload": "ZeRO-3, offloaded"}
    return named[file] if file else {"auto": "single, or DDP"}.get(run.system.engine, run.system.engine.upper())


def otherwise_table() -> Iterator[str]:
    """pretrain_wikipedia with other settings, on two GPUs."""
    yield "| `pretrain_wikipedia` on 2 GPUs | each | weights and states | activations | passing | host, each |"
    yield "|---|---:|---:|---:|---:|---:|"
    for what, overrides in OTHERWISE.items():
        found = read_target(ROOT / "configs" / "pretrain_wikipedia.yaml", overrides)
        assert found.run is not None
        coming = forecast(found.run, found.config, 2, "cuda")
        parts = coming.parts
        state = sum(parts.get(name, 0) for name in ("weights", "gradients", "optimizer"))
        cells = (coming.total, state, parts.get("activations", 0), parts["transient"])
        yield f"| {what} | {' | '.join(map(gigabytes, cells))} | {host(coming)} |"


def length_table() -> Iterator[str]:
    """pretrain_v1, stage by stage of its curriculum, on eight GPUs."""
    yield "| `pretrain_v1` on 8 GPUs, length | rows at once | computed again | each | activations |"
    yield "|---:|---:|---|---:|---:|"
    found = read_target(ROOT / "configs" / "pretrain_v1.yaml")
    assert found.run is not None
    for coming in by_stage(found.run, found.config, 8, "cuda"):
        stage, kept = coming.stage, coming.parts.get("activations", 0)
        yield (
            f"| {stage.length:,} | {stage.micro_batch_size} | {coming.checkpointing} | {gigabytes(coming.total)} | "
            f"{gigabytes(kept)} |"
        )


def gigabytes(size: float) -> str:
    """Powers of 1000; small ones in a smaller unit."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else human(size)


def host(coming: Forecast) -> str:
    return gigabytes(sum(coming.host.values())) if coming.host else "–"


def shown(device: str) -> str:
    return {"cuda": "GPU", "cpu": "CPU"}[device]


TABLES = {"configs": config_table, "otherwise": otherwise_table, "lengths": length_table}


if __name__ == "__main__":
    main(DOCUMENT, TABLES)
