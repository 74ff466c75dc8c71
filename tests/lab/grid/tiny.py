"""A grid small enough to be run in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusiontree.lab.grid.config import AblateConfig, CompareConfig, GridConfig, parse_grid
from fusiontree.train.yaml_files import write_yaml
from tests.train.tiny import write_text

MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mamba_d_state": 8,
    "mamba_head_dim": 16,
    "gate_rank": 4,
}


def content(folder: Path, **changes: Any) -> dict[str, Any]:
    """Sections of a grid of llama and mamba2 in 4 steps, on text in `folder`."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    return {
        "architectures": {"llama": None, "mamba2": None},
        "model": MODEL,
        "training": {
            "steps": 4,
            "sequence_length": 32,
            "micro_batch_size": 2,
            "precision": "fp32",
            "save_every": 2,
            "validation_batches": 2,
            "lr": 1e-2,
        },
        "data": {
            "train": [{"path": str(text), "separator": "\n\n"}],
            "validation_fraction": 0.2,
            "tokenizer": {"path": "byte"},
            "cache_dir": str(folder / "cache"),
        },
        "measure": {
            "validation_tokens": 512,
            "length_multiples": [1, 2],
            "length_tokens": 256,
            "tasks": ["recall"],
            "recall_pairs": [2],
            "questions": 4,
            "step_repeats": 1,
            "speed_repeats": 1,
            "prompt_length": 8,
            "new_tokens": 2,
        },
        "system": {"device": "cpu", "threads": 1},
        **changes,
    }


def tiny_grid(folder: Path, **changes: Any) -> GridConfig:
    return parse_grid(CompareConfig, content(folder, **changes), "tiny")


def tiny_ablation(folder: Path, **changes: Any) -> GridConfig:
    """FusionTree without SRTE and with norms in front."""
    found = {key: value for key, value in content(folder, **changes).items() if key != "architectures"}
    found = {"base": {"preset": "fusiontree"}, "changes": {"no_srte": None, "pre_norm": None}, **found}
    return parse_grid(AblateConfig, found, "tiny")


def tiny_file(folder: Path, **changes: Any) -> Path:
    path = folder / "grid.yaml"
    path.write_text(write_yaml(content(folder, **changes)), encoding="utf-8")
    return path
