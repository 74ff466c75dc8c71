"""The pictures of a run: learning curves, gates and branches."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from fusiontree.lab.canvas import COLOURS, GATE_COLOURS, HEIGHT, LABELS, STYLE, new_axes, smooth
from fusiontree.lab.run_folder import Row, RunFolder, number, probe_series, series

TIME_COLUMNS = 300  # more columns than a heat map of this width can show would only make the page heavy


def draw(run: RunFolder) -> dict[str, Figure]:
    """Every picture the run has data for, by name."""
    makers = {
        "loss": _loss,
        "learning_rate": _learning_rate,
        "throughput": _throughput,
        "gradient_norm": _gradient_norm,
        "perplexity": _perplexity,
        "recall": _recall,
        "healing": _healing,
        "gate_heatmap": _gate_heatmap,
        "gate_distribution": _gate_distribution,
        "gate_by_class": _gate_by_class,
        "branch_norms": _branch_norms,
        "branch_norms_by_layer": _branch_norms_by_layer,
    }
    with mpl.rc_context(STYLE):
        figures = {name: make(run) for name, make in makers.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _training_loss(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    return series(rows, "lm_loss" if any("lm_loss" in row for row in rows) else "loss")


def _healing(run: RunFolder) -> Figure | None:
    steps, values = _training_loss(run.healing)
    if len(steps) < 2:
        return None
    figure, axes = new_axes()
    axes.plot(steps, values, color=COLOURS["faint"], linewidth=0.8, alpha=0.8)
    axes.plot(steps, smooth(values), color=COLOURS["accent"], linewidth=1.8)
    axes.set(xlabel="step of healing", ylabel="nats per token")
    return figure


def _loss(run: RunFolder) -> Figure | None:
    steps, values = _training_loss(run.training)
    checked_at, checked = series(run.validation, "validation_loss")
    if len(steps) + len(checked_at) == 0:
        return None
    figure, axes = new_axes()
    if len(steps):
        axes.plot(steps, values, color=COLOURS["faint"], linewidth=0.8, alpha=0.8)
        axes.plot(steps, smooth(values), color=COLOURS["accent"], linewidth=1.8, label="training")
    if len(checked_at):
        axes.plot(checked_at, checked, "o-", color=COLOURS["mamba"], markersize=3.2, linewidth=1.4, label="validation")
        end = (checked_at[-1], checked[-1])
        axes.annotate(f"{checked[-1]:.3f}", end, (0, 9), textcoords="offset points", ha="right")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend(loc="upper right")
    return figure


def _line(run: RunFolder, key: str, label: str, noisy: bool = False) -> Figure | None:
    steps, values = series(run.training, key)
    if not len(steps):
        return None
    figure, axes = new_axes()
    if noisy:
        axes.plot(steps, values, color=COLOURS["faint"], linewidth=0.8, alpha=0.8)
        values = smooth(values)
    axes.plot(steps, values, color=COLOURS["accent"], linewidth=1.6)
    axes.set(xlabel="step", ylabel=label)
    axes.set_ylim(bottom=0)
    return figure


def _learning_rate(run: RunFolder) -> Figure | None:
    figure = _line(run, "lr", "learning rate")
    if figure is not None:
        figure.axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure


def _throughput(run: RunFolder) -> Figure | None:
    figure = _line(run, "tokens_per_second", "tokens per second", noisy=True)
    if figure is not None:
        figure.axes[0].yaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _gradient_norm(run: RunFolder) -> Figure | None:
    return _line(run, "grad_norm", "gradient norm", noisy=True)


def _probe(run: RunFolder, name: str, label: str, unit: str) -> Figure | None:
    """One curve per number in the probe's figures, the larger the darker."""
    found = probe_series(run.probes, name)
    if not found:
        return None
    figure, axes = new_axes()
    for place, (number_of, (steps, values)) in enumerate(found.items(), 1):
        strength = 0.25 + 0.75 * place / len(found)
        axes.plot(
            steps, values, "o-", color=COLOURS["accent"], alpha=strength, markersize=3.2, linewidth=1.4,
            label=f"{number_of:,} {unit}",
        )  # fmt: skip
    axes.set(xlabel="step", ylabel=label)
    axes.legend(loc="best")
    return figure


