"""`fusiontree convert`."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="Model folder.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="TO", help="Folder for the converted model.", show_default=False)],
    to: Annotated[
        str | None,
        typer.Option(
            help="What a FusionTree model becomes: llama, mistral, gpt2, bloom, falcon, mamba or mamba2. Left out: one "
            "of these becomes FusionTree's.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Turn a transformers checkpoint into ours, or ours back where that form allows it, with the same logits."""
    from fusiontree.deploy.convert import convert_model

    made = convert_model(source, target, to)
    typer.echo(f"model ({made}): {target}")
