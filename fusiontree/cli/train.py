"""`fusiontree train`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fusiontree.cli import INTERRUPTED


def train(
    config: Annotated[Path, typer.Argument(help="YAML file, for example configs/demo.yaml.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file, for example training.lr=1e-3."),
    ] = None,
) -> None:
    """Train as a YAML config says; run again on the same run folder, it goes on from the last checkpoint."""
    from fusiontree.eval.perplexity import evaluate_loss
    from fusiontree.recipes.probes import training_probes
    from fusiontree.train import load_config
    from fusiontree.train import train as run

    settings = load_config(config, overrides or [])
    result = run(settings, evaluate=evaluate_loss, probes=training_probes(settings))
    if os.environ.get("RANK", "0") != "0":
        return
    if result.interrupted:  # the engine has saved and said how to go on
        # torchrun would report any other code than 0 as a crash.
        raise typer.Exit(INTERRUPTED if "RANK" not in os.environ else 0)
    typer.echo(f"step {result.step}, run folder {result.run_dir}")
    if result.validation_loss_before is not None and result.validation_loss_after is not None:
        typer.echo(f"validation loss {result.validation_loss_before:.4f} → {result.validation_loss_after:.4f}")
