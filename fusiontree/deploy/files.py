"""Writing files so that no half of one is ever seen under its final name, and only where it was asked for."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusiontree.errors import FusionTreeError
from fusiontree.models.json_files import one_line


def write_text(path: Path, text: str, error: type[FusionTreeError]) -> None:
    """Write a UTF-8 file through a neighbour and a rename; on failure the old file stays and `error` names the path."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a link left here by others must not be followed
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as problem:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise error(f"{path}: cannot be written: {one_line(problem)}") from None


def write_json(path: Path, value: Any, error: type[FusionTreeError]) -> None:
    """Write readable JSON through `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", error)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def path_inside(folder: Path, name: str, error: type[FusionTreeError]) -> Path:
    """`folder/name` for a plain name; absolute paths, `..`, separators and symbolic links are refused with `error`."""
    if not name or name in {".", ".."} or Path(name).name != name or "\\" in name or "\0" in name:
        raise error(f"{one_line(repr(name), 80)}: a plain name without folders is needed, to stay inside {folder}")
    path = folder / name
    if path.is_symlink():
        raise error(f"{path}: is a symbolic link and might lead out of {folder}")
    return path


@contextlib.contextmanager
def new_folder(target: Path, mark: str, error: type[FusionTreeError]) -> Iterator[Path]:
    """Yield a temporary neighbour of `target` that takes its name when the block ends without an exception.

    `mark` is the name of a file that proves that an existing `target` was made by us and may be replaced.
    """
    check_replaceable(target, mark, error)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        if temporary.is_symlink():
            raise error(f"{temporary}: is a symbolic link; remove it")
        if temporary.exists():  # a killed run left it
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        _sync_files(temporary)
        _swap(temporary, target)
    except OSError as problem:
        raise error(f"{target}: cannot be written: {one_line(problem)}") from None
    finally:
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(target: Path, mark: str, error: type[FusionTreeError]) -> None:
    """Refuse a target that is a link, a file, or a folder with something in it that we did not make."""
    if target.is_symlink():
        raise error(f"{target}: is a symbolic link; give the folder itself")
    if not target.exists():
        return
    if not target.is_dir():
        raise error(f"{target}: is a file; give a folder")
    if any(target.iterdir()) and not (target / mark).is_file():
        raise error(f"{target}: is not empty and has no {mark}, so it was not made here; give a new folder")


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def _swap(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`; an old target is moved aside first and removed last."""
    old = target.with_name(f".{target.name}.old")
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    sync_folder(target.parent)
    if old.is_dir():
        shutil.rmtree(old)
