"""The list of runs: the state of each from its lock, its own words and what it left; damage is told, not fatal."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from fusiontree.errors import DataError
from fusiontree.lab.runs import RunRow, list_runs
from fusiontree.train import Callback, train
from fusiontree.train.callbacks import Snapshot, StateFile
from fusiontree.train.checkpoint import RunLock
from tests.lab.fake_run import write_fake_run
from tests.train.tiny import tiny_config


def only(folder: Path) -> RunRow:
    (row,) = list_runs(folder)
    return row


def made(folder: Path, *files: tuple[str, Any]) -> Path:
    """A run folder with these files: JSON, or text as it is."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / ".lock").touch()
    for name, content in files:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return folder


LINE = {"step": 30, "loss": 2.5, "tokens": 900, "elapsed": 12.5}
SAID = {"step": 30, "steps": 100}


@pytest.mark.parametrize(
    ("files", "state", "note"),
    [
        ([], "never started", ""),
        ([("config.yaml", "training: {steps: 100}")], "never started", ""),
        ([("metrics.jsonl", LINE)], "interrupted", ""),
        ([("metrics.jsonl", LINE), ("summary.json", {"step": 30, "interrupted": True})], "interrupted", ""),
        ([("metrics.jsonl", LINE), ("summary.json", {"step": 30, "interrupted": False})], "finished", ""),
        ([("metrics.jsonl", LINE), ("summary.json", {"step": 20, "interrupted": False})], "interrupted", ""),
        ([("metrics.jsonl", LINE), ("state.json", {"state": "running", **SAID})], "interrupted", "killed"),
        ([("metrics.jsonl", LINE), ("state.json", {"state": "finished", **SAID})], "finished", ""),
        ([("state.json", {"state": "failed", "error": "step 3:\n bad", **SAID})], "failed", "step 3: bad"),
        ([("state.json", "{"), ("metrics.jsonl", LINE)], "interrupted", "state.json is damaged"),
        ([("state.json", {"state": "delighted"}), ("metrics.jsonl", LINE)], "interrupted", ""),
        ([("config.yaml", "training: [")], "never started", "config.yaml is damaged"),
        ([("metrics.jsonl", json.dumps(LINE) + '\n{"step": 31, "lo')], "interrupted", "damaged lines"),
        ([("metrics.jsonl", "[" * 100_000)], "never started", "damaged lines"),
        ([("metrics.jsonl", {**LINE, "loss": None})], "interrupted", "not finite"),
    ],
)
def test_the_state_is_what_the_folder_shows(tmp_path: Path, files: list[Any], state: str, note: str) -> None:
    row = only(made(tmp_path / "run", *files))
    assert (row.name, row.state) == ("run", state)
    assert note in " ".join(row.notes) and bool(note) == bool(row.notes)
    with RunLock(tmp_path / "run"):
        assert only(tmp_path / "run").state == "running"
    assert only(tmp_path / "run").state == state


def test_the_figures_are_the_newest_and_the_best(tmp_path: Path) -> None:
    lines = [{"step": 0, "validation_loss": 6.0}, {"step": 10, "loss": 4.0}, {"step": 20, "validation_loss": 2.0}]
    run = made(
        tmp_path / "run",
        ("metrics.jsonl", "\n".join(map(json.dumps, [*lines, LINE, {"step": 30, "validation_loss": 3.0}]))),
        ("config.yaml", "training:\n  steps: 1000\n"),
    )
    row = only(run)
    assert (row.step, row.steps, row.loss, row.best_validation_loss) == (30, 1000, 2.5, 2.0)
    assert (row.tokens, row.seconds) == (900, 12.5)
    saved = {"progress": {"step": 32, "best_validation_loss": 1.5}}  # of a line that is no longer at hand
    for step, content in ((8, {"progress": {"best_validation_loss": 0.1}}), (32, saved)):
        (run / "checkpoints" / f"step-{step:08d}" / "trainer").mkdir(parents=True)
        (run / "checkpoints" / f"step-{step:08d}" / "trainer" / "state.json").write_text(json.dumps(content))
    (run / "checkpoints" / "step-00000040.tmp").mkdir()
    assert (only(run).step, only(run).best_validation_loss) == (32, 1.5)


