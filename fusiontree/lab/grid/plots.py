"""The pictures of a grid: loss while training, loss by length, memory by length, effects of changes."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from fusiontree.lab.canvas import COLOURS, HEIGHT, STYLE, new_axes, smooth
from fusiontree.lab.grid.tables import UNITS, cached_bytes
from fusiontree.lab.grid.view import View
from fusiontree.lab.run_folder import read_run, series

# Mid tones that stand out from each other on white and on black.
PALETTE = (
    "#3b7dd8", "#d8622b", "#0c8a84", "#b03a9c", "#b8860b", "#6a5acd", "#4c9a2a", "#c0392b", "#5d8aa8", "#8d6e63",
)  # fmt: skip
CACHE_LENGTHS = tuple(1 << power for power in range(8, 18))


def draw(view: View, folder: Path) -> dict[str, Figure]:
    """Every picture there is something for, by name; curves are read from the run folders below `folder`."""
    with mpl.rc_context(STYLE):
        figures = {
            "loss_curves": _loss_curves(view, folder),
            "loss_by_length": _loss_by_length(view),
            "memory_by_length": _memory_by_length(view),
            "effects": _effects(view) if view.ablates else None,
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _colour(view: View, name: str) -> str:
    return PALETTE[view.names.index(name) % len(PALETTE)]


def _legend(axes: Axes, entries: int) -> None:
    axes.legend(loc="best", fontsize=8 if entries <= 8 else 6, ncols=1 if entries <= 6 else 2)


def _loss_curves(view: View, folder: Path) -> Figure | None:
    """Held-out loss over tokens where there are enough points, else the smoothed training loss; first seed."""
    figure, axes = new_axes(1.3 * HEIGHT)
    drawn = []
    for name in view.names:
        for run in view.runs(name)[:1]:
            read = read_run(folder / "runs" / name / f"seed-{run['seed']}")
            steps, values = series(read.training, "lm_loss" if "lm_loss" in (read.training or [{}])[0] else "loss")
            if len(steps) > 1:
                axes.plot(steps, smooth(values), color=_colour(view, name), linewidth=1.4, label=name)
                drawn.append(values)
    if not drawn:
        return None
    low = min(float(np.nanmin(values)) for values in drawn)
    high = max(float(np.nanpercentile(values, 97)) for values in drawn)
    axes.set(xlabel="step", ylabel="nats per token", ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)))
    _legend(axes, len(drawn))
    return figure


def _loss_by_length(view: View) -> Figure | None:
    length = view.grid["training"]["sequence_length"]
    figure, axes = new_axes(1.2 * HEIGHT)
    drawn = 0
    ticks: set[int] = set()
    for name in view.names:
        points = []
        for multiple in sorted({int(key) for run in view.runs(name) for key in run["by_length"]}):
            value = view.loss_at(name, multiple)
            if value is not None:
                points.append((multiple * length, value.mean, value.error or 0.0))
        if len(points) < 2:
            continue
        x, y, error = zip(*points, strict=True)
        axes.errorbar(x, y, yerr=error, fmt="o-", color=_colour(view, name), markersize=3.2, linewidth=1.4, label=name)
        ticks |= set(x)
        drawn += 1
    if not drawn:
        return None
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
    axes.set(xlabel="tokens in a row", ylabel="nats per token")
    _legend(axes, drawn)
    return figure


def _memory_by_length(view: View) -> Figure:
    figure, axes = new_axes(1.2 * HEIGHT)
    highest = 1.0
    for name in view.names:
        sizes = [cached_bytes(view, name, length) for length in CACHE_LENGTHS]
        axes.plot(CACHE_LENGTHS, sizes, color=_colour(view, name), linewidth=1.4, label=name)
        highest = max(highest, *sizes)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_xticks(CACHE_LENGTHS[::3], [f"{length // 1024}K" if length >= 1024 else str(length)
                                         for length in CACHE_LENGTHS[::3]])  # fmt: skip
    axes.yaxis.set_major_formatter(lambda value, _: _bytes(value))
    axes.set(xlabel="tokens of context", ylabel="cache and state")
    _legend(axes, len(view.names))
    return figure


def _bytes(value: float) -> str:
    unit, name = next(((unit, name) for unit, name in UNITS if value >= unit), (1, "B"))
    return f"{value / unit:g} {name}"


def _effects(view: View) -> Figure | None:
    found = [(name, effect) for name in view.names[1:] if (effect := view.effect(name)) is not None]
    if not found:
        return None
    figure, axes = new_axes(max(HEIGHT, 0.9 + 0.24 * len(found)))
    for row, (name, effect) in enumerate(found):
        error = 0.0 if effect.error is None or math.isnan(effect.error) else effect.error
        axes.errorbar(
            [effect.mean], [row], xerr=[error], fmt="o", color=_colour(view, name), markersize=4, linewidth=1.6
        )
    axes.axvline(0, color=COLOURS["muted"], linewidth=0.8)
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel="effect on the loss, nats per token", ylim=(len(found) - 0.5, -0.5))
    return figure
