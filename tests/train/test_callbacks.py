"""Callbacks: lines that continue, a bar on a terminal, curves without a gap."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console as RichConsole

from fusiontree.train.callbacks import Console, Snapshot, TensorBoard
from fusiontree.train.interrupt import StopSignals
from fusiontree.train.jsonl import JsonLines

FIGURES = {"step": 5, "loss": 2.5, "gate_mean": 0.51, "lr": 1e-3, "tokens_per_second": 1234.0, "memory_gb": 1.5}


def silent(line: str) -> None:
    """Nobody watches."""


def test_lines_after_the_step_and_half_a_line_are_dropped(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "m.jsonl")
    file.trim(3)
    for step in range(1, 6):
        file.write({"step": step, "x": float("nan")})
    with file.path.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 3, "lo')
    file.trim(3)
    found = [json.loads(line) for line in file.path.read_text(encoding="utf-8").splitlines()]
    assert found == [{"step": step, "x": None} for step in (1, 2, 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_terminal_gets_a_bar_with_the_figures() -> None:
    screen = io.StringIO()
    console = Console("auto")
    console.rich = RichConsole(file=screen, force_terminal=True, width=140)
    console.on_start(Snapshot(0, 10, silent))
    console.on_metrics(Snapshot(5, 10, silent), FIGURES)
    console.on_step(Snapshot(5, 10, silent))
    console.say("a line above the bar")
    console.on_finish(Snapshot(5, 10, silent))
    shown = screen.getvalue()
    for part in ("loss 2.5000", "gate 0.510", "1.00e-03", "1,234 tok/s", "1.5 GB", "5/10", "a line above the bar"):
        assert part in shown


def test_elsewhere_each_line_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("auto")
    console.on_start(Snapshot(4, 10, silent))
    console.on_metrics(Snapshot(5, 10, silent), FIGURES)
    console.on_metrics(Snapshot(5, 10, silent), {"step": 5, "validation_loss": 2.0})
    training, validation = capsys.readouterr().out.splitlines()
    assert training == "step 5/10  loss 2.5000  gate 0.510  lr 1.00e-03  1,234 tok/s  1.5 GB"
    assert validation == "step 5/10  validation loss 2.0000"


def test_the_time_left_knows_nothing_of_set_up_and_the_first_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr("fusiontree.train.callbacks.time.monotonic", lambda: now.time)
    console = Console("plain")
    console.on_start(Snapshot(0, 100, silent))
    for step, seconds in ((1, 3600.0), (2, 2.0), (3, 4.0)):  # an hour of validation and compiling, then 3 s a step
        now.time += seconds
        console.on_metrics(Snapshot(step, 100, silent), {**FIGURES, "step": step})
        console.on_step(Snapshot(step, 100, silent))
    ends = [line.rpartition("GB")[2] for line in capsys.readouterr().out.splitlines()]
    assert ends == ["", "  eta 3:16", "  eta 4:51"]


def test_tensorboard_hides_what_an_interrupted_run_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (2, {3: 30.0, 4: 40.0})):
        board = TensorBoard(tmp_path)
        board.on_start(Snapshot(first, 4, silent))
        for step, value in values.items():
            board.on_metrics(Snapshot(step, 4, silent), {"step": step, "loss": value})
        board.on_finish(Snapshot(4, 4, silent))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("loss")} == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}


def test_signals_are_noticed_once_and_given_back_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals("stopping") as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before
    assert capfd.readouterr().err == "\nstopping\n"
