"""A file of JSON lines that a resumed run continues without a gap or a repeated step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends one JSON object per line, each with a `step`; `writes`: not in all of several processes."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line; figures that are not finite become null, which every JSON reader takes."""
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(line), allow_nan=False) + "\n")

    def trim(self, step: int) -> None:
        """Drop lines after `step` and a last line cut short: the resumed run writes them again."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        fresh = self.path.with_name(self.path.name + ".tmp")
        fresh.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(fresh, self.path)


def _step_of(line: str) -> float:
    """The line's step; infinite for a line that is not whole."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
