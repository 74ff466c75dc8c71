"""Heat maps of a gate record: layers down, channels or positions across. Orange is attention, teal is Mamba."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

COLOURS = ("#d8622b", "#f2efe9", "#0c8a84")  # 0 all attention, 0.5, 1 all Mamba
LEAST_REACH = 0.05
WITHOUT = "#b9c0c8"  # a layer without gate


def draw_gates(record: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files by name: `channels` and `positions`."""
    layers = record["layers"]
    return {
        "channels": _heatmap(_cells(layers, "channel_mean"), "channel, grouped", None),
        "positions": _heatmap(
            _cells(layers, "position_mean"), "position in the document, tokens", record["position_edges"]
        ),
    }


def _cells(layers: Sequence[Mapping[str, Any]], key: str) -> list[list[float | None]]:
    """A row per layer, of None where there is no gate."""
    found = [layer["gate"][key] if layer["gate"] else [] for layer in layers]
    width = max(map(len, found))
    return [row or [None] * width for row in found]


def _heatmap(cells: list[list[float | None]], across: str, edges: list[int] | None) -> bytes:
    # The figure alone, without pyplot: nothing global, and no display is looked for.
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    values = [[float("nan") if cell is None else cell for cell in row] for row in cells]
    figure = Figure(figsize=(8.0, min(1.6 + 0.24 * len(cells), 12.0)), layout="constrained")
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("gate", COLOURS)
    axes.set_facecolor(WITHOUT)  # seen through the cells that have no value
    # As wide a range as the gates use, with 0.5 in its middle: those of a young model all lie near it.
    reach = max(LEAST_REACH, *(abs(cell - 0.5) for row in cells for cell in row if cell is not None))
    low, high = 0.5 - reach, 0.5 + reach
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, ticks=[low, 0.5, high])
    bar.ax.set_yticklabels([f"{low:.2f} attention", "0.50", f"{high:.2f} Mamba"])
    axes.set(xlabel=across, ylabel="layer")
    step = -(-len(cells) // 18)
    axes.yaxis.set_ticks(range(0, len(cells), step))
    if edges is not None:
        every = max(1, (len(edges) - 1) // 8)
        marks = list(range(0, len(edges) - 1, every))
        axes.xaxis.set_ticks([mark - 0.5 for mark in marks], [str(edges[mark]) for mark in marks])
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120, facecolor="white")
    return file.getvalue()
