"""Checkpoints, whole or absent: `step-N.tmp/` is filled, synced, sealed by a manifest, then renamed to `step-N/`.

A checkpoint is an ordinary model folder (from_pretrained reads it) plus `trainer/` and `manifest.json`; no pickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from fusiontree.errors import CheckpointError

FORMAT, VERSION = "fusiontree-checkpoint", 1
MANIFEST = "manifest.json"
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


def sweep(root: Path) -> None:
    """Remove what a killed save or clean-up left behind."""
    for path in root.glob("step-*.tmp"):
        shutil.rmtree(path)


def write_checkpoint(root: Path, step: int, fill: Callable[[Path], None], facts: Mapping[str, Any]) -> Path:
    """Let `fill` write into a temporary folder and make it `step-N/` in one move.

    `facts` go into the manifest. On any failure the temporary folder is removed and older checkpoints are untouched;
    a full disk or another operating-system error is raised as CheckpointError naming the path.
    """
    target = step_folder(root, step)
    temporary = target.with_name(target.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        _seal(temporary, step, facts)
        if target.exists():  # a damaged one of the same step, passed over when the run was resumed
            shutil.rmtree(target)
        os.rename(temporary, target)
        _sync(root)
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
            shutil.rmtree(doomed)


def verify(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest, which is returned; raises CheckpointError naming what differs."""
    manifest = _read_manifest(folder)
    files: dict[str, Any] = manifest["files"]
    present = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise CheckpointError(f"{folder}: {name} is a link; a checkpoint holds only plain files")
        if path.is_file() and name != MANIFEST:
            present[name] = path
    missing, extra = sorted(files.keys() - present.keys()), sorted(present.keys() - files.keys())
    if missing or extra:
        raise CheckpointError(f"{folder}: damaged: missing files: {missing}, files that do not belong: {extra}")
    for name, path in present.items():
        size, wanted = path.stat().st_size, files[name]["bytes"]
        if size != wanted:
            raise CheckpointError(f"{folder}: damaged: {name} has {size} bytes, the manifest says {wanted}")
        if _sha256(path) != files[name]["sha256"]:
            raise CheckpointError(f"{folder}: damaged: the content of {name} is not what was saved (SHA-256 differs)")
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: not a checkpoint: {MANIFEST} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a {FORMAT} manifest")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {manifest.get('version')!r} is not supported; allowed: {VERSION}")
    if manifest.pop("seal", None) != _digest(manifest):
        raise CheckpointError(f"{path}: damaged: the manifest was changed after it was written")
    return manifest


def _seal(folder: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Sync every file, then write the manifest last."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        **facts,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in paths
        },
    }
    manifest["seal"] = _digest(manifest)
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for item in (*paths, path, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync(item)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunLock(contextlib.AbstractContextManager["RunLock"]):
    """Keeps a second process out of a run folder while one is training in it."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"
        self.descriptor = -1

    def __enter__(self) -> RunLock:
        import fcntl

        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.descriptor)
            raise CheckpointError(f"{self.path.parent}: another process is training in this run folder") from error
        return self

    def __exit__(self, *details: object) -> None:
        os.close(self.descriptor)
