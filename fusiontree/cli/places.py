"""What a path on the command line may stand for: a model folder, or a run folder and its newest good checkpoint."""

from pathlib import Path

import typer

from fusiontree.errors import CheckpointError


def model_folder(path: Path) -> Path:
    """The model folder that `path` is, or the newest checkpoint of the run folder that it is."""
    if not (path / "checkpoints").is_dir():
        return path
    from fusiontree.train.checkpoint import latest_checkpoint

    found = latest_checkpoint(path, lambda line: typer.echo(line, err=True))
    if found is None:
        raise CheckpointError(f"{path}: no usable checkpoint in its checkpoints folder; train first")
    return found


def run_folder(path: Path) -> Path | None:
    """The run folder that `path` is or, as one of its checkpoints, lies in; None for a model of another origin."""
    candidates = (path, path.resolve().parent.parent)
    return next((place for place in candidates if (place / "checkpoints").is_dir()), None)
