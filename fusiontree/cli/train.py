"""`fusiontree train`."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="YAML file, for example configs/demo.yaml.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")
    ] = None,
) -> None:
    """Train as a YAML config says; run again on the same run folder, it goes on from the last checkpoint."""
    from fusiontree.eval.perplexity import evaluate_loss
    from fusiontree.train.config import load_config
    from fusiontree.train.engine import train as run

    result = run(load_config(config, overrides or []), evaluate=evaluate_loss)
    typer.echo(f"run folder: {result.run_dir}")
    typer.echo(f"step {result.step}: loss {result.final_loss:.4f}")
    if result.validation_loss_before is not None and result.validation_loss_after is not None:
        typer.echo(f"validation loss {result.validation_loss_before:.4f} → {result.validation_loss_after:.4f}")
