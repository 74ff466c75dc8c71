"""The pictures of an evaluation: heat maps of grids, curves of perplexity, bars of a family's tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusiontree.eval.heatmap import draw_grids

COLOUR, BAND = "#0a6f6a", "#73bdb4"
BAR_INCHES = 0.22


def draw_plots(
    results: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Mapping[str, Any]], folder: Path, model: str
) -> list[Path]:
    """A PNG for whatever can be drawn of results by task and of groups by family; the paths."""
    pictures = []
    for name, result in (*results.items(), *groups.items()):
        pictures += draw_grids(result["tables"], folder, name)
    for name, result in results.items():
        if {"by_length", "by_position"} <= result["tables"].keys():
            pictures.append(folder / f"{name}.png")
            draw_curves(result["tables"], pictures[-1], f"{model}: {name}")
    for name, group in groups.items():
        pictures.append(folder / f"{name}.png")
        draw_bars(group["tasks"], pictures[-1], f"{model}: {name}")
    return pictures


def draw_bars(tasks: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> None:
    """Write a PNG with a bar per task: its main metric, in percent, with the standard error where there is one.

    `tasks`: {name: {"metric", "value", "error"}}.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, BAR_INCHES * len(tasks) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    values, errors = ([task[key] or 0.0 for task in tasks.values()] for key in ("value", "error"))
    axes.barh(range(len(tasks)), values, xerr=errors, color=BAND, ecolor=COLOUR)
    labels = [f"{name.partition(':')[2]} ({task['metric']})" for name, task in tasks.items()]
    axes.set_yticks(range(len(tasks)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="%")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path, title)


def draw_curves(tables: Mapping[str, Any], path: Path, title: str) -> None:
    """Write a PNG with two panels: bits per byte by context length, nats per token by how many tokens were seen.

    `tables`: `by_length` and `by_position` as the task gives them; bars are standard errors.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths, positions = tables["by_length"], tables["by_position"]
    _curve(left, [row["length"] for row in lengths], lengths, "bits_per_byte")
    left.set(xlabel="context length, tokens", ylabel="bits per byte")
    _curve(right, [(row["from"] * row["to"]) ** 0.5 for row in positions], positions, "loss")
    right.set(xlabel="tokens seen before", ylabel="loss, nats per token")
    _save(figure, path, title)


def _curve(axes: Any, places: Sequence[float], rows: Sequence[Mapping[str, Any]], value: str) -> None:
    errors = [row[f"{value}_error"] or 0.0 for row in rows]  # None for a single window
    axes.errorbar(places, [row[value] for row in rows], errors, color=COLOUR, ecolor=BAND, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)


def _save(figure: Any, path: Path, title: str) -> None:
    # A figure alone, without pyplot: nothing global, and no display is looked for.
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
