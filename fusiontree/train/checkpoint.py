"""Checkpoints, whole or absent: `step-N.tmp/` is filled, synced, sealed by a manifest, then renamed to `step-N/`.

A checkpoint is an ordinary model folder (from_pretrained reads it) plus `trainer/` and `manifest.json`; no pickles.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors

from fusiontree.errors import CheckpointError
from fusiontree.models.manifest import seal, sync, verify

GLANCE = 0.5  # seconds a lock may be held by `fusiontree runs`, which only looks whether it is free
_STEP = re.compile(r"step-(\d{8,})")


def step_folder(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first; whether they verify is not looked at."""
    if not root.is_dir():
        return []
    found = [(int(m[1]), path) for path in root.iterdir() if path.is_dir() and (m := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(run_dir: str | Path, warn: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint of a run that verifies; each damaged one that is passed over is told to `warn`."""
    for folder in reversed(list_checkpoints(Path(run_dir) / "checkpoints")):
        try:
            verify(folder)
        except CheckpointError as error:
            if warn is not None:
                warn(f"warning: {error}; trying the checkpoint before it")
            continue
        return folder
    return None


def last_good(run_dir: Path) -> str:
    """The newest finished checkpoint, in words."""
    finished = list_checkpoints(run_dir / "checkpoints")
    return str(finished[-1]) if finished else "none yet"


def sweep(root: Path) -> None:
    """Remove what a killed save or clean-up left behind."""
    for path in root.glob("step-*.tmp"):
        _remove(path)


def write_checkpoint(root: Path, step: int, fill: Callable[[Path], None], facts: Mapping[str, Any]) -> Path:
    """Let `fill` write into a temporary folder and make it `step-N/` in one move.

    `facts` go into the manifest. On any failure the temporary folder is removed and older checkpoints are untouched;
    a full disk or another operating-system error is raised as CheckpointError naming the path.
    """
    target = step_folder(root, step)
    temporary = target.with_name(target.name + ".tmp")
    try:
        _remove(temporary)
        temporary.mkdir(parents=True)
        fill(temporary)
        seal(temporary, {"step": step, **facts})
        if target.exists():  # a damaged one of the same step, passed over when the run was resumed
            _remove(target)
        os.rename(temporary, target)
        sync(root)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{target}: the checkpoint cannot be written: {error}; older ones are intact") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def keep_newest(root: Path, limit: int | None, also: int | None = None) -> None:
    """Delete all but the newest `limit` checkpoints; the one of step `also` stays too."""
    if limit is None:
        return
    for folder in list_checkpoints(root)[:-limit]:
        if also is None or folder != step_folder(root, also):
            # Renamed first, so that a half-deleted folder never looks like a checkpoint.
            doomed = folder.with_name(folder.name + ".tmp")
            os.rename(folder, doomed)
            _remove(doomed)


def _remove(path: Path) -> None:
    """Delete a folder, or whatever else has its name, without following links."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class RunLock(contextlib.AbstractContextManager["RunLock"]):
    """Keeps a second process out of a run folder while one is training in it."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"
        self.descriptor = -1

    def __enter__(self) -> RunLock:
        import fcntl

        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT)
        until = time.monotonic() + GLANCE
        while True:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    os.close(self.descriptor)
                    folder = self.path.parent
                    raise CheckpointError(f"{folder}: another process is training in this run folder") from error
            time.sleep(GLANCE / 20)

    def __exit__(self, *details: object) -> None:
        os.close(self.descriptor)
