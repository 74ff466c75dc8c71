"""`fusiontree report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[
        Path,
        typer.Argument(help="Run folder that train or demo left, or that of compare or ablate.", show_default=False),
    ],
) -> None:
    """Write one self-contained HTML page of a run, or of a grid of runs: curves, gate heat maps, plan, tables."""
    from fusiontree.lab.grid.folder import FILE
    from fusiontree.lab.grid.report import write_grid_report
    from fusiontree.lab.report import write_report

    page = write_grid_report(run)[0] if (run / FILE).is_file() else write_report(run)
    typer.echo(f"report: {page}")
