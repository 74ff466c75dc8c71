"""Pictures of what `fusiontree bench` found: prefill and decoding rates, and peak memory by part, against length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

COLOURS = ("#0a6f6a", "#d8622b", "#4a5bd0", "#8a6d1f", "#a63a7c", "#5f6b76")  # models, in turn
MARKS = ("o", "s", "^", "D", "v", "P")  # batch sizes, in turn
PARTS = {  # stacked in this order: label → keys of a MemoryResult, colour
    "weights": (("weights",), "#5f6b76"),
    "KV": (("kv",), "#d8622b"),
    "SSM and conv state": (("ssm", "conv"), "#0a6f6a"),
    "activations": (("activations", "other"), "#c9d1d9"),
}
RATES = {
    "prefill": ("prefill_tokens_per_second", "prefill, tokens per second"),
    "decode": ("decode_tokens_per_second", "decoding, tokens per second"),
}
PANEL = (3.1, 2.5)  # inches


def draw_bench(rows: Sequence[Row], folder: Path) -> list[Path]:
    """`prefill.png`, `decode.png` and `memory.png`, those of them for which there are numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    timed, weighed = [row for row in rows if row["speed"]], [row for row in rows if row["memory"]]
    for name, (key, label) in RATES.items():
        if timed:
            paths.append(folder / f"{name}.png")
            _draw_rates(timed, key, label, paths[-1])
    if weighed:
        paths.append(folder / "memory.png")
        _draw_memory(weighed, paths[-1])
    return paths


def _draw_rates(rows: Sequence[Row], key: str, label: str, path: Path) -> None:
    """A line per model and batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    models, batches, lengths = (_values(rows, name) for name in ("model", "batch_size", "length"))
    for at, model in enumerate(models):
        for mark, batch in enumerate(batches):
            own = sorted(
                (row["length"], row["speed"][key])
                for row in rows
                if (row["model"], row["batch_size"]) == (model, batch)
            )
            title = model if len(batches) == 1 else f"{model}, batch {batch}"
            look: Any = {"color": COLOURS[at % len(COLOURS)], "marker": MARKS[mark % len(MARKS)], "markersize": 4}
            axes.plot(
                [x for x, _ in own], [y for _, y in own], label=title, alpha=1 - 0.5 * mark / len(batches), **look
            )
    _length_axis(axes, sorted(lengths))
    axes.set(ylabel=label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150, facecolor="white")


def _draw_memory(rows: Sequence[Row], path: Path) -> None:
    """A panel per model and batch size, in it a bar per length, its parts stacked."""
    from matplotlib.figure import Figure

    models, batches, lengths = (_values(rows, name) for name in ("model", "batch_size", "length"))
    size = (max(PANEL[0] * len(models), 4.5), PANEL[1] * len(batches) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(batches), len(models), sharey="row", squeeze=False)
    for line, batch in zip(panels, sorted(batches), strict=True):
        for axes, model in zip(line, models, strict=True):
            own = {row["length"]: row["memory"] for row in rows if (row["model"], row["batch_size"]) == (model, batch)}
            _stack(axes, own, sorted(lengths))
            axes.set_title(model if len(batches) == 1 else f"{model}, batch {batch}", fontsize=8)
        line[0].set_ylabel("peak memory, MB")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150, facecolor="white")


def _stack(axes: Any, memory: Mapping[int, Row], lengths: Sequence[int]) -> None:
    places = [place for place, length in enumerate(lengths) if length in memory]
    below = [0.0] * len(places)
    for label, (keys, colour) in PARTS.items():
        heights = [sum(memory[lengths[place]][key] for key in keys) / 1e6 for place in places]
        axes.bar(places, heights, bottom=below, color=colour, label=label, width=0.7)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths], fontsize=7)
    axes.set_xlabel("prompt, tokens", fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _length_axis(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("prompt, tokens")


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _values(rows: Sequence[Row], key: str) -> list[Any]:
    """The values of a key, each once, in the order they come."""
    return list(dict.fromkeys(row[key] for row in rows))