def test_the_size_is_what_the_disk_gives(tmp_path: Path) -> None:
    run = made(tmp_path / "run", ("metrics.jsonl", LINE))
    before = only(run).bytes
    (run / "checkpoints" / "weights").write_bytes(os.urandom(1 << 20))
    (run / "link").symlink_to(run / "checkpoints" / "weights")
    (run / "loop").symlink_to(run)
    assert 1 << 20 <= only(run).bytes - before <= (1 << 20) + 3 * 8192


def test_runs_are_found_below_and_foreign_folders_are_told(tmp_path: Path) -> None:
    now = time.time()
    made(tmp_path / "old" / "healing")  # a part of its run
    for age, name in ((30, "old"), (10, "group/new"), (20, "group/deep/middle")):
        run = made(tmp_path / name, ("metrics.jsonl", LINE))
        for path in (*run.iterdir(), run):
            os.utime(path, (now - age, now - age))
    (tmp_path / "photos" / "holiday").mkdir(parents=True)
    os.utime(tmp_path / "photos", (now - 40, now - 40))
    made(tmp_path / "broken").joinpath("metrics.jsonl").mkdir()
    os.utime(tmp_path / "broken", (now, now))
    (tmp_path / ".cache").mkdir()
    (tmp_path / "file.txt").write_text("")
    rows = list_runs(tmp_path)
    assert {row.name: row.state for row in rows} == {
        "group/new": "interrupted", "group/deep/middle": "interrupted", "old": "interrupted",
        "photos": "not a run", "broken": "unreadable",
    }  # fmt: skip
    known = [row.name for row in rows if row.name != "broken"]
    assert known == ["group/new", "group/deep/middle", "old", "photos"]
    assert next(row for row in rows if row.name == "broken").notes == ["is a directory"]


def test_what_cannot_be_listed_is_one_line(tmp_path: Path) -> None:
    assert list_runs(tmp_path) == []
    with pytest.raises(DataError, match=r"runs: .*nowhere: no such file"):
        list_runs(tmp_path / "nowhere")


def test_a_thousand_runs_are_listed_in_seconds(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run-0000")
    for name in ("gates.jsonl", "slim.json", "plan.json"):
        (run / name).unlink()
    (run / "state.json").write_text(json.dumps({"state": "finished", **SAID}))
    for number in range(1, 1000):
        shutil.copytree(run, tmp_path / f"run-{number:04d}")
    began = time.process_time()
    rows = list_runs(tmp_path)
    assert time.process_time() - began < 10
    assert len(rows) == 1000 and {row.state for row in rows} == {"finished"}


class Fails(Callback):
    name = "fails"

    def on_step(self, run: Snapshot) -> None:
        if run.step == 3:
            raise RuntimeError("the third step\nis too much")


def told(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return content


def test_a_real_run_says_how_it_ended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="third"):
        train(tiny_config(tmp_path, training__steps=4), callbacks=[Fails()])
    row = only(folder)
    assert (row.state, row.step, row.steps, row.notes) == ("failed", 3, 4, ["the third step is too much"])
    try:
        raise KeyError("trouble of the caller, not of the run")
    except KeyError:
        train(tiny_config(tmp_path, training__steps=4))
    row = only(folder)
    assert (row.state, row.step, row.steps, row.notes) == ("finished", 4, 4, [])
    assert row.best_validation_loss is not None and row.bytes > 100_000
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
            "another process of the run was lost",
        ),
        (RuntimeError("weights of the wrong shape"), "weights of the wrong shape"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_what_ends_a_run_is_told_in_words(tmp_path: Path, error: Exception, why: str) -> None:
    file = StateFile(tmp_path / "state.json")
    with pytest.raises(type(error)):
        try:
            raise error
        finally:
            file.on_finish(Snapshot(1, 2, print))
    assert told(tmp_path) == {"state": "failed", "error": why, "step": 1, "steps": 2}


def test_a_full_disk_does_not_hide_the_error_that_ends_the_run(tmp_path: Path) -> None:
    heard: list[str] = []
    file = StateFile(tmp_path / "gone" / "state.json")
    with pytest.raises(ZeroDivisionError):
        try:
            _ = 1 / 0
        finally:
            file.on_finish(Snapshot(1, 2, heard.append))
    assert heard == [f"warning: {file.path}: cannot be written: No such file or directory"]
