"""The flags that `generate` and `chat` share."""

from pathlib import Path
from typing import Annotated

import typer

from fusiontree.errors import ConfigError

MaxNewTokens = Annotated[int, typer.Option(help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option(help="0 = the most probable token each time.")]
TopK = Annotated[int, typer.Option(help="Draw among so many tokens; 0 = all.")]
TopP = Annotated[float, typer.Option(help="Draw among the most probable tokens that hold this much probability.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: less of what is in the text already.")]
Seed = Annotated[int, typer.Option(help="The same seed draws the same text.")]
Retrieve = Annotated[
    Path | None, typer.Option(help="Index whose passages are put before the prompt.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto (the GPU when there is one), cpu or cuda.")]


def device(name: str) -> str | None:
    """What the runtime takes for a name given on the command line; ConfigError for one that is not there."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name}: allowed are auto, cpu and cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; allowed: auto, cpu")
    return None if name == "auto" else name
