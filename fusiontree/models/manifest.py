"""The manifest of a checkpoint: SHA-256 and size of every file, written last, so that what is read is what was saved.

safetensors alone notices a file that was cut, but none of the bits flipped in its data.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from fusiontree.errors import CheckpointError

FORMAT, VERSION = "fusiontree-checkpoint", 1
MANIFEST = "manifest.json"
MAX_BYTES = 16 * 1024 * 1024


def verify(folder: Path, ignore: str | None = None) -> dict[str, Any]:
    """Check every file against the manifest, which is returned; raises CheckpointError naming what differs.

    The content of files below the folder `ignore` is not read.
    """
    manifest = _read(folder)
    try:
        _compare(folder, manifest["files"], ignore)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    return manifest


def _compare(folder: Path, files: Mapping[str, Any], ignore: str | None) -> None:
    present = _present(folder)
    missing, extra = sorted(files.keys() - present.keys()), sorted(present.keys() - files.keys())
    if missing or extra:
        raise CheckpointError(f"{folder}: damaged: missing files: {missing}, files that do not belong: {extra}")
    for name, path in present.items():
        size, wanted = path.stat().st_size, files[name]["bytes"]
        if size != wanted:
            raise CheckpointError(f"{folder}: damaged: {name} has {size} bytes, the manifest says {wanted}")
        if name.split("/")[0] != ignore and sha256_of(path) != files[name]["sha256"]:
            raise CheckpointError(f"{folder}: damaged: the content of {name} is not what was saved (SHA-256 differs)")


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest, `facts` in it, and wait until it and every file are on the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in paths
        },
    }
    manifest["seal"] = _digest(manifest)
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for item in (*paths, path, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(item)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _present(folder: Path) -> dict[str, Path]:
    """Everything in the folder that is no folder itself, but the manifest."""
    if folder.is_symlink():
        raise CheckpointError(f"{folder}: is a link; a checkpoint is a plain folder")
    present = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise CheckpointError(f"{folder}: {name} is a link; a checkpoint holds only plain files")
        if not path.is_dir() and name != MANIFEST:
            present[name] = path
    return present


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: damaged: more than {MAX_BYTES:,} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(manifest, dict) and manifest.get("format") == FORMAT
        whole = known and manifest.pop("seal", None) == _digest(manifest)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: not a checkpoint: {MANIFEST} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if not known:
        raise CheckpointError(f"{path}: not a {FORMAT} manifest")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {manifest.get('version')!r} is not supported; allowed: {VERSION}")
    if not whole:
        raise CheckpointError(f"{path}: damaged: the manifest was changed after it was written")
    if not _names_files(manifest.get("files")):
        raise CheckpointError(f"{path}: damaged: it does not say size and SHA-256 of every file")
    return dict(manifest)


def _names_files(files: Any) -> bool:
    entries = files.values() if isinstance(files, dict) else [None]
    return all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
