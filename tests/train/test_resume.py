"""A run that was stopped, killed or damaged goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fusiontree.errors import CheckpointError, DataError
from fusiontree.train import Callback, latest_checkpoint, train
from tests.train.tiny import lines, state_hashes, tiny_config, write_text


class StopAfter(Callback):
    """Asks for an end as a signal would, after some steps."""

    name = "stop_after"

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: Any) -> None:
        if run.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def assert_same_run(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    assert lines(one, "gates.jsonl") == lines(other, "gates.jsonl")
    assert state_hashes(one) == state_hashes(other) != {}


@pytest.mark.fault(row=10)
@pytest.mark.parametrize(
    "changes", [{}, {"training__optimizer": "muon", "data__num_workers": 2, "data__packing": False}]
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Includes branch dropout, accumulation, the monitor's running state, and a stop between two saves."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny_config(tmp_path, system__run_dir=str(whole), **changes))
    first = train(tiny_config(tmp_path, system__run_dir=str(parts), **changes), callbacks=[StopAfter(5)])
    assert first.interrupted and first.step == 5
    assert latest_checkpoint(parts) == parts / "checkpoints" / "step-00000005"
    second = train(tiny_config(tmp_path, system__run_dir=str(parts), **changes))
    assert not second.interrupted and second.step == 8
    extra = {name for name in state_hashes(parts) if "step-00000005" in name}
    assert lines(whole) == lines(parts)
    assert lines(whole, "gates.jsonl") == lines(parts, "gates.jsonl")
    assert {name: value for name, value in state_hashes(parts).items() if name not in extra} == state_hashes(whole)


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    first = train(tiny_config(tmp_path))
    before = state_hashes(tmp_path / "run")
    again = train(tiny_config(tmp_path))
    assert again == first
    assert state_hashes(tmp_path / "run") == before


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, training__schedule="constant", training__loss={"specialise_after": 1.0}))
    result = train(
        tiny_config(
            tmp_path, training__schedule="constant", training__loss={"specialise_after": 1.0}, training__steps=10
        )
    )
    assert result.step == 10
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == list(range(1, 11))


@pytest.mark.fault(row=6)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "whole"
    train(tiny_config(tmp_path, system__run_dir=str(whole)))
    train(tiny_config(tmp_path), callbacks=[StopAfter(6)])
    path = tmp_path / "run" / "checkpoints" / "step-00000006" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    train(tiny_config(tmp_path, logging__console="plain"))
    printed = capsys.readouterr().out
    assert "warning" in printed and "step-00000006" in printed and "going on from step 4" in printed
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.fault(row=8)
def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, training__steps=2))
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        train(tiny_config(tmp_path, training__steps=4))


OTHER = [
    ({"model__hidden_size": 64}, ["model.hidden_size (32 -> 64)"]),
    ({"model__vocab_size": 300}, ["model.vocab_size (258 -> 300)"]),
    ({"training__lr": 0.5}, ["training.lr (0.01 -> 0.5)"]),
    ({"training__sequence_length": 16}, ["training.sequence_length (32 -> 16)"]),
    ({"training__loss": {"balance_weight": 0.7}, "system__seed": 3}, ["training.loss.balance_weight", "system.seed"]),
    ({"model__sliding_window": 4}, ["model.sliding_window (8 -> 4)", "model.layers"]),
]


@pytest.mark.fault(row=9)
@pytest.mark.parametrize(("changes", "expected"), OTHER)
def test_a_checkpoint_of_other_settings_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    train(tiny_config(tmp_path, training__steps=2))
    before = state_hashes(tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        train(tiny_config(tmp_path, training__steps=4, **changes))
    for part in expected:
        assert part in str(caught.value)
    assert state_hashes(tmp_path / "run") == before


@pytest.mark.fault(row=9)
def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, training__steps=2))
    path = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"]["a"], content["model"]["vocab"]["b"] = 98, 97
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises((CheckpointError, DataError), match="tokenizer"):
        train(tiny_config(tmp_path, training__steps=4))


@pytest.mark.fault(row=13)
def test_other_text_is_refused(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, training__steps=2))
    write_text(tmp_path / "text.txt", seed=1)
    with pytest.raises(DataError, match="fingerprint"):
        train(tiny_config(tmp_path, training__steps=4))


@pytest.mark.fault(row=13)
def test_other_text_is_taken_when_that_is_asked_for_and_only_then(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, training__steps=2))
    write_text(tmp_path / "text.txt", seed=1)
    assert train(tiny_config(tmp_path, training__steps=4, data__allow_changed=True)).step == 4
    assert "allow_changed" not in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert train(tiny_config(tmp_path, training__steps=6)).step == 6
