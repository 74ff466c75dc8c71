"""`fusiontree bench`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusiontree.cli.sampling import Device
from fusiontree.cli.sampling import device as chosen
from fusiontree.cli.values import Precision, dtype_of, length, model_place, numbers
from fusiontree.errors import ConfigError

if TYPE_CHECKING:
    from fusiontree.eval.system.bench import Outcome


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Model or run folders (a run's newest checkpoint), pruned exports, or any Hugging Face causal models.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "--out", help="Folder for the results; sizes in it are not measured again.")
    ],
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, such as 1K,4K,16384.")] = "1K,4K,16K",
    batch_sizes: Annotated[str, typer.Option(help="Rows computed together, such as 1,4.")] = "1",
    new_tokens: Annotated[int, typer.Option(help="Tokens to write after each prompt.")] = 64,
    repeats: Annotated[int, typer.Option(help="Rounds to take the medians of.")] = 3,
    dtype: Annotated[Precision, typer.Option(help="What the models compute in.")] = Precision.stored,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; left out: what torch takes.", min=1, show_default=False)
    ] = None,
    device: Device = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with a model.")
    ] = False,
) -> None:
    """Speed and peak memory of models, in turns: prefill, first token, decoding, P50/P95/P99, memory by part.

    Every size is kept in the folder when it is measured: the same command goes on where an earlier one ended.
    """
    import torch

    from fusiontree.deploy import console_progress
    from fusiontree.eval.system import bench as room

    settings = room.BenchSettings(
        lengths=numbers("--lengths", lengths, length),
        batch_sizes=numbers("--batch-sizes", batch_sizes, int),
        new_tokens=new_tokens,
        repeats=repeats,
    )
    names = _names(models)
    target = chosen(device)
    if threads is not None:
        torch.set_num_threads(threads)
    sources = [room.Source(model_place(model), dtype_of(dtype), trust_remote_code) for model in models]
    contestants = [room.Contestant.load(name, one, target) for name, one in zip(names, sources, strict=True)]
    command = shlex.join(["fusiontree", *sys.argv[1:]])
    _tell(room.bench(contestants, settings, output, command=command, progress=console_progress))


def _names(models: list[str]) -> list[str]:
    """The last part of each path, or all of it where two end alike."""
    if len(set(models)) < len(models):
        twice = next(model for model in models if models.count(model) > 1)
        raise ConfigError(f"{twice}: is named twice; a model is measured once")
    short = [Path(model).name for model in models]
    return short if len(set(short)) == len(short) else models


def _tell(outcome: Outcome) -> None:
    """Tables, pictures, errors, and last on standard output one JSON object; exit code 2 when a row has no numbers."""
    from rich.console import Console

    from fusiontree.cli import INPUT_ERROR
    from fusiontree.cli.main import tell
    from fusiontree.eval.journal import to_json, write_whole
    from fusiontree.eval.system.charts import draw_bench
    from fusiontree.eval.system.tables import markdown, remarks, screen, tables

    console, rows, path = Console(highlight=False), outcome.rows, outcome.path
    for table in tables(rows):
        if table[2]:
            console.print(screen(table), "")
    write_whole(path.with_suffix(".md"), markdown(outcome.kept))
    for file in (path, path.with_suffix(".md"), *draw_bench(outcome.kept, path.parent / "plots")):
        typer.echo(f"written: {file}")
    failed = [row for row in rows if row["error"]]
    for line in remarks([row for row in rows if row["note"] and not row["error"]]):
        typer.echo(f"note: {line}", err=True)
    for line in remarks(failed):
        tell(ConfigError(line))
    typer.echo(to_json({"rows": rows, "failed": len(failed), "file": str(path)}))
    if failed:
        raise typer.Exit(INPUT_ERROR)
