"""`fusiontree export`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(str, Enum):
    """What weights can be kept in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    model: Annotated[
        Path, typer.Argument(help="Model folder, or run folder (its newest checkpoint).", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the exported model.", show_default=False)],
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan that `fusiontree prune` made, edited or not; left out, nothing is taken out."),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights, without a plan; left out, as they are.")] = None,
) -> None:
    """Write a checkpoint of any engine as an ordinary model folder, without the branches that a plan takes out.

    What is written is checked before it appears.
    """
    from fusiontree.cli.places import model_folder
    from fusiontree.errors import ConfigError

    source = model_folder(model)
    if plan is None:
        import torch

        from fusiontree.deploy import export_model

        written = export_model(source, out, None if dtype is None else getattr(torch, dtype.value))
        typer.echo(f"model: {written}")
        return
    if dtype is not None:
        raise ConfigError("--dtype: a pruned model is written as its original is; export it again without --plan")
    _pruned(source, plan, out)


def _pruned(source: Path, plan: Path, out: Path) -> None:
    from fusiontree.deploy import export_pruned_model

    result = export_pruned_model(source, plan, out)
    removed = ", ".join(f"{branch} of layer {layer}" for layer, branch in sorted(result.removed.items())) or "nothing"
    saved = 1 - result.parameters_after / result.parameters_before
    typer.echo(f"taken out: {removed}")
    typer.echo(f"parameters {result.parameters_before:,} → {result.parameters_after:,} (−{saved:.1%})")
    typer.echo(f"equal to the masked original: relative error {result.relative_error:.1e}")
    typer.echo(f"model: {result.path}")
