"""Every config that ships can be read and built; the big ones on the meta device, where weights take no memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusiontree.deploy import load_plan
from fusiontree.models.accounting import account
from fusiontree.train.build import build_model
from fusiontree.train.config import RunConfig, load_config, parse_config

CONFIGS = Path(__file__).parents[2] / "configs"
# name -> (millions of parameters at least, at most)
SIZES = {
    "demo": (4, 8),
    "wikipedia_small": (9, 11),
    "pretrain_optimized": (0.5, 2),
    "pretrain_wikipedia": (800, 1000),
    "pretrain_v1": (8_000, 16_000),
    "pretrain_v2": (8_000, 16_000),
    "pretrain_v3": (8_000, 16_000),
    "pretrain_v4": (8_000, 16_000),
    "hf_streaming": (100, 200),
    "multilingual_mix": (100, 200),
    "ddp": (100, 200),
}


def sized(config: RunConfig) -> RunConfig:
    """With the vocabulary that the tokenizer will have."""
    wanted = config.data.tokenizer.train_vocab_size or {"byte": 258}.get(config.data.tokenizer.path or "", 50257)
    content = config.model_dump(mode="json")
    content["model"].setdefault("vocab_size", wanted)
    return parse_config(content)


def test_the_table_names_every_config() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_a_shipped_config_builds(name: str) -> None:
    config = sized(load_config(CONFIGS / f"{name}.yaml"))
    with torch.device("meta"):
        model = build_model(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    least, most = SIZES[name]
    assert least * 1e6 <= count <= most * 1e6
    assert count == account(model.config).total_parameters
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_pretrain_wikipedia_has_its_published_figures() -> None:
    config = load_config(CONFIGS / "pretrain_wikipedia.yaml")
    model, training = config.model, config.training
    shape = (model["hidden_size"], model["num_hidden_layers"], model["num_attention_heads"])
    assert shape == (1536, 18, 12)
    assert (model["sliding_window"], model["global_heads"], model["gate_rank"]) == (256, 2, 96)
    assert (training.sequence_length, training.micro_batch_size, training.accumulation_steps) == (1024, 4, 2)
    assert (training.lr, training.warmup_steps, training.steps) == (1e-4, 200, 5000)


def test_pretrain_v1_has_its_published_figures() -> None:
    model = load_config(CONFIGS / "pretrain_v1.yaml").model
    assert (model["hidden_size"], model["num_hidden_layers"]) == (4096, 32)
    assert (model["sliding_window"], model["gate_rank"]) == (1024, 256)


def test_the_example_plan_fits_its_model() -> None:
    plan = load_plan(CONFIGS / "plans/pretrain_optimized.json")
    config = load_config(CONFIGS / "pretrain_optimized.yaml")
    assert [layer.layer for layer in plan.layers] == list(range(config.model["num_hidden_layers"]))


def test_the_tables_of_the_document_are_what_the_code_says() -> None:
    """`python scripts/config_tables.py --write` writes them."""
    done = subprocess.run(
        [sys.executable, str(CONFIGS.parent / "scripts/config_tables.py")], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(CONFIGS.parent)}, cwd=CONFIGS.parent,
    )  # fmt: skip
    document = (CONFIGS.parent / "docs/configs.md").read_text(encoding="utf-8")
    for table in done.stdout.strip().split("\n\n"):
        assert table in document
