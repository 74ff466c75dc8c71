"""Rows 4 and 5: a disk that is full, a folder that cannot be written. One line says so; what was there stays."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fusiontree.errors import CheckpointError
from fusiontree.eval.perplexity import evaluate_loss
from fusiontree.train import Callback, train
from fusiontree.train.checkpoint import list_checkpoints, verify
from tests.faults.process import call
from tests.train.tiny import state_hashes, tiny_config, tiny_file

NOBODY = 65534


def say_one_line(output: str) -> str:
    """The one line of an error; nothing else may look like one."""
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    return line


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.fault(row=4)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.999])
def test_a_disk_that_fills_up_in_a_save_costs_that_save_only(
    tmp_path: Path, share: float, fault_figure: Callable[..., None]
) -> None:
    """No file of the second checkpoint may be larger than a share of the optimizer's state, its largest file."""
    train(tiny_config(tmp_path, training__steps=2), evaluate=evaluate_loss)
    (first,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    before = state_hashes(tmp_path / "run")
    size = (first / "trainer" / "optimizer.safetensors").stat().st_size
    code, output = call(["train", tiny_file(tmp_path)], tmp_path / "out", partial(limit_file_size, int(size * share)))
    assert code == 2
    assert f"{first.parent}/step-00000004: the checkpoint cannot be written" in say_one_line(output)
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    verify(first)
    assert state_hashes(tmp_path / "run") == before
    assert train(tiny_config(tmp_path), evaluate=evaluate_loss).step == 8
    fault_figure("saves that met a full disk", 1)


class FillUp(Callback):
    """Puts the device that is always full in the place of a file of the run."""

    name = "fill_up"

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step(self, run: Any) -> None:
        if run.step == 3:
            self.path.unlink()
            self.path.symlink_to("/dev/full")


@pytest.mark.fault(row=4)
@pytest.mark.parametrize("name", ["metrics.jsonl", "gates.jsonl"])
def test_a_log_that_cannot_be_written_is_named_and_costs_no_checkpoint(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run" / name
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device") as caught:
        train(tiny_config(tmp_path), callbacks=[FillUp(path)])
    assert "\n" not in str(caught.value) and str(tmp_path / "run") in str(caught.value)
    (folder,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert verify(folder)["step"] == 2
    path.unlink()
    assert train(tiny_config(tmp_path)).step == 8


def become_nobody() -> None:
    """Root may write anywhere; nobody may not."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """A folder that everybody can reach and read."""
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    return tmp_path


@pytest.mark.fault(row=5)
@pytest.mark.parametrize("place", ["locked/run", "locked/deep/er/run", "locked"])
def test_a_folder_without_permission_is_refused_before_the_first_step(public: Path, place: str) -> None:
    locked = public / "locked"
    locked.mkdir()
    config = tiny_file(public, system__run_dir=str(public / place), data__cache_dir=str(public / "cache"))
    locked.chmod(0o555)
    code, output = call(["train", config], public / "out.txt", become_nobody)
    assert code == 2
    assert say_one_line(output) == f"error: system.run_dir: {public / place} cannot be written: Permission denied"
    assert not list(locked.iterdir()) and not (public / "cache").exists()


@pytest.mark.fault(row=5)
def test_a_folder_that_is_not_there_is_made_and_one_that_cannot_be_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, system__run_dir=str(tmp_path / "a" / "b" / "run"), training__steps=2)
    assert train(config).step == 2
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    code, output = call(["train", tiny_file(tmp_path, system__run_dir=str(tmp_path / "file" / "run"))], tmp_path / "o")
    assert code == 2
    assert "system.run_dir" in say_one_line(output) and "Not a directory" in output
