"""Sizes of a preset that come to a wanted number of parameters, or of FLOPs per token."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fusiontree.errors import ConfigError
from fusiontree.models.accounting import account
from fusiontree.models.config import HybridConfig
from fusiontree.models.presets import preset

_CLOSE = 0.05  # farther off than this is no solution
_STEP = 8  # of the MLP's inner size
_WIDEST = 32768
_NEIGHBOURS = 4
_SHAPE_WEIGHT = 0.01  # how much error one factor of e away from the usual shape is worth


@dataclass(frozen=True)
class Solved:
    """A configuration, and how closely it meets what was asked."""

    config: HybridConfig
    what: str  # "parameters" or "FLOPs per token"
    asked: float
    got: float

    @property
    def off(self) -> float:
        """Relative, positive where there is more than was asked."""
        return self.got / self.asked - 1

    def __str__(self) -> str:
        return f"{self.got:,.0f} {self.what}, {self.off:+.2%} from the {self.asked:,.0f} asked"


def solve(
    name: str, *, params: float | None = None, flops: float | None = None, length: int = 1024, **overrides: Any
) -> Solved:
    """The preset `name` in the size that comes closest to `params` parameters (embeddings included), or to `flops`
    forward FLOPs per token at `length` tokens.

    Varied, where `overrides` leaves it open: hidden_size, num_hidden_layers, num_attention_heads (of 128, 64, 32 or 16
    channels), mamba_head_dim and at last the MLP's inner size. Raises ConfigError where nothing comes within 5%.
    """
    if (params is None) == (flops is None):
        raise ConfigError("solve: give params or flops, one of them")
    asked = params if params is not None else flops
    if not isinstance(asked, (int, float)) or not 0 < asked < math.inf:
        raise ConfigError(f"solve: {asked!r} must be a positive number")
    what = "parameters" if flops is None else "FLOPs per token"

    def measure(config: HybridConfig) -> float:
        counted = account(config, length)
        return counted.total_parameters if flops is None else counted.flops_per_token

    found = [
        Solved(config, what, asked, measure(config)) for config in _candidates(name, asked, measure, dict(overrides))
    ]
    best = min(found, key=_badness)
    if abs(best.off) > _CLOSE:
        raise ConfigError(_too_far(name, best, overrides))
    return best


def _candidates(
    name: str, asked: float, measure: Callable[[HybridConfig], float], fixed: dict[str, Any]
) -> Iterator[HybridConfig]:
    """For the widths around the one that fits at its usual depth: the depths around the one that fits, fine-tuned."""
    widths = _widths(fixed)
    for hidden in _around(widths, lambda width: measure(_usual(name, width, fixed)) >= asked):
        sizes = _sizes(name, hidden, fixed)
        for layers in _depths(name, asked, measure, sizes):
            yield _tuned(name, asked, measure, {**sizes, "num_hidden_layers": layers})


def _widths(fixed: dict[str, Any]) -> list[Any]:
    if "hidden_size" in fixed:
        return [fixed["hidden_size"]]
    heads = fixed.get("num_attention_heads")
    if isinstance(heads, int) and 0 < heads <= _WIDEST // 8:
        return [heads * size for size in range(8, _WIDEST // heads + 1, 8)]
    parts = ((16, 128, 16), (128, 512, 32), (512, 2048, 64), (2048, _WIDEST + 1, 128))
    return [width for part in parts for width in range(*part)]


def _around(widths: list[Any], enough: Callable[[Any], bool]) -> list[Any]:
    """The first width that is enough, found by halving, with its neighbours on either side."""
    first = bisect.bisect_left(widths, True, key=enough) if len(widths) > 1 else 0
    return widths[max(0, first - _NEIGHBOURS) : first + _NEIGHBOURS] or widths[-1:]


def _sizes(name: str, hidden: int, fixed: dict[str, Any]) -> dict[str, Any]:
    expand = fixed.get("mamba_expand", HybridConfig.mamba_expand)
    return {**_heads(hidden, expand), **fixed, "hidden_size": hidden}


def _usual(name: str, hidden: int, fixed: dict[str, Any]) -> HybridConfig:
    """A width with as many layers as are usual for it, unless they are fixed."""
    sizes = _sizes(name, hidden, fixed)
    layers = _fixed_depth(sizes) or max(2, round(hidden / _usual_shape(hidden)))
    return preset(name, **{**sizes, "num_hidden_layers": layers})


def _usual_shape(hidden: int) -> float:
    """Channels of width per layer: 64, and 128 at width 4096."""
    return max(64, hidden / 32)


def _heads(hidden: Any, expand: Any) -> dict[str, int]:
    """Head counts and sizes for a width, of both mixers; none for wrong types, which the config refuses."""
    if not isinstance(hidden, int) or not isinstance(expand, (int, float)):
        return {}
    size = next((size for size in ((128,) if hidden >= 4096 else ()) + (64, 32, 16) if hidden % size == 0), hidden)
    mamba = next((size for size in (64, 32, 16, 8) if round(expand * hidden) % size == 0), 1)
    return {"num_attention_heads": hidden // size, "mamba_head_dim": mamba}


def _fixed_depth(sizes: dict[str, Any]) -> Any:
    return sizes.get("num_hidden_layers") or len(sizes.get("layers") or ())


def _depths(name: str, asked: float, measure: Callable[[HybridConfig], float], sizes: dict[str, Any]) -> Iterator[Any]:
    """The depths around the one that fits; what is measured grows evenly with the depth."""
    if depth := _fixed_depth(sizes):
        yield depth
        return
    two, four = (measure(preset(name, **sizes, num_hidden_layers=n)) for n in (2, 4))
    guess = 2 + (asked - two) / ((four - two) / 2)
    yield from sorted({max(2, math.floor(guess)), max(2, math.ceil(guess))})


def _tuned(name: str, asked: float, measure: Callable[[HybridConfig], float], sizes: dict[str, Any]) -> HybridConfig:
    """With the MLP's inner size moved, by a quarter at most, to where the rest of the difference goes."""
    config = preset(name, **sizes)
    if "intermediate_size" in sizes or config.mlp_type == "none":
        return config
    inner, got = config.intermediate_size, measure(config)
    per_step = measure(preset(name, **sizes, intermediate_size=inner + _STEP)) - got
    steps = round((asked - got) / per_step)
    most = inner // 4 // _STEP
    moved = inner + _STEP * max(-most, min(most, steps))
    return preset(name, **sizes, intermediate_size=moved)


def _badness(solved: Solved) -> float:
    """The error, and a little for a shape far from the usual."""
    config = solved.config
    shape = config.hidden_size / config.num_hidden_layers / _usual_shape(config.hidden_size)
    return abs(solved.off) + _SHAPE_WEIGHT * abs(math.log(shape))


def _too_far(name: str, best: Solved, overrides: dict[str, Any]) -> str:
    config = best.config
    embedding = account(config).parameters["embedding"]
    held = f", with {', '.join(sorted(overrides))} fixed" if overrides else ""
    return (
        f"preset {name!r}: no sizes come within 5% of {best.asked:,.0f} {best.what}{held}; the nearest has "
        f"{best.got:,.0f} (hidden {config.hidden_size}, {config.num_hidden_layers} layers, embedding {embedding:,})"
    )
