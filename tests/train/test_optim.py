"""Optimizers: decay where it belongs, schedules with the right ends, Muon on hidden matrices only."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.train.config import TrainingSection
from fusiontree.train.optim import build_optimizers, learning_rate, uses_muon
from tests.train.test_losses import batch, tiny_model


def settings(**values: Any) -> TrainingSection:
    base = {
        "steps": 100,
        "sequence_length": 8,
        "micro_batch_size": 1,
        "lr": 1.0,
        "min_lr_ratio": 0.1,
        "warmup_steps": 10,
    }
    return TrainingSection.model_validate({**base, **values})


def test_no_decay_on_state_space_parameters_norms_biases_and_embeddings() -> None:
    model = tiny_model()
    optimizers = build_optimizers(model, settings(weight_decay=0.5))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {names[p] for group in optimizers.groups if group["weight_decay"] for p in group["params"]}
    free = {names[p] for group in optimizers.groups if not group["weight_decay"] for p in group["params"]}
    assert decayed | free == set(names.values()) and not decayed & free
    for part in ("A_log", "dt_bias", ".D", "norm", "bias", "embed_tokens"):
        assert not [name for name in decayed if name.endswith(part) or part in name.split(".")], part
    assert "model.layers.0.fusion_proj.weight" in decayed
    assert any(name.endswith("A_log") for name in free) and "model.embed_tokens.weight" in free


def test_muon_takes_hidden_matrices_only() -> None:
    model = tiny_model()
    muon = {name for name, parameter in model.named_parameters() if uses_muon(name, parameter)}
    assert "model.layers.0.fusion_proj.weight" in muon
    assert not [name for name in muon if "embed" in name or "lm_head" in name or "A_log" in name or "norm" in name]
    assert all(dict(model.named_parameters())[name].ndim == 2 for name in muon)
    members = build_optimizers(model, settings(optimizer="muon")).members
    assert [type(member).__name__ for member in members] == ["AdamW", "Muon"]
    everything = [p for member in members for group in member.param_groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))


def rates(**values: Any) -> list[float]:
    return [learning_rate(step, settings(**values)) for step in range(100)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule: str) -> None:
    assert rates(schedule=schedule)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedules_end_at_the_floor_without_ever_rising(schedule: str) -> None:
    found = rates(schedule=schedule)
    assert found[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(found[9:]))


def test_schedules_in_the_middle() -> None:
    progress = (50 - 10) / 89
    assert rates()[50] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
    assert rates(schedule="linear")[50] == pytest.approx(1 - 0.9 * progress)
    assert rates(schedule="constant")[-1] == 1.0
    stable = rates(schedule="wsd", decay_fraction=0.2)
    assert stable[79] == 1.0 and stable[80] == 1.0 and stable[81] < 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_taken_over_by_name_continues_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    def step(model: Any, optimizers: Any) -> None:
        model(**batch()).loss.backward()
        optimizers.set_lr(1e-2)
        optimizers.step()
        optimizers.zero_grad()

    first = tiny_model()
    one = build_optimizers(first, settings(optimizer=optimizer))
    step(first, one)
    second = tiny_model()
    second.load_state_dict(first.state_dict())
    two = build_optimizers(second, settings(optimizer=optimizer))
    two.load_state_tensors({name: tensor.clone() for name, tensor in one.state_tensors().items()})
    step(first, one)
    step(second, two)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(name.rpartition("/")[0] in dict(first.named_parameters()) for name in one.state_tensors())
