"""Every config that ships can be read and built; the big ones on the meta device, where weights take no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
