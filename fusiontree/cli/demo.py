"""`fusiontree demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Run folder; finished stages found there are kept.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="Time the whole demo may take, on this machine.", min=1)] = 10.0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A few steps of a toy model: a check, not a demo.")] = False,
) -> None:
    """The whole road on this Python's standard library: train, watch, prune, export, heal, measure, complete."""
    from fusiontree.recipes.demo import run_demo

    run_demo(out, minutes=minutes, tiny=tiny)
