"""Means and their errors: over windows of held-out text, over seeds, and of differences between paired runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from fusiontree.eval.results import mean_and_error

WINDOW, LEAST, FACTOR = 64, 8, 3.0  # of gradient norms: what is usual, when it begins to be, what stands out


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error (None where it cannot be known), and over what."""

    mean: float
    error: float | None
    over: str  # "seeds" or "windows"


def of_windows(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Mean per token over windows with so many nats and tokens, and its standard error (a ratio of two sums)."""
    tokens, windows = sum(counts), len(counts)
    mean = math.fsum(sums) / tokens
    if windows < 2:
        return mean, None
    squares = math.fsum((total - mean * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(squares * windows / (windows - 1)) / tokens


def of_seeds(values: Sequence[float], single_error: float | None) -> Estimate:
    """Mean over the seeds with its standard error; of a single one the error that its own windows give."""
    found = mean_and_error(values)
    mean, error = found["mean"], found["standard_error"]
    assert mean is not None
    return Estimate(mean, single_error, "windows") if len(values) == 1 else Estimate(mean, error, "seeds")


def paired(values: Sequence[float], base: Sequence[float]) -> tuple[float, float | None]:
    """Mean difference between two runs that share their seeds, and its standard error."""
    found = mean_and_error([value - other for value, other in zip(values, base, strict=True)])
    mean = found["mean"]
    assert mean is not None
    return mean, found["standard_error"]


def gradient_spikes(norms: Sequence[float]) -> int:
    """Steps whose gradient norm is more than three times the median of the 64 before, or not finite."""
    count = 0
    for place, norm in enumerate(norms):
        before = [other for other in norms[max(0, place - WINDOW) : place] if math.isfinite(other)]
        count += not math.isfinite(norm) or (len(before) >= LEAST and norm > FACTOR * median(before))
    return count