def _perplexity(run: RunFolder) -> Figure | None:
    figure = _probe(run, "perplexity", "perplexity", "tokens")
    if figure is not None:
        axes = figure.axes[0]
        low, high = axes.dataLim.intervaly
        if low > 0 and high > 10 * low:  # a closer look would show no round number on a logarithmic scale
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    return figure


def _recall(run: RunFolder) -> Figure | None:
    figure = _probe(run, "recall", "share found", "pairs")
    if figure is not None:
        figure.axes[0].set_ylim(-0.03, 1.03)
    return figure


def _layer_table(run: RunFolder, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) and the value of `key` per record and layer (n, layers), NaN where a layer lacks it."""
    steps = np.array([number(record, "step") for record in run.gates])
    count = 1 + max((_layer_index(entry) for record in run.gates for entry in record["layers"]), default=-1)
    table = np.full((len(steps), count), np.nan)
    for row, record in zip(table, run.gates, strict=True):
        for entry in record["layers"]:
            row[_layer_index(entry)] = number(entry, key)
    return steps, table


def _layer_index(entry: Row) -> int:
    return int(entry["layer"])


def _gate_heatmap(run: RunFolder) -> Figure | None:
    steps, means = _layer_table(run, "mean")
    if not np.isfinite(means).any():
        return None
    times = np.linspace(steps[0], steps[-1], min(TIME_COLUMNS, max(len(steps), 2)))
    nearest = np.abs(steps[None, :] - times[:, None]).argmin(axis=1)
    reach = max(0.05, float(np.ceil(np.nanmax(np.abs(means - 0.5)) * 20) / 20))
    figure, axes = new_axes(_layered_height(means.shape[1]))
    half = max((times[1] - times[0]) / 2, 0.5)
    extent = (times[0] - half, times[-1] + half, means.shape[1] - 0.5, -0.5)
    scale = Normalize(0.5 - reach, 0.5 + reach)
    image = axes.imshow(
        means[nearest].T, cmap=GATE_COLOURS, norm=scale, aspect="auto", interpolation="none", extent=extent
    )
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set(xlabel="step", ylabel="layer")
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=18)
    bar.outline.set_visible(False)
    bar.set_ticks([0.5 - reach, 0.5, 0.5 + reach])
    bar.ax.set_title("Mamba", fontsize=8, color=COLOURS["mamba"])
    bar.ax.set_xlabel("attention", fontsize=8, color=COLOURS["attention"], labelpad=9)  # below the steps' numbers
    return figure


def _layered_height(layers: int) -> float:
    return max(HEIGHT, 1.1 + 0.16 * layers)


def _gate_distribution(run: RunFolder) -> Figure | None:
    """One strip per layer: how often each gate value occurs at the last record, with mean and 5–95% range."""
    entries = [entry for entry in run.gates[-1]["layers"] if _histogram(entry).any()] if run.gates else []
    if not entries:
        return None
    figure, axes = new_axes(_layered_height(len(entries)))
    for row, entry in enumerate(entries):
        counts = _histogram(entry)
        heights = 0.82 * counts / counts.max()
        edges = np.linspace(0, 1, len(counts) + 1)
        width = edges[1]
        colours = GATE_COLOURS(edges[:-1] + width / 2)
        axes.bar(edges[:-1], -heights, width * 0.92, bottom=row + 0.4, align="edge", color=colours)
        axes.plot([0, 1], [row + 0.4] * 2, color=COLOURS["grid"], linewidth=0.7)
        _range_mark(axes, entry, row + 0.4)
    axes.axvline(0.5, color=COLOURS["muted"], linewidth=0.7, linestyle=(0, (3, 3)))
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_yticks(*_layer_ticks(entries))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set(xlabel="gate: 0 = all attention, 1 = all Mamba", ylabel="layer")
    axes.set(xlim=(0, 1), ylim=(len(entries) - 0.45, -0.55))
    return figure


def _gate_by_class(run: RunFolder) -> Figure | None:
    """Mean gate of each layer on each kind of token at the last record."""
    entries = (
        [entry for entry in run.gates[-1]["layers"] if isinstance(entry.get("classes"), dict)] if run.gates else []
    )
    if not entries:
        return None
    names = list(entries[0]["classes"])
    values = np.array([[number(entry["classes"], name) for name in names] for entry in entries])
    reach = max(0.05, float(np.nanmax(np.abs(values - 0.5), initial=0.0)))
    figure, axes = new_axes(_layered_height(len(entries)))
    axes.imshow(values, cmap=GATE_COLOURS, norm=Normalize(0.5 - reach, 0.5 + reach), aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if len(entries) <= 16 and np.isfinite(value):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="black", fontsize=8)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(*_layer_ticks(entries))
    axes.set(ylabel="layer")
    return figure


def _layer_ticks(entries: list[Row]) -> tuple[list[int], list[str]]:
    """At most about a dozen rows and their layers' names."""
    rows = list(range(0, len(entries), max(1, len(entries) // 12)))
    return rows, [str(_layer_index(entries[row])) for row in rows]


def _histogram(entry: Row) -> np.ndarray:
    counts = entry.get("histogram")
    if not isinstance(counts, list) or not counts:
        return np.zeros(1)
    return np.nan_to_num(np.array([max(number({"count": count}, "count"), 0.0) for count in counts]))


def _range_mark(axes: Axes, entry: Row, base: float) -> None:
    axes.plot([number(entry, "p05"), number(entry, "p95")], [base, base], color=COLOURS["ink"], linewidth=1.6)
    axes.plot([number(entry, "mean")], [base], marker="o", markersize=3.4, color=COLOURS["ink"])


def _branch_norms(run: RunFolder) -> Figure | None:
    tables = {branch: _layer_table(run, f"{branch}_rms") for branch in ("mamba", "attention")}
    if not any(np.isfinite(table).any() for _, table in tables.values()):
        return None
    figure, axes = new_axes()
    for branch, (steps, table) in tables.items():
        known = np.isfinite(table).any(axis=1)
        if known.any():
            axes.plot(steps[known], table[known], color=COLOURS[branch], linewidth=0.7, alpha=0.3)
            mean = np.nanmean(table[known], axis=1)
            axes.plot(steps[known], mean, color=COLOURS[branch], linewidth=2, label=LABELS[branch])
    axes.set(xlabel="step", ylabel="output RMS")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", ncols=2)
    return figure


def _branch_norms_by_layer(run: RunFolder) -> Figure | None:
    entries = [] if not run.gates else [e for e in run.gates[-1]["layers"] if np.isfinite(_norms(e)).any()]
    if not entries:
        return None
    figure, axes = new_axes(_layered_height(len(entries)))
    layers = [_layer_index(entry) for entry in entries]
    values = np.array([_norms(entry) for entry in entries])
    axes.hlines(layers, values.min(axis=1), values.max(axis=1), color=COLOURS["faint"], linewidth=2)
    axes.plot(values[:, 0], layers, "o", color=COLOURS["mamba"], markersize=5.5, label=LABELS["mamba"])
    axes.plot(values[:, 1], layers, "o", color=COLOURS["attention"], markersize=5.5, label=LABELS["attention"])
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set(xlabel="output RMS at the last record", ylabel="layer", ylim=(max(layers) + 0.6, min(layers) - 0.6))
    axes.set_xlim(left=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _norms(entry: Row) -> list[float]:
    return [number(entry, "mamba_rms"), number(entry, "attention_rms")]
