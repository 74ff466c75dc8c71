"""A run small enough to be repeated many times in a test."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fusiontree.train.config import RunConfig, parse_config
from fusiontree.train.yaml_files import write_yaml

TIMES = ("tokens_per_second", "memory_gb", "elapsed")
WORDS = [
    "the",
    "gate",
    "of",
    "each",
    "layer",
    "weighs",
    "near",
    "and",
    "far",
    "12",
    "times",
    ";",
    "it",
    "learns",
    "7",
    ".",
]


def write_text(path: Path, documents: int = 60, seed: int = 0) -> Path:
    """Documents of made-up prose, separated by blank lines."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(15, 60))) for _ in range(documents)]
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return path


def tiny_content(folder: Path, **changes: Any) -> dict[str, Any]:
    """Sections of a run of 8 steps in `folder`; `changes` are `training__lr=...`."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    content: dict[str, Any] = {
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "sliding_window": 8,
            "mamba_d_state": 8,
            "mamba_head_dim": 16,
            "mamba_chunk_size": 16,
            "gate_rank": 4,
            "drop_branch_prob": 0.2,
        },
        "training": {
            "steps": 8,
            "sequence_length": 32,
            "micro_batch_size": 2,
            "accumulation_steps": 2,
            "lr": 1e-2,
            "warmup_steps": 2,
            "save_every": 2,
            "save_total_limit": None,
            "validation_every": 4,
            "validation_batches": 2,
            "precision": "fp32",
        },
        "data": {
            "train": [{"path": str(text), "separator": "\n\n"}],
            "validation_fraction": 0.1,
            "tokenizer": {"path": "byte"},
            "cache_dir": str(folder / "cache"),
        },
        "gate_monitor": {"every": 2, "sample_every": 1, "sample_tokens": 16, "alarm_after": 0.0},
        "logging": {"every": 1, "console": "off", "tensorboard": False},
        "system": {"run_dir": str(folder / "run"), "device": "cpu", "threads": 1},
    }
    for name, value in changes.items():
        *sections, key = name.split("__")
        node = content
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return content


def tiny_config(folder: Path, **changes: Any) -> RunConfig:
    """The same as a RunConfig."""
    return parse_config(tiny_content(folder, **changes))


def tiny_file(folder: Path, **changes: Any) -> Path:
    """The same as a YAML file."""
    path = folder / "config.yaml"
    path.write_text(write_yaml(tiny_content(folder, **changes)), encoding="utf-8")
    return path


def lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's file without what depends on the clock."""
    path = run_dir / name
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def tensor_hash(path: Path) -> str:
    """Hash of every tensor's name and bits in a safetensors file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def state_hashes(run_dir: Path) -> dict[str, str]:
    """Checkpoint/file -> hash, over weights, optimizer, and random and callback state."""
    return {
        f"{path.parent.relative_to(run_dir)}/{path.name}": tensor_hash(path)
        for path in sorted((run_dir / "checkpoints").rglob("*.safetensors"))
    }
