"""Writes the tables and the plots of docs/results.md from docs/results/*.json.

python scripts/results_card.py           prints the tables
python scripts/results_card.py --write   puts them in the document, between its markers, and draws the plots
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tables

ROOT = Path(__file__).resolve().parent.parent
FOLDER, DOCUMENT = ROOT / "docs" / "results", ROOT / "docs" / "results.md"
TWINS = ("fusiontree", "llama", "mamba2")
COLOURS = {"fusiontree": "#0a6f6a", "llama": "#b5651d", "mamba2": "#5b4b9a", "pruned": "#8a8f98"}
TEXTS = {
    "wikipedia": "Wikipedia, test",
    "code": "standard library, held out",
    "novel": "a novel",
}
CLEAR = 2.0  # standard errors from which a difference is called one


def load(name: str) -> dict[str, Any]:
    """One of the files beside the document."""
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


def models() -> dict[str, dict[str, Any]]:
    """What was measured of each."""
    return {name: load(name) for name in (*TWINS, "pruned") if (FOLDER / f"{name}.json").exists()}


def runs() -> dict[str, dict[str, Any]]:
    """How each was trained."""
    found = {run["name"]: run for run in load("training")["runs"]}
    return {name: found[name] for name in TWINS if name in found}


def training_table() -> Iterator[str]:
    """What was trained."""
    yield "| model | parameters | layers | peak rate | steps | tokens | tokens/s | validation loss before → after |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, run in runs().items():
        before, after = run["validation"][0][1], run["validation"][-1][1]
        yield (
            f"| {name} | {run['parameters']:,} | {run['layers']} | {run['lr']:g} | {run['steps']} | "
            f"{run['tokens']:,} | {run['tokens'] / run['seconds']:,.0f} | {before:.3f} → {after:.3f} |"
        )


def rates_table() -> Iterator[str]:
    """Validation loss of the small models at the end of their short runs."""
    tried = load("training")["rates"]
    rates = sorted({run["lr"] for run in tried})
    first = tried[0]
    head = f"| peak rate ({first['steps']} steps, {first['tokens']:,} tokens) |"
    yield f"{head} {' | '.join(f'{rate:g}' for rate in rates)} |"
    yield "|---|" + "---:|" * len(rates)
    for name in TWINS:
        found = {run["lr"]: run["validation"][-1][1] for run in tried if run["name"] == name}
        cells = [bold(f"{found[rate]:.3f}", found[rate] == min(found.values())) for rate in rates]
        yield f"| {name} | {' | '.join(cells)} |"


def curve_table() -> Iterator[str]:
    """Validation loss of each at the same steps."""
    curves = {name: dict(run["validation"]) for name, run in runs().items()}
    steps = sorted({step for curve in curves.values() for step in curve})
    yield f"| validation loss at step | {' | '.join(map(str, steps))} |"
    yield "|---|" + "---:|" * len(steps)
    for name, curve in curves.items():
        yield f"| {name} | {' | '.join(f'{curve[step]:.3f}' if step in curve else '–' for step in steps)} |"


def perplexity_table() -> Iterator[str]:
    """Bits per byte by text and context; bold: the least of the twins, where the second is clearly worse."""
    shown = models()
    yield f"| text | context | windows | {' | '.join(shown)} |"
    yield "|---|---:|---:|" + "---:|" * len(shown)
    for text, name in TEXTS.items():
        rows = {model: lengths(content, text) for model, content in shown.items()}
        for length in rows[TWINS[0]]:
            first, second = sorted(TWINS, key={m: rows[m][length]["bits_per_byte"] for m in TWINS}.__getitem__)[:2]
            clear = is_clear(*difference(shown[second], shown[first], text, length))
            cells = [bold(with_error(rows[m][length], "bits_per_byte"), clear and m == first) for m in shown]
            yield f"| {name} | {length:,} | {rows[first][length]['windows']} | {' | '.join(cells)} |"


def differences_table() -> Iterator[str]:
    """Bits per byte more than FusionTree, window by window."""
    shown = models()
    others = [name for name in shown if name != "fusiontree"]
    yield f"| text | context | {' | '.join(f'{name} − fusiontree' for name in others)} |"
    yield "|---|---:|" + "---:|" * len(others)
    for text, name in TEXTS.items():
        for length in lengths(shown["fusiontree"], text):
            pairs = [difference(shown[other], shown["fusiontree"], text, length) for other in others]
            cells = [bold(f"{mean:+.4f} ± {shown_error(error)}", is_clear(mean, error)) for mean, error in pairs]
            yield f"| {name} | {length:,} | {' | '.join(cells)} |"


def answers_table() -> Iterator[str]:
    """Every task that has answers, in percent."""
    shown = models()
    yield f"| task | metric | questions | {' | '.join(shown)} |"
    yield "|---|---|---:|" + "---:|" * len(shown)
    for key, first in shown[TWINS[0]]["tasks"].items():
        if key.endswith("/perplexity"):
            continue
        for metric in first["errors"] or [first["main_metric"]]:
            results = [content["tasks"][key] for content in shown.values()]
            errors = [each["errors"].get(metric, math.nan) for each in results]
            cells = [f"{r['metrics'][metric]:.1f} ± {shown_error(e, 1)}" for r, e in zip(results, errors, strict=True)]
            yield f"| {key.split('/')[1]} | {metric} | {first['samples']} | {' | '.join(cells)} |"


def lengths(content: dict[str, Any], text: str) -> dict[int, dict[str, Any]]:
    """Context length -> the row of the task's table; empty where the text was not measured."""
    task = content["tasks"].get(f"{text}/perplexity")
    return {row["length"]: row for row in task["tables"]["by_length"]} if task else {}


