"""Reading JSON that others made: sizes are checked first, and what is not JSON by the letter is refused."""

import json
import math
from pathlib import Path
from typing import Any

from fusiontree.errors import FusionTreeError


def one_line(text: object, limit: int = 300) -> str:
    """`text` on a single line of at most `limit` characters, for error messages that quote others."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def read_json(path: Path, max_bytes: int, error: type[FusionTreeError]) -> Any:
    """The value in a JSON file of at most `max_bytes`; NaN, infinity and repeated keys are refused with `error`."""
    try:
        if not path.is_file():
            raise error(f"{path}: there is no such file")
        size = path.stat().st_size
        if size > max_bytes:
            raise error(f"{path}: {size:,} bytes are too many; at most {max_bytes:,} are allowed")
        return _loads(path.read_bytes().decode("utf-8"))
    except OSError as problem:
        raise error(f"{path}: cannot be read: {one_line(problem)}") from None
    except RecursionError:
        raise error(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as problem:
        raise error(f"{path}: not valid JSON: {one_line(problem)}") from None


def read_json_lines(path: Path, error: type[FusionTreeError]) -> list[Any]:
    """The values of a JSONL file, one per line; a last line without its newline was cut by a kill and is left out."""
    try:
        whole_lines = path.read_bytes().decode("utf-8").split("\n")[:-1]
        return [_loads(line) for line in whole_lines if line.strip()]
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path}: cannot be read as JSON lines: {one_line(problem)}") from None


def _loads(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON allows")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} is given twice")
    return result
