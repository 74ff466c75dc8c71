"""`fusiontree eval`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusiontree.cli.sampling import Device
from fusiontree.cli.sampling import device as chosen
from fusiontree.cli.values import Precision, dtype_of, length, model_place, numbers
from fusiontree.errors import ConfigError

if TYPE_CHECKING:
    from fusiontree.eval.run import Outcome
    from fusiontree.eval.subject import Subject


def _list(wanted: bool) -> None:
    if not wanted:
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fusiontree.eval.registry import FAMILIES, family, flag

    table = Table("tasks", "what", "settings", box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for group in map(family, sorted(FAMILIES)):
        members = ", ".join(group.members)
        names = f"{group.name}:NAME" if group.open else f"{group.name}:… {members}" if members else group.name
        settings = [flag(name) for name in group.reads]
        settings += [f"--option {key}=: {about}" for key, about in group.options.items()]
        table.add_row(escape(names), escape(group.about), escape("\n".join(settings)))
    Console(highlight=False).print(table)
    raise typer.Exit


def eval(
    model: Annotated[
        str,
        typer.Argument(
            help="Model or run folder (its newest checkpoint), or any Hugging Face causal model: folder or hub name.",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        str, typer.Option(help="Tasks by name, a,b,…; FAMILY means all of it. See --list.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; what is in it is not asked again.")],
    data: Annotated[
        Path | None, typer.Option(help="File or folder with the tasks' data; left out, the hub.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Samples per task; left out: all.", min=1)] = None,
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, such as 1K,4K,16384.")] = "",
    depths: Annotated[str, typer.Option(help="Depths in percent, such as 0,50,100.")] = "",
    batch_size: Annotated[int, typer.Option(help="Rows computed together.", min=1)] = 8,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens the model may see; left out: what its config says.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For tasks that draw their samples.")] = 0,
    corrected: Annotated[
        bool, typer.Option("--corrected", help="Score corrected where the official way has a known flaw.")
    ] = False,
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of a task; may be given again.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub name of the tokenizer; left out: the model's.")
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="What the model computes in.")] = Precision.stored,
    device: Device = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with a model.")
    ] = False,
    show_list: Annotated[
        bool, typer.Option("--list", help="Show the tasks there are, and end.", is_eager=True, callback=_list)
    ] = False,
) -> None:
    """Measure a model: perplexity, recall, long-context benchmarks, code completion, lm-evaluation-harness tasks.

    Every answer is kept in the folder as it is made: the same command goes on where an earlier one ended.
    """
    from fusiontree.deploy import console_progress
    from fusiontree.eval.loading import load_subject
    from fusiontree.eval.registry import check_settings, find_tasks
    from fusiontree.eval.run import evaluate
    from fusiontree.eval.task import TaskSettings

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    settings = TaskSettings(
        limit=limit,
        seed=seed,
        lengths=numbers("--lengths", lengths, length),
        depths=numbers("--depths", depths, float),
        data=data,
        max_length=max_length,
        official=not corrected,
        options=_options(option or []),
    )
    found = find_tasks(*names)
    check_settings(names, settings)
    subject = load_subject(
        model_place(model),
        tokenizer=tokenizer,
        device=chosen(device),
        dtype=dtype_of(dtype),
        max_length=max_length,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
    _tell_length(subject)
    command = shlex.join(["fusiontree", *sys.argv[1:]])
    _tell(subject, evaluate(subject, found, settings, out, command=command, progress=console_progress))


def _options(words: list[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for word, (key, equals, _) in zip(words, pairs, strict=True):
        if not key or not equals:
            raise ConfigError(f"--option {word}: KEY=VALUE is needed")
    return {key: value for key, _, value in pairs}


def _tell_length(subject: Subject) -> None:
    from fusiontree.eval.subject import context_limit

    limit = context_limit(subject.model.config, subject.tokenizer)
    if limit is not None and subject.max_length > limit:
        typer.echo(f"note: {subject.max_length} tokens are more than the {limit} this model is made for", err=True)


def _tell(subject: Subject, outcome: Outcome) -> None:
    """Table, pictures, errors, and last on standard output one JSON object; exit code 2 when a task cannot be done."""
    from rich.console import Console

    from fusiontree.cli import INPUT_ERROR
    from fusiontree.cli.main import tell
    from fusiontree.eval.journal import to_json
    from fusiontree.eval.plots import draw_plots
    from fusiontree.eval.results import results_table

    if outcome.results:
        Console(highlight=False).print(results_table(subject.name, outcome.results, outcome.groups))
        typer.echo(f"results: {outcome.path}")
    for picture in draw_plots(outcome.results, outcome.groups, outcome.path.parent / "plots", subject.name):
        typer.echo(f"picture: {picture}")
    for name, error in outcome.failed.items():
        tell(error if str(error).startswith(name) else type(error)(f"{name}: {error}"))
    last = {
        "model": subject.name,
        "fingerprint": subject.fingerprint,
        "results": {name: result["metrics"] for name, result in outcome.results.items()},
        "groups": {name: group["metrics"] for name, group in outcome.groups.items()},
        "failed": {name: " ".join(str(error).split()) for name, error in outcome.failed.items()},
        "file": str(outcome.path) if outcome.results else None,
    }
    typer.echo(to_json(last))
    if outcome.failed:
        raise typer.Exit(INPUT_ERROR)
