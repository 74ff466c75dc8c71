"""`fusiontree report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Run folder that train or demo left.", show_default=False)],
) -> None:
    """Write one self-contained HTML page of a run: curves, gate heat maps, plan, before and after."""
    from fusiontree.lab.report import write_report

    typer.echo(f"report: {write_report(run)}")