def difference(one: dict[str, Any], other: dict[str, Any], text: str, length: int) -> tuple[float, float]:
    """Bits per byte of one model less those of another on the same windows, and the standard error over windows."""
    pairs = [content["tasks"][f"{text}/perplexity"]["windows"][str(length)] for content in (one, other)]
    assert [size for _, size in pairs[0]] == [size for _, size in pairs[1]]
    bits = [(a - b) / math.log(2) for (a, _), (b, _) in zip(*pairs, strict=True)]
    sizes = [size for _, size in pairs[0]]
    mean, count = sum(bits) / sum(sizes), len(bits)
    if count < 2:
        return mean, math.nan
    rest = sum((value - mean * size) ** 2 for value, size in zip(bits, sizes, strict=True))
    return mean, math.sqrt(count / (count - 1) * rest) / sum(sizes)


def is_clear(mean: float, error: float) -> bool:
    """Further from zero than two standard errors; never for a single window."""
    return abs(mean) > CLEAR * error


def with_error(row: dict[str, Any], name: str) -> str:
    """Value ± standard error."""
    error = row[f"{name}_error"]
    return f"{row[name]:.3f} ± {shown_error(math.nan if error is None else error, 3)}"


def shown_error(error: float, digits: int = 4) -> str:
    """A dash for what one window cannot tell."""
    return "–" if math.isnan(error) else f"{error:.{digits}f}"


def bold(text: str, wanted: bool) -> str:
    """Bold where wanted."""
    return f"**{text}**" if wanted else text


def speed_table() -> Iterator[str]:
    """What `fusiontree bench` found, the models in turns."""
    heads = (
        "prefill tokens/s",
        "decode tokens/s",
        "first token ms",
        "weights MB",
        "KV MB",
        "state MB",
        "activations MB",
    )
    yield f"| model | prompt | {' | '.join(heads)} |"
    yield "|---|" + "---:|" * (len(heads) + 1)
    for row in load("speed")["rows"]:
        speed, parts = row["speed"], {name: size / 1e6 for name, size in row["memory"].items() if size is not None}
        yield (
            f"| {row['model']} | {row['length']:,} | {speed['prefill_tokens_per_second']:,.0f} | "
            f"{speed['decode_tokens_per_second']:,.0f} | {speed['time_to_first_token'] * 1000:,.0f} | "
            f"{parts['weights']:.1f} | {parts['kv']:.1f} | {parts['ssm'] + parts['conv']:.2f} | "
            f"{parts['activations']:.0f} |"
        )


TABLES = {
    "training": training_table,
    "rates": rates_table,
    "curve": curve_table,
    "perplexity": perplexity_table,
    "differences": differences_table,
    "answers": answers_table,
    "speed": speed_table,
}


def draw() -> None:
    """Training curves, bits per byte by context length, loss by position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, run in runs().items():
        axes.plot(*zip(*run["validation"], strict=True), color=COLOURS[name], marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="validation loss, nats per token")
    finish(figure, [axes], "training")
    shown = models()
    for file, pick in (("length", length_curve), ("position", position_curve)):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        panels = figure.subplots(1, len(TEXTS))
        for panel, text in zip(panels, TEXTS, strict=True):
            for name, content in shown.items():
                places, values, errors = pick(content, text)
                panel.errorbar(places, values, errors, color=COLOURS[name], marker="o", markersize=3, label=name)
            panel.set_xscale("log", base=2)
            panel.set_title(TEXTS[text], fontsize=9)
        finish(figure, panels, file)


def length_curve(content: dict[str, Any], text: str) -> tuple[list[float], list[float], list[float]]:
    """Context lengths, bits per byte, standard errors."""
    rows = lengths(content, text).values()
    return (
        [r["length"] for r in rows],
        [r["bits_per_byte"] for r in rows],
        [r["bits_per_byte_error"] or 0 for r in rows],
    )


def position_curve(content: dict[str, Any], text: str) -> tuple[list[float], list[float], list[float]]:
    """Tokens seen (the middle of each bucket), nats per token, standard errors."""
    rows = content["tasks"][f"{text}/perplexity"]["tables"]["by_position"]
    return (
        [math.sqrt(r["from"] * r["to"]) for r in rows],
        [r["loss"] for r in rows],
        [r["loss_error"] or 0 for r in rows],
    )


def finish(figure: Any, panels: Any, name: str) -> None:
    """Grid, legend, file."""
    if len(panels) > 1:
        label = {"length": ("context, tokens", "bits per byte"), "position": ("tokens seen", "nats per token")}[name]
        panels[0].set_ylabel(label[1])
        for panel in panels:
            panel.set_xlabel(label[0])
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(FOLDER / f"{name}.png", dpi=100, facecolor="white")


if __name__ == "__main__":
    tables.main(DOCUMENT, TABLES)
    if "--write" in sys.argv[1:]:
        draw()
