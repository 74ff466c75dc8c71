"""Results kept as they are made: JSON lines behind a header that says what they are results of. A kill loses nothing.

{"task": "needle", "version": 1, "model": "sha256:…", …}     header: must be the same to go on
{"id": "1024-50", "output": "…", "scores": {…}, …}           one line per record
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusiontree.errors import ConfigError, DataError


class Journal:
    """Opens `path` and reads what is there; ConfigError when it was made with another header, DataError when damaged.

    A last line that a kill cut off is removed: its record was never promised.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        header = json.loads(json.dumps(header))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = _whole_lines(path)
            if lines:
                _check_header(path, lines[0], header)
                self.records = lines[1:]
            else:
                self.append([header])
                self.records = []
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from None

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep records: on the disk when this returns."""
        text = "".join(f"{to_json(record)}\n" for record in records)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.records += [dict(record) for record in records]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the file; what stands behind the last newline is cut off the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise DataError(f"{path}:{number}: not JSON; the file was changed from outside: remove it") from None
    return lines


def _check_header(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in dict.fromkeys((*wanted, *found)):
        if found.get(key) != wanted.get(key):
            raise ConfigError(
                f"{path}: was begun with {key} {to_json(found.get(key))}, now it is {to_json(wanted.get(key))}; "
                "give another --out, or remove the file"
            )


def to_json(value: Any) -> str:
    """JSON in one line; what is not finite becomes null."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    """The same with null for every NaN and infinity, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file through a neighbour and a rename; DataError when it cannot be."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """A whole JSONL file at once."""
    write_whole(path, "".join(f"{to_json(record)}\n" for record in records))
