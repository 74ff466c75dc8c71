"""`fusiontree chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusiontree.cli.sampling import Device, MaxNewTokens, RepetitionPenalty, Retrieve, Seed, Temperature, TopK, TopP
from fusiontree.cli.sampling import device as chosen
from fusiontree.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from fusiontree.deploy import InferenceRuntime
    from fusiontree.deploy.retrieval import Index
    from fusiontree.deploy.scheduler_ticket import Ticket

HELP = "an empty line or /quit ends, /reset forgets the conversation, Ctrl-C ends an answer"


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
    retrieve: Retrieve = None,
    device: Device = "auto",
) -> None:
    """Talk with a model, streaming; a model that never saw dialogues will only continue the text."""
    from fusiontree.cli.places import model_folder
    from fusiontree.deploy import InferenceRuntime, Limits, Scheduler
    from fusiontree.deploy.retrieval import Index
    from fusiontree.deploy.sampling import GenerationOptions

    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    runtime = InferenceRuntime(model_folder(model), device=chosen(device))
    index = None if retrieve is None else Index(retrieve)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    typer.echo(f"({HELP})")
    # The scheduler keeps the state of what was said: a turn costs its new tokens only.
    with Scheduler(runtime, Limits(slots=1)) as scheduler:
        while (line := _ask()) not in ("", "/quit"):
            if line == "/reset":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": line})
            try:
                asked = messages if index is None else _helped(index, runtime, messages, max_new_tokens)
                ticket = scheduler.submit(runtime.chat_request(asked, options))
            except ConfigError as error:
                if len(messages) == len(opening) + 1:  # not even this message alone: the settings are wrong
                    raise
                messages.pop()
                typer.echo(f"error: {error}; /reset makes room", err=True)
                continue
            messages.append({"role": "assistant", "content": _say(ticket).strip()})


def _helped(
    index: Index, runtime: InferenceRuntime, messages: list[dict[str, str]], new_tokens: int
) -> list[dict[str, str]]:
    """The messages with passages before the last question, whose places are told."""
    from fusiontree.cli.index import tell_sources
    from fusiontree.deploy.retrieval import before_question

    asked, hits = before_question(index, runtime, messages, new_tokens)
    tell_sources(hits)
    return asked


def _say(ticket: Ticket) -> str:
    """Print an answer as it comes and return it; Ctrl-C ends it early."""
    from fusiontree.deploy.requests import ChoiceEnd, RequestEnd

    answer = ""
    try:
        for event in ticket:
            if isinstance(event, ChoiceEnd) and event.error:
                raise CheckpointError(event.error)
            if not isinstance(event, RequestEnd):
                answer += event.text
                typer.echo(event.text, nl=False)
                sys.stdout.flush()
    except KeyboardInterrupt:
        typer.echo(" …", nl=False)
    typer.echo()
    return answer


def _ask() -> str:
    """The next line of the person, "" at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
