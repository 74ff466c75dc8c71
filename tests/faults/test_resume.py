"""Rows 9, 10 and 12: a run goes on bit for bit, with any number of loader workers, and never with other settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusiontree.train import train
from fusiontree.train.checkpoint import list_checkpoints
from tests.faults.process import call
from tests.train.processes import SampleIds, samples
from tests.train.test_resume import StopAfter
from tests.train.tiny import lines, state_hashes, tiny_config, tiny_file

STEPS, MIDDLE = 40, 20
SETTINGS = {
    "training__steps": STEPS,
    "training__save_every": 1,  # so that the whole state of every step is on the disk, to be compared
    "training__validation_every": 15,
    "training__loss": {"entropy_weight": 0.1, "sharpen_weight": 0.1},
    "model__drop_branch_prob": 0.3,
}


def run_in(folder: Path, name: str, workers: int, stop_after: int = STEPS) -> Path:
    """Train, or go on, in a folder of this name, until a signal comes in a certain step."""
    run = folder / name
    run.mkdir(exist_ok=True)
    changes = {**SETTINGS, "data__num_workers": workers, "system__run_dir": str(run)}
    train(tiny_config(folder, **changes), callbacks=[SampleIds(run), StopAfter(stop_after)])
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps at once, batches made in the process itself."""
    return run_in(tmp_path_factory.mktemp("resume"), "whole", workers=0)


def assert_equal_at_every_step(run: Path, whole: Path) -> None:
    hashes = state_hashes(whole)
    assert len(list_checkpoints(whole / "checkpoints")) == STEPS and len(hashes) == 3 * STEPS
    assert len(set(hashes.values())) > 2 * STEPS, "the state moves at every step"
    assert state_hashes(run) == hashes
    assert lines(run) == lines(whole) and lines(run, "gates.jsonl") == lines(whole, "gates.jsonl")


@pytest.mark.fault(row=10)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_20_and_20_steps_are_40_steps_in_every_bit_of_every_step(
    whole: Path, workers: int, fault_figure: Callable[..., None]
) -> None:
    """With dropped branches, accumulation, and a stop in the middle of a pass over the data."""
    run = run_in(whole.parent, f"halves{workers}", workers, stop_after=MIDDLE)
    state = json.loads((run / "checkpoints" / f"step-{MIDDLE:08d}" / "trainer" / "state.json").read_text("utf-8"))
    epoch = len({sample for ids in samples(whole).values() for sample in ids})
    assert 0 < state["loader"]["position"] < epoch
    assert_equal_at_every_step(run_in(whole.parent, run.name, workers), whole)
    fault_figure("states compared bit by bit", STEPS)


@pytest.mark.fault(row=12)
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 2)])
def test_another_number_of_workers_brings_the_same_samples_and_states(whole: Path, before: int, after: int) -> None:
    name = f"workers {before} then {after}"
    run_in(whole.parent, name, before, stop_after=MIDDLE)
    run = run_in(whole.parent, name, after)
    assert samples(run) == samples(whole) and len(samples(run)) == STEPS
    assert_equal_at_every_step(run, whole)


# What is changed, and every field that the message must name: no more, no fewer.
OTHERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "width": ({"model__hidden_size": 64}, {"model.hidden_size", "model.head_dim", "model.intermediate_size"}),
    "vocabulary": ({"model__vocab_size": 300}, {"model.vocab_size"}),
    "window": ({"model__sliding_window": 4}, {"model.sliding_window", "model.layers"}),
    "learning rate and seed": ({"training__lr": 0.5, "system__seed": 3}, {"training.lr", "system.seed"}),
    "rows of a step": ({"training__accumulation_steps": 4}, {"training.rows_per_step"}),
    "loss": ({"training__loss": {"balance_weight": 0.7}}, {"training.loss.balance_weight"}),
}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short")
    train(tiny_config(folder, training__steps=2))
    return folder


@pytest.mark.fault(row=9)
@pytest.mark.parametrize(("changes", "fields"), OTHERS.values(), ids=OTHERS.keys())
def test_settings_that_differ_are_all_named_and_nothing_is_touched(
    short: Path, changes: dict[str, Any], fields: set[str]
) -> None:
    before = state_hashes(short / "run")
    code, output = call(["train", tiny_file(short, training__steps=4, **changes)], short / "out.txt")
    assert code == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    said = line.partition("made with other settings: ")[2].partition("; set them back")[0]
    assert {part.split(" (")[0] for part in said.split("), ")} == fields, line
    assert state_hashes(short / "run") == before


@pytest.mark.fault(row=9)
def test_another_tokenizer_is_named_with_both_hashes(short: Path) -> None:
    """The same size and the same name, but two letters exchanged."""
    folder = short / "run" / "tokenizer"
    original = (folder / "tokenizer.json").read_text(encoding="utf-8")
    content = json.loads(original)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "made_by.json").unlink()  # as put there by hand
    code, output = call(["train", tiny_file(short, training__steps=4)], short / "out.txt")
    (folder / "tokenizer.json").write_text(original, encoding="utf-8")
    assert code == 2 and "made with other settings: tokenizer (" in output, output
