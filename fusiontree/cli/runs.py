"""`fusiontree runs`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fusiontree.lab.runs import RunRow

LOOKS = {"running": "green", "finished": "bold", "interrupted": "yellow", "failed": "red"}
WIDE = 200  # columns where there is no terminal: a line per run, whatever reads it


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds the run folders, or one run folder.")] = Path(
        "runs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="A JSON array, losses in nats, times in seconds.")] = False,
) -> None:
    """List runs, the last changed first: state, step, losses, tokens, time, size."""
    import json
    from dataclasses import asdict

    from fusiontree.lab.runs import list_runs

    rows = list_runs(folder)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2, allow_nan=False))
    elif rows:
        show(rows)
    else:
        typer.echo(f"no runs in {folder}")


def show(rows: list[RunRow]) -> None:
    """A table on the screen; what is worth a remark stands under it, by name."""
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    for name in ("state", "step", "loss", "best val.", "tokens", "time", "changed", "size"):
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    for row in rows:
        look = LOOKS.get(row.state, "dim")
        table.add_row(escape(row.name), f"[{look}]{row.state}[/{look}]", *_figures(row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    console.print(table)
    for row in rows:
        for note in row.notes:
            console.print(f"{row.name}: {note}", markup=False, soft_wrap=True)


def _figures(row: RunRow) -> tuple[str, ...]:
    from datetime import datetime

    from fusiontree.lab.markup import duration, scaled

    def written(value: float | None, how: Any) -> str:
        return "–" if value is None else how(value)

    step = "–" if row.step is None else f"{row.step:,}" + (f" / {row.steps:,}" if row.steps else "")
    return (
        step,
        written(row.loss, lambda value: f"{value:.4f}"),
        written(row.best_validation_loss, lambda value: f"{value:.4f}"),
        written(row.tokens, scaled),
        written(row.seconds, duration),
        written(row.changed, lambda value: f"{datetime.fromtimestamp(value):%Y-%m-%d %H:%M}"),
        scaled(row.bytes, "B") if row.bytes else "–",
    )
