"""`fusiontree generate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fusiontree.cli.sampling import Device, MaxNewTokens, RepetitionPenalty, Retrieve, Seed, Temperature, TopK, TopP
from fusiontree.cli.sampling import device as chosen


def generate(
    model: Annotated[
        Path, typer.Argument(help="Model folder, or run folder (its newest checkpoint).", show_default=False)
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.", show_default=False)],
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    retrieve: Retrieve = None,
    device: Device = "auto",
) -> None:
    """Continue a prompt, streaming to the terminal as it is written."""
    from fusiontree.cli.index import tell_sources
    from fusiontree.cli.places import model_folder
    from fusiontree.deploy import InferenceRuntime
    from fusiontree.deploy.retrieval import Index, before_prompt

    text = sys.stdin.read() if prompt == "-" else prompt
    runtime = InferenceRuntime(model_folder(model), device=chosen(device))
    asked = text
    if retrieve is not None:
        asked, hits = before_prompt(Index(retrieve), runtime, text, max_new_tokens)
        tell_sources(hits)
    pieces = runtime.stream(
        asked,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    typer.echo(text, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()
