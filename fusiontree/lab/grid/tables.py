"""The tables of a grid's report, as plain text cells that Markdown and HTML both take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fusiontree.lab.grid.statistics import Estimate
from fusiontree.lab.grid.view import View
from fusiontree.lab.markup import duration, scaled
from fusiontree.models.accounting import account
from fusiontree.models.config import HybridConfig

DASH = "–"
UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
CACHED = 2  # bytes of a cached value: bf16


@dataclass(frozen=True)
class Table:
    """Title, one sentence of how to read it, heads and rows."""

    title: str
    lead: str
    head: list[str]
    rows: list[list[str]]


def tables(view: View) -> list[Table]:
    """All tables for which there is something to show."""
    quality = effects(view) if view.ablates else losses(view)
    found = [quality, terms(view), by_length(view), speed(view), cache(view), recall(view), stability(view)]
    return [table for table in (*found, sweep(view)) if table.rows]


def estimate(value: Estimate | None, sign: str = "") -> str:
    """`3.2104 ± 0.0121`."""
    if value is None:
        return DASH
    error = "" if value.error is None else f" ± {value.error:.4f}"
    return f"{value.mean:{sign}.4f}{error}".replace("-", "−")


def over(values: list[Estimate | None]) -> str:
    """What the ± of these figures are over, as a sentence."""
    kinds = {value.over for value in values if value is not None and value.error is not None}
    if kinds == {"seeds"}:
        return "± is the standard error over the seeds."
    if kinds == {"windows"}:
        return (
            "± is the standard error over the held-out windows of one seed: how far the text decides, not what another "
            "seed would come to."
        )
    return "± is the standard error over the seeds where there are several, else over the held-out windows."


def losses(view: View) -> Table:
    """Validation loss of each architecture and its distance from the first."""
    first = view.names[0]
    found = [(name, view.loss(name), None if name == first else view.effect(name)) for name in view.names]
    rows = []
    for name, loss, effect in found:
        if loss is None:
            rows.append([name, view.why_missing(name), *[DASH] * 4])
            continue
        bits = number(view.mean(name, lambda run: run["validation"]["bits_per_byte"]), 4)
        perplexity = number(view.mean(name, lambda run: run["validation"]["perplexity"]), 2)
        rows.append([name, estimate(loss), bits, perplexity, estimate(effect, "+"), str(len(view.runs(name)))])
    lead = f"Held-out text, nats per token. {over([loss for _, loss, _ in found])}"
    lead += f" The distance from {first} is taken pair by pair: the same seed, or the same windows."
    return Table(
        "Loss", lead, ["", "validation loss", "bits per byte", "perplexity", f"against {first}", "seeds"], rows
    )


def effects(view: View) -> Table:
    """What each change does to the loss, the size and the speed."""
    first = view.names[0]
    found = {name: view.effect(name) for name in view.names[1:]}
    rows = [[first, estimate(view.loss(first)), DASH, DASH, DASH, str(len(view.runs(first)))]]
    for name, effect in found.items():
        loss = view.loss(name)
        size = view.contender(name)["parameters"] / view.contender(first)["parameters"] - 1
        step, base = (view.turns(each).get("step_ms", math.nan) for each in (name, first))
        shown = view.why_missing(name) if loss is None else estimate(loss)
        rows.append(
            [name, shown, estimate(effect, "+"), percent(size), percent(step / base - 1), str(len(view.runs(name)))]
        )
    lead = f"Nats per token on held-out text; a positive effect is a loss. {over(list(found.values()))} Effects are "
    lead += "taken run by run of the same seed."
    return Table(
        "Effects", lead, ["change", "validation loss", "effect", "parameters", "time of a step", "seeds"], rows
    )


def terms(view: View) -> Table:
    """In what the architectures are equal, and how closely."""
    match = view.grid["match"]
    asked = {
        "parameters": f"sizes were solved for {match['parameters'] or 0:,.0f} parameters",
        "tokens": "sizes are as given",
        "flops": "steps were solved for equal training FLOPs"
        + (f", sizes for {match['parameters']:,.0f} parameters" if match["parameters"] else ""),
    }[match["by"]]
    rates = {name: {run["lr"] for run in view.runs(name)} for name in view.names}
    rows = [
        [
            name,
            contender["preset"],
            f"{contender['model'].get('hidden_size', HybridConfig.hidden_size)} × "
            f"{contender['model'].get('num_hidden_layers', HybridConfig.num_hidden_layers)}",
            f"{contender['parameters']:,}",
            f"{contender['steps']:,}",
            f"{contender['tokens']:,}",
            scaled(3 * contender["flops_per_token"] * contender["tokens"]),
            DASH if match["by"] == "tokens" else percent(contender["off"]),
            ", ".join(f"{rate:g}" for rate in sorted(rates[name])) or DASH,
        ]
        for name, contender in ((name, view.contender(name)) for name in view.names)
    ]
    lead = f"Matched by {match['by']}: {asked}. A training step counts as three forward passes."
    head = [
        "",
        "preset",
        "width × layers",
        "parameters",
        "steps",
        "tokens",
        "training FLOPs",
        "off by",
        "learning rate",
    ]
    return Table("Equal terms", lead, head, rows)


def by_length(view: View) -> Table:
    """Loss of rows longer than those trained on."""
    multiples = sorted({int(key) for name in view.names for run in view.runs(name) for key in run["by_length"]})
    length = view.grid["training"]["sequence_length"]
    rows = []
    for name in view.names:
        if not view.runs(name) or not multiples:
            continue
        cells = []
        for multiple in multiples:
            entries = [run["by_length"].get(str(multiple), {}) for run in view.runs(name)]
            why = next((entry["why"] for entry in entries if "why" in entry), None)
            cells.append(why or estimate(view.loss_at(name, multiple)))
        rows.append([name, *cells])
    beyond = [
        f"{entry['beyond']:.0%} at {multiple}×"
        for multiple in multiples[1:]
        if (entry := _first_entry(view, multiple)) is not None
    ]
    lead = f"Nats per token of the same held-out text in rows of so many times the training length, {length} tokens. "
    lead += f"Share of the tokens with more before them than in training: {', '.join(beyond) or 'none'}."
    return Table("Loss by length", lead, ["", *(f"{multiple}×" for multiple in multiples)], rows)


def _first_entry(view: View, multiple: int) -> dict[str, Any] | None:
    entries = (run["by_length"].get(str(multiple), {}) for name in view.names for run in view.runs(name))
    return next((entry for entry in entries if "beyond" in entry), None)


def speed(view: View) -> Table:
    """Times and memory, measured in turns after training."""
    rows = []
    for name in view.names:
        turns = view.turns(name)
        if not turns:
            continue
        trained = view.mean(name, lambda run: run["training"]["tokens_per_second"])
        rows.append(
            [
                name,
                number(turns.get("step_ms", math.nan), 1),
                number(turns.get("tokens_per_second", math.nan), 0),
                number(turns.get("prefill_ms_per_token", math.nan), 3),
                number(turns.get("decode_ms_per_token", math.nan), 2),
                size(turns.get("step_memory_bytes")),
                number(trained, 0),
            ]
        )
    turns = next((view.turns(name) for name in view.names if "prompt_length" in view.turns(name)), {})
    lead = "Medians, the architectures taking turns on the same machine after training. "
    if turns:
        lead += f"Generation at batch 1 after a prompt of {turns['prompt_length']} tokens. "
    lead += "Peak memory: weights, optimizer state and what a training step needs on top. The last column is what each "
    lead += "run came to while it trained, at another time than the others."
    head = ["", "ms/step", "training tokens/s", "prefill ms/token", "decode ms/token", "peak memory", "as trained"]
    return Table("Speed and memory", lead, head, rows)


def cache(view: View) -> Table:
    """Bytes of keys, values and states, counted."""
    lengths = view.grid["measure"]["cache_lengths"]
    rows = [[name, *(size(cached_bytes(view, name, length)) for length in lengths)] for name in view.names if lengths]
    lead = "Keys, values and states of one row in bf16 (the SSM state is fp32), counted from the configuration."
    return Table("Cache and state by length", lead, ["", *(f"{length:,} tokens" for length in lengths)], rows)


def cached_bytes(view: View, name: str, length: int) -> int:
    """Bytes held after a prefill of `length` tokens."""
    config = HybridConfig(**view.contender(name)["model"])
    return sum(account(config, length=length, dtype_bytes=CACHED).state_bytes.values())


def recall(view: View) -> Table:
    """Accuracy on the recall tasks."""
    tasks = view.grid["measure"]["tasks"]
    rows = []
    for name in view.names:
        if not view.runs(name) or not tasks:
            continue
        cells = []
        for task in tasks:
            entries = [run["tasks"].get(task, {}) for run in view.runs(name)]
            why = next((entry["why"] for entry in entries if "why" in entry), None)
            accuracies = [entry["accuracy"] for entry in entries if "accuracy" in entry]
            cells.append(why or number(fmean(accuracies) if accuracies else math.nan, 1))
        rows.append([name, *cells])
    lead = (
        "Percent, greedy. recall: multi-query associative recall in words of the tokenizer; needle_code: a code in a "
    )
    lead += "text of the training length; copy: letters written again. Models that never saw such a task guess."
    return Table("Recall", lead, ["", *tasks], rows)


def stability(view: View) -> Table:
    """Spikes of loss and gradient while training."""
    rows = []
    for name in view.names:
        found = [run["training"] for run in view.runs(name)]
        if not found:
            continue
        norms = [figures["gradient_norm"] for figures in found if figures["gradient_norm"]]
        rows.append(
            [
                name,
                str(sum(figures["loss_spikes"] for figures in found)),
                str(sum(figures["gradient_spikes"] for figures in found)),
                number(max((norm["median"] for norm in norms), default=math.nan), 3),
                number(max((norm["largest"] for norm in norms), default=math.nan), 3),
                duration(sum(figures["seconds"] for figures in found)),
            ]
        )
    lead = "Over all seeds. A gradient spike: a norm, before clipping, of more than three times the median of the 64 "
    lead += "steps before."
    head = ["", "loss spikes", "gradient spikes", "median norm", "largest norm", "trained for"]
    return Table("Stability", lead, head, rows)


def sweep(view: View) -> Table:
    """The short runs that found the learning rates."""
    entries = list(view.content["sweep"].values())
    rates = sorted({entry["lr"] for entry in entries})
    rows = []
    for name in view.names:
        own = {entry["lr"]: entry for entry in entries if entry["architecture"] == name}
        finite = {rate: entry["loss"] for rate, entry in own.items() if entry.get("loss") is not None}
        if not own:
            continue
        best = min(finite, key=lambda rate: finite[rate]) if finite else None
        cells = [_rate_cell(own.get(rate), rate == best) for rate in rates]
        edge = "" if best is None or len(rates) < 2 or best not in (rates[0], rates[-1]) else "at the edge of the list"
        rows.append([name, *cells, edge])
    steps = sorted({entry["steps"] for entry in entries})
    lead = f"Validation loss of short runs of {', '.join(map(str, steps))} steps, the same rates for all; ✓ was taken."
    return Table("Learning rates", lead, ["", *(f"{rate:g}" for rate in rates), ""], rows)


def _rate_cell(entry: dict[str, Any] | None, best: bool) -> str:
    if entry is None:
        return DASH
    if entry.get("loss") is None:
        return "diverged"
    return f"{entry['loss']:.4f}{' ✓' if best else ''}"


def number(value: float, digits: int) -> str:
    """A decimal number, a dash for NaN."""
    return DASH if math.isnan(value) else f"{value:,.{digits}f}"


def percent(share: float) -> str:
    """+1.25%."""
    return DASH if math.isnan(share) else f"{share:+.2%}".replace("-", "−")


def size(count: float | None) -> str:
    """Bytes with a binary unit."""
    if count is None:
        return DASH
    for unit, name in UNITS:
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count:,.0f} B"
