"""Gate statistics against numpy, alarms with advice, no wait for the device, and state that survives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusiontree.data import byte_tokenizer
from fusiontree.models.gate_statistics import TOKEN_CLASSES, GateStatistics, token_class_table
from fusiontree.train.callbacks import Snapshot
from fusiontree.train.config import GateMonitorSection
from fusiontree.train.gate_monitor import GateMonitor
from fusiontree.train.jsonl import JsonLines
from tests.train.tiny import lines

CPU = torch.device("cpu")


def monitor(folder: Path, **values: Any) -> GateMonitor:
    base = {"every": 2, "sample_every": 1, "sample_tokens": 1000, "decay": 0.0, "alarm_after": 0.0}
    settings = GateMonitorSection.model_validate({**base, **values})
    return GateMonitor(settings, 10, JsonLines(folder / "gates.jsonl"), byte_tokenizer())


def observe(
    watch: GateMonitor, step: int, gates: list[Tensor | None], rms: tuple[float, float] = (1.0, 1.0)
) -> list[str]:
    """One step with these gates (B, L, H) per layer; gives what was said."""
    shape = next(gate.shape[:2] for gate in gates if gate is not None)
    ids = torch.full(shape, ord("a"))
    branch = tuple(None if gate is None else torch.tensor(rms) for gate in gates)
    said: list[str] = []
    watch.on_forward(step, {"input_ids": ids}, SimpleNamespace(gates=tuple(gates), branch_rms=branch))
    watch.on_step(Snapshot(step, 10, said.append))
    return said


def test_a_line_holds_what_numpy_finds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = torch.rand(2, 30, 8), torch.rand(2, 30, 8) ** 3
    watch = monitor(tmp_path)
    for step, scale in ((1, 1.0), (2, 0.5)):
        observe(watch, step, [first * scale, None, second * scale], rms=(2.0, 0.5))
    (line,) = lines(tmp_path, "gates.jsonl")
    assert line["step"] == 2 and [row["layer"] for row in line["layers"]] == [0, 2]
    for row, gate in zip(line["layers"], (first, second), strict=True):
        values = np.concatenate([gate.numpy().ravel(), 0.5 * gate.numpy().ravel()]).astype(np.float64)
        assert row["mean"] == pytest.approx(values.mean(), abs=1e-5)
        assert row["std"] == pytest.approx(values.std(), abs=1e-4)
        assert (row["min"], row["max"]) == pytest.approx((values.min(), values.max()), abs=1e-5)
        for q in (5, 25, 50, 75, 95):
            assert row[f"p{q:02d}"] == pytest.approx(np.percentile(values, q), abs=0.006)
        entropy = -(values * np.log(values) + (1 - values) * np.log1p(-values)).mean()
        assert row["entropy"] == pytest.approx(entropy, abs=1e-4)
        assert row["histogram"] == np.histogram(values, bins=20, range=(0, 1))[0].tolist()
        assert row["channel_mean"] == pytest.approx((gate.numpy().mean((0, 1)) * 0.75).tolist(), abs=1e-5)
        assert (row["mamba_rms"], row["attention_rms"]) == (2.0, 0.5)
        assert row["classes"]["word"] == pytest.approx(values.mean(), abs=1e-5) and row["classes"]["number"] is None


def test_token_classes_by_what_a_token_decodes_to() -> None:
    table = token_class_table(byte_tokenizer())
    names = {character: TOKEN_CLASSES[table[ord(character)]] for character in " \nx7;_"}
    assert names == {" ": "space", "\n": "space", "x": "word", "7": "number", ";": "punctuation", "_": "punctuation"}


def test_means_per_token_class(tmp_path: Path) -> None:
    watch = monitor(tmp_path, every=1)
    text = "ab 12;"
    ids = torch.tensor([[ord(c) for c in text]])
    gate = torch.tensor([[[0.1], [0.3], [0.5], [0.6], [0.8], [0.9]]])
    watch.on_forward(1, {"input_ids": ids}, SimpleNamespace(gates=(gate,), branch_rms=(torch.ones(2),)))
    watch.on_step(Snapshot(1, 10, print))
    expected = {"word": 0.2, "space": 0.5, "number": 0.7, "punctuation": 0.9}
    assert lines(tmp_path, "gates.jsonl")[0]["layers"][0]["classes"] == pytest.approx(expected)


ALARMS = [
    (torch.full((1, 8, 4), 0.5), (1.0, 1.0), "stuck"),
    (torch.full((1, 8, 4), 0.98), (1.0, 1.0), "collapsed"),
    (torch.full((1, 8, 4), 0.01), (1.0, 1.0), "collapsed"),
    (torch.linspace(0.2, 0.8, 32).view(1, 8, 4), (1.0, 0.001), "silent"),
    (torch.linspace(0.2, 0.8, 32).view(1, 8, 4), (0.001, 1.0), "silent"),
]


@pytest.mark.parametrize(("gate", "rms", "kind"), ALARMS)
def test_an_alarm_is_told_once_and_kept_in_the_file(tmp_path: Path, gate: Tensor, rms: Any, kind: str) -> None:
    watch = monitor(tmp_path, every=1)
    said = observe(watch, 1, [gate], rms)
    assert len(said) == 1 and "layer 0" in said[0] and "step 1" in said[0]
    assert observe(watch, 2, [gate], rms) == []
    for line in lines(tmp_path, "gates.jsonl"):
        (alarm,) = line["alarms"]
        assert alarm["kind"] == kind and alarm["layer"] == 0 and alarm["advice"]


def test_healthy_gates_and_young_runs_raise_no_alarm(tmp_path: Path) -> None:
    healthy = torch.linspace(0.1, 0.9, 32).view(1, 8, 4)
    assert observe(monitor(tmp_path, every=1), 1, [healthy]) == []
    assert observe(monitor(tmp_path, every=1, alarm_after=0.5), 4, [torch.full((1, 8, 4), 0.5)]) == []
    assert observe(monitor(tmp_path, every=1, alarm_after=0.5), 5, [torch.full((1, 8, 4), 0.5)]) != []


def test_padding_is_not_watched(tmp_path: Path) -> None:
    watch = monitor(tmp_path, every=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 0]])
    gate = torch.where(mask.bool(), 0.75, 0.0).view(1, 6, 1)
    batch = {"input_ids": torch.full((1, 6), ord("a")), "attention_mask": mask}
    watch.on_forward(1, batch, SimpleNamespace(gates=(gate,), branch_rms=(torch.ones(2),)))
    watch.on_step(Snapshot(1, 10, print))
    row = lines(tmp_path, "gates.jsonl")[0]["layers"][0]
    assert (row["mean"], row["min"], row["max"]) == (0.75, 0.75, 0.75)


def test_state_taken_over_goes_on_exactly(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    torch.manual_seed(0)
    gates = [torch.rand(1, 8, 4) for _ in range(4)]
    whole, first, second = monitor(tmp_path / "a", decay=0.5), monitor(tmp_path / "b", decay=0.5), None
    for step, gate in enumerate(gates, 1):
        observe(whole, step, [gate])
        if step == 4:
            second = monitor(tmp_path / "b", decay=0.5)
            second.load_state_tensors({name: tensor.clone() for name, tensor in first.state_tensors().items()})
            second.load_state_dict(first.state_dict())
        observe(second or first, step, [gate])
    assert lines(tmp_path / "a", "gates.jsonl") == lines(tmp_path / "b", "gates.jsonl")
    assert len(lines(tmp_path / "a", "gates.jsonl")) == 2


def test_watching_never_waits_for_the_device() -> None:
    """A meta tensor has no values: anything that reads one raises."""
    statistics = GateStatistics([0, 1], 4, torch.device("meta"))
    statistics.add(
        torch.rand(2, 6, 4, device="meta"),
        torch.rand(2, 2, device="meta"),
        torch.zeros(6, dtype=torch.long, device="meta"),
    )
    statistics.fade(0.5)
    assert statistics.sums["moments"].shape == (2, 3)


def test_the_bin_count_is_the_same_on_both_paths() -> None:
    statistics = GateStatistics([0, 1], 4, CPU)
    gates = torch.tensor([[[0.0, 0.05, 0.999, 1.0]], [[0.5, 0.5, 0.25, 0.75]]])
    statistics.add(gates, torch.ones(2, 2), None)
    rows = statistics.rows()
    assert rows[0]["histogram"] == [1, 1, *[0] * 17, 2]
    assert sum(rows[1]["histogram"]) == 4 and "classes" not in rows[1]
