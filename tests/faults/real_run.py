"""A run that is small but real: this repository's documents as text, a tokenizer trained on them, all features on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusiontree.train.yaml_files import write_yaml
from tests.faults.process import ROOT
from tests.train.tiny import lines, state_hashes

STEPS = 30


def write_config(run_dir: Path, **training: Any) -> Path:
    """A config file beside the run folder."""
    content = {
        "model": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "sliding_window": 16,
            "mamba_d_state": 8, "mamba_head_dim": 16, "mamba_chunk_size": 32, "gate_rank": 4, "drop_branch_prob": 0.1,
        },
        "training": {
            "steps": STEPS, "sequence_length": 64, "micro_batch_size": 2, "accumulation_steps": 2, "lr": 3e-3,
            "warmup_steps": 5, "save_every": 3, "save_total_limit": 2, "validation_every": 10, "validation_batches": 2,
            **training,
        },
        "data": {
            "train": [{"path": str(ROOT / "docs" / "*.md"), "separator": "\\n\\n"}, {"path": str(ROOT / "README.md")}],
            "validation_fraction": 0.1, "tokenizer": {"train_vocab_size": 320}, "num_workers": 1,
            "cache_dir": str(run_dir.with_name(run_dir.name + "-cache")),
        },
        "gate_monitor": {"every": 5, "sample_every": 1, "sample_tokens": 16},
        "logging": {"every": 1, "console": "plain", "tensorboard": False},
        "system": {"run_dir": str(run_dir), "device": "cpu", "threads": 1},
    }  # fmt: skip
    path = run_dir.with_name(run_dir.name + ".yaml")
    path.write_text(write_yaml(content), encoding="utf-8")
    return path


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that must be equal at the end of two runs: the last state, bit by bit, and the figures of every step."""
    last = f"step-{STEPS:08d}"
    hashes = {name: value for name, value in state_hashes(run_dir).items() if last in name}
    assert len(hashes) == 3, sorted(hashes)
    return {"hashes": hashes, "metrics": lines(run_dir), "gates": lines(run_dir, "gates.jsonl")}
