"""A grid from a file, from the words of the command line, or both; what is not said stands in the shipped files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fusiontree.lab.grid.config import AblateConfig, CompareConfig, GridConfig, parse_grid
from fusiontree.train.config import apply_override, read_overridden

KINDS: dict[str, type[GridConfig]] = {"compare": CompareConfig, "ablate": AblateConfig}


def read_grid(kind: str, file: Path | None, options: Mapping[str, Any], overrides: Sequence[str] = ()) -> GridConfig:
    """The grid in `file`, else the shipped one of its kind, with options by dotted name and overrides on top."""
    if file is not None:
        content, where = read_overridden(file), str(file)
    else:
        with resources.as_file(resources.files("fusiontree.lab.grid").joinpath(f"{kind}.yaml")) as shipped:
            content, where = read_overridden(shipped), kind
    for name, value in options.items():
        _put(content, name.split("."), value)
    for override in overrides:
        apply_override(content, override)
    return parse_grid(KINDS[kind], content, where)


def _put(content: dict[str, Any], keys: list[str], value: Any) -> None:
    *sections, last = keys
    for key in sections:
        if content.get(key) is None:
            content[key] = {}
        content = content[key]
    content[last] = value
