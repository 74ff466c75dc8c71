"""A run with a length curriculum: stages, memory, and a resume in the middle of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusiontree.errors import ConfigError
from fusiontree.train import Callback, train
from tests.train.test_resume import StopAfter
from tests.train.tiny import lines, state_hashes, tiny_config

PLAN: dict[str, Any] = {"training__curriculum": [[16, 3], [32, 3], [64, 2]], "training__micro_batch_size": 1,
                        "training__accumulation_steps": 4}  # fmt: skip


class Shapes(Callback):
    """Notes the shape of every micro-batch and what is computed again."""

    name = "shapes"

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[int, ...], list[int]]] = []

    def wants_gates(self, step: int) -> bool:
        return True

    def on_forward(self, step: int, batch: Any, out: Any) -> None:
        self.seen.append((step, tuple(batch["input_ids"].shape), batch["sample_ids"]))


def test_stages_keep_the_tokens_and_resume_is_exact_in_the_middle_of_one(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    shapes, again = Shapes(), Shapes()
    train(tiny_config(tmp_path, system__run_dir=str(whole), **PLAN), callbacks=[shapes])
    assert [shape for step, shape, _ in shapes.seen if step == 1] == [(2, 16)] * 4
    assert [shape for step, shape, _ in shapes.seen if step == 4] == [(1, 32)] * 4
    assert [shape for step, shape, _ in shapes.seen if step == 8] == [(1, 64)] * 2
    covered = [i * shape[1] + offset for _, shape, ids in shapes.seen for i in ids for offset in range(shape[1])]
    assert covered == list(range(8 * 128))
    for stop in (2, 3, 5, 7):
        train(tiny_config(tmp_path, system__run_dir=str(parts), **PLAN), callbacks=[StopAfter(stop), again])
    train(tiny_config(tmp_path, system__run_dir=str(parts), data__num_workers=2, **PLAN), callbacks=[again])
    assert again.seen == shapes.seen
    assert lines(whole) == lines(parts)
    final = {name: value for name, value in state_hashes(whole).items() if "step-00000008" in name}
    assert final.items() <= state_hashes(parts).items()


def test_a_row_longer_than_a_micro_batch_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusiontree.train import engine

    modes: list[str] = []
    original = engine.set_checkpointing
    monkeypatch.setattr(engine, "set_checkpointing", lambda model, mode: modes.append(mode) or original(model, mode))
    train(tiny_config(tmp_path, **PLAN))
    assert modes == ["none", "none", "block"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__curriculum": "fast"}, "training.curriculum"),
        ({"training__curriculum": [[16]]}, "training.curriculum"),
        ({"training__curriculum": [[16, 9]]}, "its stages take 9 steps, more than training.steps 8"),
        (
            {"training__curriculum": "standard"},
            "training.curriculum: a step of .* is not a whole number of rows of 4096",
        ),
        ({**PLAN, "data__packing": False}, "needs data.packing"),
        ({**PLAN, "model__max_position_embeddings": 48}, "its length 64 is more than model.max_position_embeddings 48"),
    ],
)
def test_impossible_curricula_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, **changes)
