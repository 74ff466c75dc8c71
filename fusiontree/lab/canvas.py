"""The look of the pictures: colours, sizes, and turning a figure into PNG or into SVG that follows light and dark."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Each colour here has a CSS variable of the same name in report.css, so that one SVG follows light and dark.
COLOURS = {
    "ink": "#1d2733",
    "muted": "#66727f",
    "grid": "#e4e8ed",
    "mamba": "#0c8a84",
    "attention": "#d8622b",
    "faint": "#a9b8c8",
    "accent": "#4a5bd0",
}
LABELS = {"mamba": "Mamba", "attention": "attention"}
GATE_COLOURS = LinearSegmentedColormap.from_list("gate", ["#d8622b", "#edae86", "#c5c8c6", "#73bdb4", "#0c8a84"])
WIDTH, HEIGHT = 4.2, 2.45  # inches; text of 9 points stays readable when a phone shows the picture 340 pixels wide
STYLE = {
    "font.size": 9,
    "axes.edgecolor": COLOURS["grid"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.7,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"],
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "fusiontree",
    "text.parse_math": False,
}


def new_axes(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one plot in the house style."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", visible=False)
    return figure, axes


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a fortieth of the run; at the ends over what is there."""
    half = min(max(2, len(values) // 80), (len(values) - 1) // 2)  # never wider than the data
    window = np.ones(2 * half + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def save_png(figure: Figure, path: Path) -> None:
    """Write a PNG with a white background, 200 dots per inch."""
    with mpl.rc_context(STYLE):
        figure.savefig(path, dpi=200, facecolor="white")


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element whose colours are CSS variables; `description` is plain text without markup."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{colour})")
    # Several pictures share the page: ids must not meet.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1))
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
