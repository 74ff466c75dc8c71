"""What the words of the command line stand for, where several verbs take the same kinds."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from fusiontree.cli.places import model_folder
from fusiontree.errors import ConfigError

Number = TypeVar("Number", int, float)
THOUSANDS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}


class Precision(str, Enum):
    """What the model computes in."""

    stored = "stored"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def dtype_of(name: Precision) -> Any:
    """The torch type; None for the stored one."""
    import torch

    return None if name is Precision.stored else getattr(torch, name.value)


def model_place(model: str) -> str:
    """A model folder, the newest checkpoint of a run folder, or the hub name as it is."""
    return str(model_folder(Path(model))) if Path(model).is_dir() else model


def length(text: str) -> int:
    """Tokens: 4096 or 4K."""
    return int(text[:-1]) * 1024 if text[-1:] in ("K", "k") else int(text)


def amount(flag: str, text: str) -> float:
    """`10M` → 10 000 000; ConfigError that names `flag` for what is no number above 0."""
    number, unit = text[:-1], text[-1:].upper()
    if unit not in THOUSANDS:
        number, unit = text, ""
    try:
        value = float(number) * THOUSANDS[unit]
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ConfigError(f"{flag} {text!r}: must be a number above 0, with K, M or B behind it if wanted, as in 10M")
    return value


def numbers(flag: str, text: str, read: Callable[[str], Number]) -> tuple[Number, ...]:
    """The numbers of a list with commas; ConfigError that names `flag` for other words."""
    try:
        return tuple(read(part.strip()) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{flag} {text}: numbers divided by commas are allowed, such as 1K,4K") from None
