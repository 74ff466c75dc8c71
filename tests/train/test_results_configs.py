"""The three models of configs/results may differ in the model and the learning rate only, and not in their size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusiontree.models.accounting import account
from fusiontree.models.presets import preset
from fusiontree.train.build import build_model
from fusiontree.train.config import load_config

FOLDER = Path(__file__).parents[2] / "configs" / "results"
NAMES = ("fusiontree", "llama", "mamba2")


def test_the_three_are_there() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("twin", NAMES[1:])
def test_a_twin_learns_the_same_text_in_the_same_steps(twin: str) -> None:
    one, other = (load_config(FOLDER / f"{name}.yaml").model_dump() for name in ("fusiontree", twin))
    for content in (one, other):
        assert content["model"]["vocab_size"] == 8192
        # What only a model with gates has, and what may differ.
        for section, key in (("training", "lr"), ("training", "loss"), ("gate_monitor", "enabled")):
            del content[section][key]
        del content["model"], content["system"]["run_dir"]
    assert one == other


def test_the_three_have_as_many_parameters_within_two_percent() -> None:
    counts = {}
    for name in NAMES:
        with torch.device("meta"):
            model = build_model(load_config(FOLDER / f"{name}.yaml"))
        counts[name] = account(model.config).total_parameters
        assert counts[name] == sum(parameter.numel() for parameter in model.parameters())
    assert max(counts.values()) <= 1.02 * min(counts.values()), counts


@pytest.mark.parametrize("twin", NAMES[1:])
def test_a_twin_is_its_preset(twin: str) -> None:
    section = load_config(FOLDER / f"{twin}.yaml").model
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    own = {key: section[key] for key in (*sizes, "intermediate_size", "max_position_embeddings") if key in section}
    with torch.device("meta"):
        built = build_model(load_config(FOLDER / f"{twin}.yaml"))
    assert built.config.to_diff_dict() == preset(twin, **own).to_diff_dict()
