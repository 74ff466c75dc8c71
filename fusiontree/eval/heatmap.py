"""Tables of two dimensions (length × depth, size × place): made from scored samples, printed, drawn as heat maps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusiontree.errors import DataError
from fusiontree.eval.task import Scored

COLOURS = ("#a63a1e", "#e39a62", "#f2e6c9", "#73bdb4", "#0a6f6a")  # 0 % to 100 %: no red against green
CELL_INCHES, MOST_INCHES = 0.32, 9.0
MOST_LABELS = 18
WRITTEN = 12  # rows and columns up to which every cell has its number written in it


def make_grid(scored: Sequence[Scored], row: str, column: str, score: str) -> dict[str, Any]:
    """The mean of a score in percent, by two facts of the samples.

    {"grid": score, "row": name, "rows": [...], "column": name, "columns": [...], "cells": [[percent or None]],
    "counts": [[samples]]}; rows and columns are numbers or names.
    """
    found: dict[tuple[float, float], list[float]] = defaultdict(list)
    for one in scored:
        found[one.sample.facts[row], one.sample.facts[column]].append(one.scores[score])
    rows, columns = (sorted({place[axis] for place in found}) for axis in (0, 1))
    return {
        "grid": score,
        "row": row,
        "rows": rows,
        "column": column,
        "columns": columns,
        "cells": [[_percent(found.get((r, c), [])) for c in columns] for r in rows],
        "counts": [[len(found.get((r, c), [])) for c in columns] for r in rows],
    }


def _percent(values: list[float]) -> float | None:
    return round(100 * sum(values) / len(values), 2) if values else None


def is_grid(table: Any) -> bool:
    """Whether this table of a summary was made by `make_grid`."""
    return isinstance(table, Mapping) and {"grid", "row", "rows", "column", "columns", "cells"} <= set(table)


def grid_lines(grid: Mapping[str, Any]) -> list[str]:
    """The grid as lines of a Markdown table, a row per line."""
    head = [f"{grid['row']} \\ {grid['column']}", *map(_label, grid["columns"])]
    lines = [" | ".join(head), " | ".join(["---:"] * len(head))]
    for value, cells in zip(grid["rows"], grid["cells"], strict=True):
        lines.append(" | ".join([_label(value), *("–" if cell is None else f"{cell:.0f}" for cell in cells)]))
    return [f"| {line} |" for line in lines]


def draw_grids(tables: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """A PNG for each grid among the tables of a summary: `folder/stem_name.png`."""
    paths = []
    for name, table in tables.items():
        if is_grid(table):
            path = folder / f"{stem.replace(':', '_')}_{name}.png"
            folder.mkdir(parents=True, exist_ok=True)
            draw_heatmap(table, path, f"{stem}: {table['grid'].replace('_', ' ')}, %")
            paths.append(path)
    return paths


def draw_heatmap(grid: Mapping[str, Any], path: Path, title: str) -> None:
    """Write one grid as a PNG, 0 to 100 %; a cell without samples stays white. Raises DataError for an empty grid."""
    if not grid["cells"]:
        raise DataError(f"{path}: no cell to draw")
    # The figure alone, without pyplot: nothing global, and no display is looked for.
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    cells = [[float("nan") if cell is None else cell for cell in line] for line in grid["cells"]]
    width, height = (min(CELL_INCHES * count, MOST_INCHES) for count in (len(cells[0]), len(cells)))
    figure = Figure(figsize=(max(width, 2.0) + 2.4, max(height, 1.2) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("recall", COLOURS)
    image = axes.imshow(cells, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="%")
    axes.set_title(title, fontsize=10)
    axes.set(xlabel=_axis(grid["column"]), ylabel=_axis(grid["row"]))
    for axis, values in ((axes.xaxis, grid["columns"]), (axes.yaxis, grid["rows"])):
        step = -(-len(values) // MOST_LABELS)
        axis.set_ticks(range(0, len(values), step), list(map(_label, values[::step])), fontsize=7)
    axes.tick_params(axis="x", rotation=90 if len(grid["columns"]) > 6 else 0)
    if max(len(cells), len(cells[0])) <= WRITTEN:
        _write_numbers(axes, grid["cells"])
    figure.savefig(path, dpi=150, facecolor="white")


def _label(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _axis(name: str) -> str:
    return {"length": "length, tokens", "depth": "depth, %"}.get(name, name)


def _write_numbers(axes: Any, cells: Sequence[Sequence[float | None]]) -> None:
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            if cell is not None:
                colour = "white" if cell < 20 or cell > 85 else "black"
                axes.text(x, y, f"{cell:.0f}", ha="center", va="center", fontsize=7, color=colour)
