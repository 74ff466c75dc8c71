"""A grid from a file, from the words of the command line, or both; what is not said stands in the shipped files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fusiontree.errors import ConfigError
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


def amount(flag: str, text: str) -> float:
    """A number with K, M, B or T behind it: 2.5M, 1e15."""
    sizes = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
    size = sizes.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if size > 1 else text) * size
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{flag} {text}: a positive number such as 2.5M is allowed")
    return value
