"""`fusiontree chat`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fusiontree.cli.sampling import Device, MaxNewTokens, RepetitionPenalty, Seed, Temperature, TopK, TopP
from fusiontree.cli.sampling import device as chosen
from fusiontree.errors import ConfigError

HELP = "an empty line or /quit ends, /reset forgets the conversation"


def chat(
    model: Annotated[
        Path, typer.Argument(help="Model folder, or run folder (its newest checkpoint).", show_default=False)
    ],
    system: Annotated[str | None, typer.Option(help="Instruction that stands before the conversation.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Talk with a model, streaming; a model that never saw dialogues will only continue the text."""
    from fusiontree.cli.places import model_folder
    from fusiontree.deploy import InferenceRuntime
    from fusiontree.deploy.sampling import Options

    runtime = InferenceRuntime(model_folder(model), device=chosen(device))
    options: Options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    typer.echo(f"({HELP})")
    while (line := _ask()) not in ("", "/quit"):
        if line == "/reset":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": line})
        answer = ""
        try:
            pieces = runtime.stream_chat(messages, **options)
        except ConfigError as error:
            if len(messages) == len(opening) + 1:  # not even this message alone: the settings are wrong
                raise
            messages.pop()
            typer.echo(f"error: {error}; /reset makes room", err=True)
            continue
        for piece in pieces:
            answer += piece
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()
        messages.append({"role": "assistant", "content": answer.strip()})


def _ask() -> str:
    """The next line of the person, "" at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
