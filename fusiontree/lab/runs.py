"""Lists the runs under a folder: what state each is in and how far it came.

Reads the ends of a few small files of each run, so a thousand runs take seconds; needs neither torch nor numpy.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fusiontree.errors import DataError

State = Literal["running", "finished", "interrupted", "failed", "never started", "not a run", "unreadable"]
ENDED = ("finished", "interrupted", "failed")  # what state.json may say of a run that nobody holds

DEPTH = 3  # folders below the given one in which runs are looked for
TAIL = 4 << 20  # bytes of metrics.jsonl that are read, from its end
LARGEST = 16 << 20  # bytes of a JSON or YAML file: more is not ours
_STEP = re.compile(r"step-(\d{8,})")


@dataclass
class RunRow:
    """One run; None where nothing is known."""

    name: str  # the folder, as seen from the one that is listed
    state: State = "never started"
    step: int | None = None
    steps: int | None = None
    loss: float | None = None  # of the last logged step, nats per token
    best_validation_loss: float | None = None
    tokens: int | None = None
    seconds: float | None = None  # of training
    changed: float | None = None  # Unix time of the last change
    bytes: int = 0  # on disk
    notes: list[str] = field(default_factory=list)  # why it failed, what is damaged


def list_runs(folder: str | Path) -> list[RunRow]:
    """The runs below `folder` (or `folder` itself), the last changed first; foreign folders are rows that say so.

    Raises DataError when `folder` cannot be listed.
    """
    root = Path(folder)
    try:
        places = [root] if is_run(root) else _places(root, DEPTH)
    except OSError as error:
        raise DataError(f"runs: {root}: {_why(error)}; give the folder that holds the runs") from error
    rows = [read_row(place, place.name if place == root else str(place.relative_to(root))) for place in places]
    return sorted(rows, key=lambda row: (-(row.changed or 0.0), row.name))


def is_run(folder: Path) -> bool:
    """Whether training wrote here: it locks the folder first and logs from the first step on."""
    if any((folder / name).exists() for name in (".lock", "metrics.jsonl", "state.json")):
        return True
    return (folder / "config.yaml").exists() and (folder / "checkpoints").is_dir()


def read_row(folder: Path, name: str) -> RunRow:
    """What is known of one folder."""
    row = RunRow(name)
    try:
        if is_run(folder):
            _fill(row, folder)
            row.bytes = _bytes(folder)
        else:
            row.state = "not a run"
            row.changed = folder.stat().st_mtime
    except OSError as error:
        row.state = "unreadable"
        row.notes.append(_why(error))
    return row


def is_locked(folder: Path) -> bool:
    """Whether a process is training in the folder at this moment."""
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _places(folder: Path, depth: int) -> list[Path]:
    """Runs below a folder and folders that cannot be read; at the top also those in which there is no run."""
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        try:
            inside = [path] if is_run(path) else _places(path, depth - 1) if depth > 1 else []
        except OSError:
            inside = [path]  # its row says why
        found += inside or ([path] if depth == DEPTH else [])
    return found


def _fill(row: RunRow, folder: Path) -> None:
    told = _object(row, folder, "state.json")
    summary = _object(row, folder, "summary.json")
    progress = _object(row, folder, _newest_state(folder)).get("progress")
    saved = progress if isinstance(progress, dict) else {}
    last, validations = _metrics(row, folder)
    steps = [_whole(source.get("step")) for source in (last, told, summary, saved)]
    row.step = max((step for step in steps if step is not None), default=None)
    row.steps = _whole(told.get("steps")) or _configured_steps(row, folder)
    row.loss = _number(last.get("loss"))
    if "loss" in last and row.loss is None:
        row.notes.append("the last loss is not finite")
    best = summary.get("best")
    known = [best.get("validation_loss") if isinstance(best, dict) else None, saved.get("best_validation_loss")]
    found = [value for item in (*known, *validations) if (value := _number(item)) is not None]
    row.best_validation_loss = min(found, default=None)
    row.tokens = _whole(last.get("tokens")) or _whole(summary.get("tokens"))
    row.seconds = _number(last.get("elapsed")) or _number(summary.get("elapsed"))
    names = ("", "metrics.jsonl", "state.json", "summary.json", "checkpoints")
    row.changed = max(path.stat().st_mtime for name in names if (path := folder / name).exists())
    row.state = _state(row, told, summary, is_locked(folder))


def _state(row: RunRow, told: dict[str, Any], summary: dict[str, Any], locked: bool) -> State:
    """From the lock, then from what the run said when it ended, then from what it left."""
    if locked:
        return "running"
    said = told.get("state")
    if said in ENDED:
        if isinstance(told.get("error"), str):
            row.notes.append(" ".join(told["error"].split()))
        ended: State = said
        return ended
    if said == "running":
        row.notes.append("ended without a word: killed, or the machine went down")
    elif summary and _whole(summary.get("step")) == row.step:
        return "interrupted" if summary.get("interrupted") is True else "finished"
    return "interrupted" if row.step or said == "running" else "never started"


def _metrics(row: RunRow, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """The last training line, and every validation loss in what was read."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}, []
    lines = _tail(path)
    validations = [_line(text).get("validation_loss") for text in lines if b'"validation_loss"' in text]
    damaged = 0
    for text in reversed(lines):
        line = _line(text)
        if "loss" in line:
            break
        damaged += not line
    else:
        line = {}
    if damaged:
        row.notes.append("metrics.jsonl ends in damaged lines")
    return line, validations


def _tail(path: Path) -> list[bytes]:
    """The whole lines in the last bytes of a file."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        lines = file.read(TAIL).split(b"\n")
    return [line for line in (lines[1:] if size > TAIL else lines) if line]


def _line(text: bytes) -> dict[str, Any]:
    """One JSON object, empty when the line is damaged."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _newest_state(folder: Path) -> str:
    """The counters of the newest checkpoint, whether it verifies or not."""
    root = folder / "checkpoints"
    names = [entry.name for entry in os.scandir(root)] if root.is_dir() else []
    newest = max((name for name in names if _STEP.fullmatch(name)), key=lambda name: int(name[5:]), default="")
    return f"checkpoints/{newest}/trainer/state.json"


def _object(row: RunRow, folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the run; a damaged one is noted and empty."""
    try:
        with (folder / name).open("rb") as file:
            text = file.read(LARGEST)
    except FileNotFoundError:
        return {}
    value = _line(text)
    if not value:
        row.notes.append(f"{name} is damaged")
    return value


def _configured_steps(row: RunRow, folder: Path) -> int | None:
    """`training.steps` of the settings; None where there are none yet."""
    try:
        with (folder / "config.yaml").open("rb") as file:
            content = yaml.load(file.read(LARGEST), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return _whole(content["training"]["steps"])
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, RecursionError):
        row.notes.append("config.yaml is damaged")
        return None


def _bytes(folder: Path) -> int:
    """Disk space of all files below; what vanishes meanwhile (a checkpoint being replaced) counts nothing."""
    total = 0
    try:
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                total += _bytes(Path(entry.path))
            else:
                total += entry.stat(follow_symlinks=False).st_blocks * 512  # POSIX: blocks of 512 bytes
    except FileNotFoundError:
        return total
    return total


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number >= 0 and number == int(number) else None


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
