"""`fusiontree compare`, and what it has in common with `ablate`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusiontree.cli.values import amount, numbers

if TYPE_CHECKING:
    from fusiontree.lab.grid.config import GridConfig

Grid = Annotated[
    str | None,
    typer.Argument(metavar="[GRID.yaml]", help="What to compare; left out: the shipped grid.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win, for example training.steps=1000."),
]
Out = Annotated[Path, typer.Option(help="Folder of the runs and the report; started again on it, a grid goes on.")]
Text = Annotated[list[str] | None, typer.Option(help="Text file, glob or stdlib; may be given again.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps of a long run.", min=1)]
Seeds = Annotated[str, typer.Option(help="Such as 0,1,2.")]
Rates = Annotated[str, typer.Option(help="Learning rates that every architecture tries, such as 1e-3,3e-3.")]
Params = Annotated[str, typer.Option(help="Parameters of each, such as 2.5M; sizes are solved for it.")]
Plan = Annotated[bool, typer.Option("--plan", help="Only show sizes, steps and how closely they match.")]


def compare(
    grid: Grid = None,
    overrides: Overrides = None,
    out: Out = Path("runs/compare"),
    architectures: Annotated[str, typer.Option(help="Presets by name, such as llama,mamba2,fusiontree.")] = "",
    text: Text = None,
    params: Params = "",
    flops: Annotated[str, typer.Option(help="Training FLOPs of each, such as 1e14; steps are solved for it.")] = "",
    steps: Steps = None,
    seeds: Seeds = "",
    lrs: Rates = "",
    plan: Plan = False,
) -> None:
    """Train architectures on equal terms and report loss, speed, memory, length, recall and stability of each.

    Interrupted or killed, the same command goes on where it was.
    """
    options = common(text, params, steps, seeds, lrs)
    if architectures:
        options["architectures"] = {name.strip(): None for name in architectures.split(",") if name.strip()}
    if flops:
        options["match.by"], options["match.flops"] = "flops", amount("--flops", flops)
    run("compare", grid, overrides, options, out, plan)


def common(text: list[str] | None, params: str, steps: int | None, seeds: str, lrs: str) -> dict[str, Any]:
    """The options of both verbs, by the name that the setting has in a grid."""
    options: dict[str, Any] = {}
    if text:
        options["data.train"] = [{"path": path} for path in text]
    if params:
        options["match.by"], options["match.parameters"] = "parameters", amount("--params", params)
    if steps is not None:
        options["training.steps"] = steps
    if seeds:
        options["seeds"] = list(numbers("--seeds", seeds, int))
    if lrs:
        options["sweep.lrs"] = list(numbers("--lrs", lrs, float))
    return options


def run(
    kind: str, grid: str | None, overrides: list[str] | None, options: dict[str, Any], out: Path, plan: bool
) -> None:
    """Read the grid, run it, write the report and show its first tables."""
    from fusiontree.deploy import console_progress
    from fusiontree.lab.grid.folder import read_results
    from fusiontree.lab.grid.options import read_grid
    from fusiontree.lab.grid.report import write_grid_report
    from fusiontree.lab.grid.runs import run_grid
    from fusiontree.lab.grid.tables import tables
    from fusiontree.lab.grid.view import View

    words: list[str] = [*([] if grid is None else [grid]), *(overrides or [])]
    file = Path(words.pop(0)) if words and ("=" not in words[0] or Path(words[0]).exists()) else None
    settings = read_grid(kind, file, options, words)
    if plan:
        show_plan(settings)
        return
    command = shlex.join(["fusiontree", *sys.argv[1:]])
    with console_progress(kind) as progress:
        results = run_grid(settings, kind, out, command=command, progress=progress, say=typer.echo)
    for table in tables(View(read_results(results)))[:2]:
        show(table.title, table.head, table.rows)
    for path in write_grid_report(out):
        typer.echo(f"report: {path}" if path.suffix != ".png" else f"picture: {path}")


def show_plan(settings: GridConfig) -> None:
    """Sizes and steps before anything is trained; the vocabulary of a tokenizer that is not made yet is assumed."""
    from fusiontree.cli.info import WITHOUT_TOKENIZER
    from fusiontree.data.tokenizer import BYTE, SMALLEST_VOCABULARY
    from fusiontree.lab.grid.matching import contenders
    from fusiontree.lab.grid.tables import percent

    tokenizer = settings.data.tokenizer
    vocabulary = SMALLEST_VOCABULARY if tokenizer.path == BYTE else tokenizer.train_vocab_size or WITHOUT_TOKENIZER
    rows = [
        [
            name,
            found.preset,
            f"{found.config.hidden_size} × {found.config.num_hidden_layers}",
            f"{found.parameters:,}",
            f"{found.steps:,}",
            f"{found.training_flops:.3g}",
            percent(found.off),
        ]
        for name, found in contenders(settings, vocabulary).items()
    ]
    typer.echo(f"matched by {settings.match.by}, {len(settings.seeds)} seeds, vocabulary {vocabulary:,}")
    show("", ["", "preset", "width × layers", "parameters", "steps", "training FLOPs", "off by"], rows)


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    """A table on the screen."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(head):
        table.add_column(name, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
