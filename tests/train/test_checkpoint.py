"""Checkpoints under attack: each is whole or passed over, and a failed save leaves the older ones as they were."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusiontree.errors import CheckpointError
from fusiontree.lab.runs import is_locked
from fusiontree.models import manifest
from fusiontree.train import checkpoint as module
from fusiontree.train.checkpoint import (
    RunLock,
    keep_newest,
    latest_checkpoint,
    list_checkpoints,
    sweep,
    verify,
    write_checkpoint,
)


def fill(folder: Path) -> None:
    (folder / "trainer").mkdir()
    save_file({"w": torch.arange(500.0)}, folder / "model.safetensors")
    (folder / "trainer" / "state.json").write_text("{}", encoding="utf-8")


def run_with(folder: Path, *steps: int) -> Path:
    for step in steps:
        write_checkpoint(folder / "checkpoints", step, fill, {"config_hash": "x"})
    return folder


def test_a_checkpoint_is_sealed_and_found(tmp_path: Path) -> None:
    run = run_with(tmp_path, 5, 10)
    newest = latest_checkpoint(run)
    assert newest == tmp_path / "checkpoints" / "step-00000010"
    manifest = verify(newest)
    assert manifest["step"] == 10 and manifest["config_hash"] == "x" and "torch" in manifest["versions"]
    assert set(manifest["files"]) == {"model.safetensors", "trainer/state.json"}
    assert latest_checkpoint(tmp_path / "none") is None


@pytest.mark.fault(row=6)
def test_every_cut_of_a_file_is_noticed(tmp_path: Path) -> None:
    folder = latest_checkpoint(run_with(tmp_path, 1, 2))
    assert folder is not None
    path, rng = folder / "model.safetensors", random.Random(0)
    whole = path.read_bytes()
    for cut in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(48))]:
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes"):
            verify(folder)
    told: list[str] = []
    assert latest_checkpoint(tmp_path, told.append) == folder.with_name("step-00000001")
    assert len(told) == 1 and "step-00000002" in told[0] and "warning" in told[0]


@pytest.mark.fault(row=7)
def test_every_flipped_bit_is_noticed_though_safetensors_is_content(tmp_path: Path) -> None:
    folder = latest_checkpoint(run_with(tmp_path, 1))
    assert folder is not None
    path, rng = folder / "model.safetensors", random.Random(0)
    whole = path.read_bytes()
    for _ in range(50):
        data = bytearray(whole)
        data[rng.randrange(len(data) - 2000, len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        load_file(path)
        with pytest.raises(CheckpointError, match="SHA-256"):
            verify(folder)
    path.write_bytes(whole)
    verify(folder)


def edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["step"] = 99
    path.write_text(json.dumps(content), encoding="utf-8")


def link_outside(folder: Path) -> None:
    target = folder.parent.parent / "elsewhere.safetensors"
    os.replace(folder / "model.safetensors", target)
    (folder / "model.safetensors").symlink_to(target)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda f: (f / "manifest.json").write_text("{", encoding="utf-8"), "damaged"),
    (lambda f: (f / "manifest.json").write_text("[" * 100_000, encoding="utf-8"), "damaged"),
    (
        lambda f: (f / "manifest.json").write_text('{"format": "other"}', encoding="utf-8"),
        "not a fusiontree-checkpoint",
    ),
    (edit_manifest, "changed after it was written"),
    (lambda f: (f / "extra.bin").write_bytes(b"x"), "do not belong: .'extra.bin'"),
    (lambda f: (f / "trainer" / "state.json").unlink(), "missing files: .'trainer/state.json'"),
    (link_outside, "is a link"),
]


@pytest.mark.fault(row=8)
@pytest.mark.parametrize(("damage", "expected"), DAMAGES)
def test_a_damaged_or_foreign_folder_is_named_and_passed_over(
    tmp_path: Path, damage: Callable[[Path], object], expected: str
) -> None:
    newest = latest_checkpoint(run_with(tmp_path, 1, 2))
    assert newest is not None
    damage(newest)
    with pytest.raises(CheckpointError, match=expected):
        verify(newest)
    assert latest_checkpoint(tmp_path) == newest.with_name("step-00000001")


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.fault(row=4)
@pytest.mark.parametrize("stage", ["fill", "sync", "seal", "rename"])
def test_a_full_disk_names_the_path_and_keeps_the_older_one(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with(tmp_path, 1)
    if stage == "rename":
        monkeypatch.setattr(os, "rename", no_space)
    elif stage != "fill":
        monkeypatch.setattr(manifest if stage == "sync" else module, stage, no_space)
    with pytest.raises(CheckpointError, match=r"step-00000002: .*No space left on device"):
        write_checkpoint(tmp_path / "checkpoints", 2, no_space if stage == "fill" else fill, {})
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert latest_checkpoint(tmp_path) is not None


class PowerLoss(BaseException):
    """Ends the process's work without any of its clean-up, as a killed process would."""


@pytest.mark.fault(row=1)
@pytest.mark.parametrize("stage", ["mkdir", "fill", "seal", "rename", "sync"])
def test_whatever_a_kill_leaves_behind_is_not_a_checkpoint(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with(tmp_path, 1)

    def die(*_: object, **__: object) -> None:
        raise PowerLoss

    monkeypatch.setattr(module.shutil, "rmtree", lambda *_, **__: None)  # a dead process removes nothing
    places = {"mkdir": (Path, "mkdir"), "rename": (os, "rename"), "sync": (manifest, "sync")}
    target = places.get(stage, (module, stage))
    if stage != "fill":
        monkeypatch.setattr(*target, die)
    with pytest.raises(PowerLoss):
        write_checkpoint(tmp_path / "checkpoints", 2, die if stage == "fill" else fill, {})
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000001"
    sweep(tmp_path / "checkpoints")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    run_with(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000002"


def test_a_damaged_step_is_written_again(tmp_path: Path) -> None:
    run_with(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"")
    run_with(tmp_path, 2)
    verify(tmp_path / "checkpoints" / "step-00000002")


def test_only_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    run_with(tmp_path, 1, 2, 3, 4)
    root = tmp_path / "checkpoints"
    keep_newest(root, None)
    assert len(list_checkpoints(root)) == 4
    keep_newest(root, 2, also=1)
    assert [path.name for path in list_checkpoints(root)] == ["step-00000001", "step-00000003", "step-00000004"]
    keep_newest(root, 1)
    assert [path.name for path in root.iterdir()] == ["step-00000004"]


def test_a_run_folder_has_one_trainer_at_a_time(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(CheckpointError, match="another process"), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass


def test_somebody_who_only_looks_does_not_keep_a_trainer_out(tmp_path: Path) -> None:
    """`fusiontree runs` holds the lock for a moment to see whether it is free."""
    (tmp_path / ".lock").touch()
    descriptor = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    timer = threading.Timer(0.1, os.close, [descriptor])
    timer.start()
    with RunLock(tmp_path):
        assert is_locked(tmp_path)
    timer.join()
    assert not is_locked(tmp_path)
