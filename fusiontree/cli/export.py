"""`fusiontree export`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[
        Path, typer.Argument(help="Model folder, or run folder (its newest checkpoint).", show_default=False)
    ],
    plan: Annotated[Path, typer.Option(help="Plan that `fusiontree prune` made, edited or not.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the smaller model.", show_default=False)],
) -> None:
    """Write the model without the branches that a plan takes out: an ordinary checkpoint, checked before it appears."""
    from fusiontree.cli.places import model_folder
    from fusiontree.deploy import export_pruned_model

    result = export_pruned_model(model_folder(model), plan, out)
    removed = ", ".join(f"{branch} of layer {layer}" for layer, branch in sorted(result.removed.items())) or "nothing"
    saved = 1 - result.parameters_after / result.parameters_before
    typer.echo(f"taken out: {removed}")
    typer.echo(f"parameters {result.parameters_before:,} → {result.parameters_after:,} (−{saved:.1%})")
    typer.echo(f"equal to the masked original: relative error {result.relative_error:.1e}")
    typer.echo(f"model: {result.path}")
