"""Keep an op's own choice of precision under any autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with autocast off on the device of its first argument, a tensor."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device.type  # type: ignore[attr-defined]
        if not _enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products with x run in: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if _enabled(device) else x.dtype


def _enabled(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # a model without memory knows no autocast
