"""Probes: measured when they are due, told everywhere, and without a trace in the training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fusiontree.train import train
from fusiontree.train.validation import Probes
from tests.train.test_resume import StopAfter
from tests.train.tiny import lines, state_hashes, tiny_config


def nosy(model: Any) -> dict[str, float]:
    """Draws random numbers of every kind, and asks for longer rows than any the run has."""
    ids = torch.arange(2 * 96).reshape(2, 96) % 200
    out = model(input_ids=ids, labels=ids, use_cache=False)
    drawn = torch.rand(3).sum().item() + random.random()
    return {"loss": out.loss, "drawn": drawn, "gradients": float(out.loss.requires_grad)}


def measured(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run) if "loss" not in line and "validation_loss" not in line]


def test_probes_leave_no_trace(tmp_path: Path) -> None:
    """Losses, weights, optimizer, random states and data position are the same bit for bit, branch dropout included."""
    plain, probed = tmp_path / "plain", tmp_path / "probed"
    train(tiny_config(tmp_path, system__run_dir=str(plain)))
    probes = {"nosy": nosy, "second": lambda model: torch.rand(()).item()}
    train(tiny_config(tmp_path, system__run_dir=str(probed), probes__every=1), probes=probes)
    found = measured(probed)
    assert [line["step"] for line in found] == list(range(9))
    assert [line for line in lines(probed) if line not in found] == lines(plain)
    assert state_hashes(probed) == state_hashes(plain) != {}
    assert {line["nosy/gradients"] for line in found} == {0.0}
    assert found[0]["nosy/loss"] > found[-1]["nosy/loss"]


@pytest.mark.parametrize(
    ("every", "steps"), [(None, []), (3, [0, 3, 6, 8]), (4, [0, 4, 8]), (100, [0, 8])], ids=lambda value: str(value)
)
def test_when_probes_are_due(every: int | None, steps: list[int]) -> None:
    probes = Probes(every, {"one": lambda model: 1.0})
    assert [step for step in range(9) if probes.due(step, 8)] == steps
    assert not any(Probes(every, {}).due(step, 8) for step in range(9))


def test_a_resumed_run_measures_each_step_once(tmp_path: Path) -> None:
    settings = {"probes__every": 3, "training__save_every": 2, "training__validation_every": None}
    train(tiny_config(tmp_path, **settings), probes={"nosy": nosy}, callbacks=[StopAfter(5)])
    train(tiny_config(tmp_path, **{**settings, "probes__every": 2}), probes={"nosy": nosy})
    assert [line["step"] for line in measured(tmp_path / "run")] == [0, 3, 6, 8]


def test_figures_reach_screen_and_board(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"training__steps": 2, "logging__tensorboard": True, "logging__console": "plain", "probes__every": 2}
    probes = {"recall": lambda model: {"4": 0.25, "16": 0.125}, "single": lambda model: float(model is None)}
    train(tiny_config(tmp_path, **settings), probes=probes)
    assert "step 2/2  recall/4 0.2500  recall/16 0.1250  single 0.0000" in capsys.readouterr().out
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("recall/16")] == [(0, 0.125), (2, 0.125)]


def test_a_probe_that_fails_leaves_the_model_in_training(tmp_path: Path) -> None:
    model, state = torch.nn.Dropout(), (torch.get_rng_state(), random.getstate())

    def fail(ask: Any) -> float:
        torch.rand(1), random.random()
        assert not model.training
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Probes(1, {"fail": fail}).measure(model, torch.device("cpu"))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
