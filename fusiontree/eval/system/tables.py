"""What `fusiontree bench` found, as two tables (speed, memory): Markdown for files, rich for the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as Screen

Row = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]
"""Title, heads, cells; the first column is words, the others are numbers."""

SPEED = {  # head → key of a SpeedResult, factor
    "prefill tokens/s": ("prefill_tokens_per_second", 1),
    "decode tokens/s": ("decode_tokens_per_second", 1),
    "first token ms": ("time_to_first_token", 1000),
    "P50 ms": ("token_latency_p50", 1000),
    "P95 ms": ("token_latency_p95", 1000),
    "P99 ms": ("token_latency_p99", 1000),
}
MEMORY = {  # head → keys of a MemoryResult
    "peak": ("peak",),
    "weights": ("weights",),
    "KV": ("kv",),
    "SSM": ("ssm",),
    "conv": ("conv",),
    "activations": ("activations",),
    "process": ("process",),
}


def tables(rows: Sequence[Row]) -> list[Table]:
    """The tables of these rows; a row without numbers is left out of them, `remarks` says why."""
    where = ["model", "batch × prompt"]
    speeds = [[*_where(row), *(_speed(row["speed"], *key) for key in SPEED.values())] for row in rows if row["speed"]]
    parts = [
        [*_where(row), *(_megabytes(row["memory"], key) for key in MEMORY.values())] for row in rows if row["memory"]
    ]
    return [("Speed", [*where, *SPEED], speeds), ("Peak memory, MB", [*where, *MEMORY], parts)]


def remarks(rows: Sequence[Row]) -> list[str]:
    """Why rows have no numbers, and what else is to be said about them: a line each."""
    said = []
    for row in rows:
        name, size = _where(row)
        said += [f"{name}, {size}: {row[key]}" for key in ("error", "note") if row[key]]
    return said


def markdown(rows: Sequence[Row]) -> str:
    """Both tables and the remarks."""
    parts = []
    for title, heads, cells in tables(rows):
        lines = [" | ".join(heads), " | ".join(["---", *["---:"] * (len(heads) - 1)]), *map(" | ".join, cells)]
        parts.append(f"## {title}\n\n" + "\n".join(f"| {line} |" for line in lines))
    parts += ["\n".join(f"- {line}" for line in remarks(rows))] if remarks(rows) else []
    return "\n\n".join(parts) + "\n"


def screen(table: Table) -> Screen:
    """A table for the terminal."""
    from rich.markup import escape
    from rich.table import Table as Screen

    title, heads, cells = table
    shown = Screen(title=title, title_justify="left", box=None, pad_edge=False)
    for place, head in enumerate(heads):
        shown.add_column(head, justify="right" if place else "left", no_wrap=place == 1)
    for line in cells:
        shown.add_row(*map(escape, line))
    return shown


def _where(row: Row) -> list[str]:
    return [row["model"], f"{row['batch_size']} × {row['length']:,}"]


def _speed(speed: Row, key: str, factor: float) -> str:
    value = factor * speed[key]
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _megabytes(memory: Row, keys: Sequence[str]) -> str:
    values = [memory[key] for key in keys]
    if None in values:
        return "–"
    size = sum(values) / 1e6
    return f"{size:,.0f}" if size >= 1000 else f"{size:.3g}"
