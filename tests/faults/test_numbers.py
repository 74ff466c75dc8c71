"""Rows 20 and 21: a loss or gradient that is not finite reaches neither the weights nor the optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree import HybridLanguageModel
from fusiontree.eval.perplexity import evaluate_loss
from fusiontree.train import latest_checkpoint, train
from tests.faults.process import call
from tests.train.tiny import lines, state_hashes, tiny_config, tiny_file

EVERY_STEP = {"training__save_every": 1, "training__validation_every": None, "logging__console": "plain"}
BAD = (3, 4, 6)


def poison(where: str, steps: tuple[int, ...], value: float, per_step: int = 2) -> None:
    """Put `value` into the loss, or into one entry of one gradient, in the last micro-batch of these steps."""
    calls, original = [0], HybridLanguageModel.forward

    def forward(self: HybridLanguageModel, *arguments: Any, **options: Any) -> Any:
        out = original(self, *arguments, **options)
        if not self.training:
            return out
        calls[0] += 1
        step, before = divmod(calls[0], per_step)
        if step in steps and not before:
            if where == "loss":
                out["loss"] = out.loss * value
            else:
                self.model.embed_tokens.weight.register_hook(_spoil(value))
        return out

    HybridLanguageModel.forward = forward  # type: ignore[method-assign]


def _spoil(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    left = [1]

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        if left[0]:
            left[0] = 0
            gradient = gradient.clone()
            gradient.view(-1)[0] = value
        return gradient

    return hook


CASES = [
    pytest.param("loss", math.nan, marks=pytest.mark.fault(row=20)),
    pytest.param("loss", math.inf, marks=pytest.mark.fault(row=20)),
    pytest.param("gradient", math.nan, marks=pytest.mark.fault(row=21)),
    pytest.param("gradient", math.inf, marks=pytest.mark.fault(row=21)),
]


def weights_and_moments(folder: Path, step: int) -> tuple[str, ...]:
    """Hashes of a step's weights and of the optimizer's moments and counts."""
    found = state_hashes(folder / "run")
    return tuple(value for name, value in found.items() if f"{step:08d}" in name and "state.safetensors" not in name)


@pytest.mark.parametrize(("where", "value"), CASES)
def test_bad_steps_leave_weights_and_optimizer_as_they_were(tmp_path: Path, where: str, value: float) -> None:
    changes = {**EVERY_STEP, "training__max_skipped_steps": 2}
    code, output = call(
        ["train", tiny_file(tmp_path, **changes)], tmp_path / "out.txt", partial(poison, where, BAD, value)
    )
    assert code == 0, output
    states = {step: weights_and_moments(tmp_path, step) for step in range(1, 9)}
    assert all(len(state) == 2 for state in states.values())
    assert {step for step in range(2, 9) if states[step] == states[step - 1]} == set(BAD)
    assert output.count("is not finite") == len(BAD) and "the weights were not updated; going on" in output
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in steps if line["grad_norm"] is None] == list(BAD)
    if where == "gradient":
        assert all(line["loss"] is not None for line in steps), "the loss itself was finite"


@pytest.mark.parametrize(("where", "value"), CASES)
def test_too_many_bad_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(
    tmp_path: Path, where: str, value: float
) -> None:
    """And with the cause gone the same command goes on to where it would have come."""
    changes = {**EVERY_STEP, "training__save_every": 2, "training__max_skipped_steps": 1}
    config = tiny_file(tmp_path, **changes)
    code, output = call(["train", config], tmp_path / "out.txt", partial(poison, where, (3, 4), value))
    assert code == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "step 4" in line and "step-00000002" in line and "training.lr" in line
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None and newest.name == "step-00000002"
    assert train(tiny_config(tmp_path, **changes), evaluate=evaluate_loss).step == 8
    (tmp_path / "clean").mkdir()
    train(tiny_config(tmp_path / "clean", **changes), evaluate=evaluate_loss)
    assert state_hashes(tmp_path / "run") == state_hashes(tmp_path / "clean" / "run")
