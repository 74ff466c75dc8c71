"""Rows 2 and 3: asked to stop, a run finishes its step, saves once, says how to go on, and goes on exactly."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.cli import INTERRUPTED
from fusiontree.eval.perplexity import evaluate_loss
from fusiontree.train import latest_checkpoint, train
from fusiontree.train.checkpoint import list_checkpoints, verify
from tests.faults.disk import Moment, record, signal_self
from tests.faults.process import Child, call
from tests.train.tiny import lines, state_hashes, tiny_config, tiny_file

SAVED = 4  # the step whose save is disturbed
LONG = {
    "logging__console": "plain",
    "training__steps": 400,
    "training__save_every": None,
    "training__validation_every": None,
}
SHORT = {
    "logging__console": "plain",
    "training__steps": 6,
    "training__save_every": 2,
    "training__validation_every": None,
}
TERM, INT = signal.SIGTERM, signal.SIGINT


def stopped_and_saved(folder: Path, code: int, output: str) -> int:
    """Check what an asked-for end leaves behind; gives the step it was at."""
    run = folder / "run"
    assert code == INTERRUPTED, output
    assert "run the same command again to go on" in output and "Traceback" not in output
    step = int([line["step"] for line in lines(run) if "loss" in line][-1])
    newest = latest_checkpoint(run)
    assert newest is not None and newest.name == f"step-{step:08d}"
    assert not list((run / "checkpoints").glob("*.tmp"))
    return step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_config(folder, **SHORT), evaluate=evaluate_loss)
    return folder / "run"


@pytest.mark.fault(row=2)
@pytest.mark.parametrize("number", [TERM, INT])
def test_a_signal_during_a_step_ends_the_run_after_it_and_the_next_goes_on(
    tmp_path: Path, whole: Path, number: int
) -> None:
    prepare = partial(signal_in_backward, 6, number)  # two micro-batches per step: in the middle of the third
    code, output = call(["train", tiny_file(tmp_path, **SHORT)], tmp_path / "out.txt", prepare)
    assert stopped_and_saved(tmp_path, code, output) == 3
    train(tiny_config(tmp_path, **SHORT), evaluate=evaluate_loss)
    assert lines(tmp_path / "run") == lines(whole)
    found = state_hashes(tmp_path / "run")
    assert {name: value for name, value in found.items() if "step-00000003" not in name} == state_hashes(whole) != {}


def signal_in_backward(call: int, number: int) -> None:
    """Get a signal in the backward pass of a micro-batch."""
    calls = itertools.count(1)
    original = torch.Tensor.backward

    def backward(self: torch.Tensor, *arguments: Any, **options: Any) -> None:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        original(self, *arguments, **options)

    torch.Tensor.backward = backward  # type: ignore[method-assign]


MOMENTS = [("write", "config.json"), ("write", "manifest.json"), ("sync", "manifest.json"), ("rename", "folder")]
SIGNALS = [(TERM,), (TERM, TERM), (TERM, INT, TERM)]


@pytest.mark.fault(row=3)
@pytest.mark.parametrize("signals", SIGNALS, ids=["one", "two", "three"])
@pytest.mark.parametrize("moment", MOMENTS, ids=" ".join)
def test_signals_during_a_save_leave_one_whole_checkpoint(
    tmp_path: Path, whole: Path, signals: tuple[int, ...], moment: Moment, fault_figure: Callable[..., None]
) -> None:
    prepare = partial(disturb, tmp_path / "moments.txt", moment, signals)
    code, output = call(["train", tiny_file(tmp_path, **SHORT)], tmp_path / "out.txt", prepare)
    assert stopped_and_saved(tmp_path, code, output) == SAVED
    moments = (tmp_path / "moments.txt").read_text(encoding="utf-8").splitlines()
    assert moments.count("rename folder") == 1 and moments.count("write manifest.json") == 1
    train(tiny_config(tmp_path, **SHORT), evaluate=evaluate_loss)
    assert state_hashes(tmp_path / "run") == state_hashes(whole) != {}
    fault_figure("signals during a save", len(signals))


def disturb(log: Path, moment: Moment, signals: tuple[int, ...]) -> None:
    record(log, SAVED)
    signal_self(SAVED, moment, signals)


@pytest.mark.fault(row=3)
def test_a_storm_of_signals_is_one_request(tmp_path: Path, fault_figure: Callable[..., None]) -> None:
    """Until the checkpoint is in its place; after that the process only has to end, however it does."""
    run, sent = tmp_path / "run", 0
    with Child(["train", tiny_file(tmp_path, **LONG)], tmp_path / "out.txt") as child:
        child.until(lambda: (run / "metrics.jsonl").exists())
        while child.process.is_alive() and not list_checkpoints(run / "checkpoints"):
            child.send(INT if sent % 2 else TERM)
            sent += 1
            time.sleep(0.001)
        child.wait()
    (folder,) = list_checkpoints(run / "checkpoints")
    verify(folder)
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert sent > 1
    fault_figure("signals in a row", sent, largest=True)
