"""The curves of the task `perplexity`: by context length and by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOUR, BAND = "#0a6f6a", "#73bdb4"


def draw_curves(tables: Mapping[str, Any], path: Path, title: str) -> None:
    """Write a PNG with two panels: bits per byte by context length, nats per token by how many tokens were seen.

    `tables`: `by_length` and `by_position` as the task gives them; bars are standard errors.
    """
    # The figure alone, without pyplot: nothing global, and no display is looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths, positions = tables["by_length"], tables["by_position"]
    _curve(left, [row["length"] for row in lengths], lengths, "bits_per_byte")
    left.set(xlabel="context length, tokens", ylabel="bits per byte")
    _curve(right, [(row["from"] * row["to"]) ** 0.5 for row in positions], positions, "loss")
    right.set(xlabel="tokens seen before", ylabel="loss, nats per token")
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")


def _curve(axes: Any, places: Sequence[float], rows: Sequence[Mapping[str, Any]], value: str) -> None:
    errors = [row[f"{value}_error"] or 0.0 for row in rows]  # None for a single window
    axes.errorbar(places, [row[value] for row in rows], errors, color=COLOUR, ecolor=BAND, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
