"""`fusiontree ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusiontree.cli.compare import Grid, Out, Overrides, Params, Plan, Rates, Seeds, Steps, Text, common, run


def _list(wanted: bool) -> None:
    if not wanted:
        return
    from fusiontree.lab.grid.changes import CHANGES

    for name, settings in CHANGES.items():
        typer.echo(f"{name}: {', '.join(f'{key}={value}' for key, value in settings.items())}")
    raise typer.Exit


def ablate(
    grid: Grid = None,
    overrides: Overrides = None,
    out: Out = Path("runs/ablate"),
    base: Annotated[str, typer.Option(help="Preset that is changed, one component at a time.")] = "",
    changes: Annotated[str, typer.Option(help="Changes by name, such as no_srte,pre_norm; see --list.")] = "",
    text: Text = None,
    params: Params = "",
    steps: Steps = None,
    seeds: Seeds = "",
    lrs: Rates = "",
    plan: Plan = False,
    show_list: Annotated[
        bool, typer.Option("--list", help="Show the changes there are, and end.", is_eager=True, callback=_list)
    ] = False,
) -> None:
    """Switch one component at a time from a base and report each effect with its error over the seeds.

    Interrupted or killed, the same command goes on where it was.
    """
    options = common(text, params, steps, seeds, lrs)
    if base:
        options["base"] = {"preset": base}
    if changes:
        options["changes"] = {name.strip(): None for name in changes.split(",") if name.strip()}
    run("ablate", grid, overrides, options, out, plan)
