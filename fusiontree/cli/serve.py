"""`fusiontree serve`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusiontree.cli.places import model_folder
from fusiontree.cli.sampling import Device, Retrieve
from fusiontree.cli.sampling import device as chosen
from fusiontree.cli.values import Precision, dtype_of
from fusiontree.errors import ConfigError

if TYPE_CHECKING:
    from fusiontree.deploy.requests import Limits
    from fusiontree.deploy.retrieval import Index
    from fusiontree.deploy.server.models import Served

KEY_VARIABLE = "FUSIONTREE_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Annotated[
        Path, typer.Argument(help="Model folder, or run folder (its newest checkpoint).", show_default=False)
    ],
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Another model, FOLDER or NAME=FOLDER; may be given again. The page compares two."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is everyone who reaches this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=KEY_VARIABLE, help="Key that every route but /health asks for; better in the variable."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with keys, one per line, any of which opens.", show_default=False)
    ] = None,
    served_name: Annotated[
        str | None, typer.Option(help="Name of MODEL; left out: its folder's.", show_default=False)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Run folder whose report the page opens.", show_default=False)
    ] = None,
    retrieve: Retrieve = None,
    device: Device = "auto",
    dtype: Annotated[Precision, typer.Option(help="What to compute in.")] = Precision.stored,
    slots: Annotated[int, typer.Option(help="Answers written together, per model.", min=1)] = 32,
    queue: Annotated[int, typer.Option(help="Answers that may wait; more get 429.", min=0)] = 256,
    prefix_mib: Annotated[int, typer.Option(help="MiB of states kept for prompts that begin alike.", min=0)] = 256,
    max_body_kib: Annotated[int, typer.Option(help="KiB of one request's body.", min=1)] = 4096,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Left out: the model's positions.", min=1, show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Of one answer; left out: the model's positions.", min=1, show_default=False)
    ] = None,
    max_connections: Annotated[int, typer.Option(help="More close the longest idle one.", min=1)] = 1000,
    header_seconds: Annotated[float, typer.Option(help="For a request's header to arrive.")] = 10.0,
    body_seconds: Annotated[float, typer.Option(help="For a request's body to arrive.")] = 30.0,
    request_seconds: Annotated[float, typer.Option(help="From a request to its last token.")] = 600.0,
    drain_seconds: Annotated[float, typer.Option(help="For running requests after SIGTERM or Ctrl-C.")] = 30.0,
) -> None:
    """Serve models over HTTP as OpenAI does, with a page at / that shows the gates token by token."""
    _needs_packages()
    from fusiontree.deploy.requests import Limits
    from fusiontree.deploy.server.app import create_app
    from fusiontree.deploy.server.running import address_of, bind, run
    from fusiontree.deploy.server.settings import ServerSettings

    settings = ServerSettings(
        keys=_keys(api_key, api_key_file),
        max_body_bytes=max_body_kib * 1024,
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        max_connections=max_connections,
        header_seconds=header_seconds,
        body_seconds=body_seconds,
        request_seconds=request_seconds,
        drain_seconds=drain_seconds,
    )
    limits = Limits(slots=slots, queue=queue, prefix_bytes=prefix_mib * 1024 * 1024)
    places = dict([(served_name or model.resolve().name, model), *map(_named, beside or ())])
    if len(places) <= len(beside or ()):
        raise ConfigError("--beside: two models have the same name; give --served-name or NAME=FOLDER")
    if host not in LOCAL and not settings.keys:
        typer.echo(f"warning: no API key is set, and others reach {host}; set {KEY_VARIABLE}", err=True)
    listening = bind(host, port)  # before models are read: a port that is taken is told at once
    page, index = _report(report), _index(retrieve)
    app = create_app(_load(places, chosen(device), dtype, limits), settings, page, index)

    def ready() -> None:
        typer.echo(f"serving {', '.join(places)} at {address_of(listening)} (Ctrl-C ends)")
        sys.stdout.flush()

    if code := run(app, settings, listening, ready):
        typer.echo("error: an engine has stopped working; the lines above say why", err=True)
        raise typer.Exit(code)


def _needs_packages() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as missing:
        raise ConfigError(f"serve needs the package {missing.name}: pip install 'fusiontree[serve]'") from None


def _keys(given: str | None, path: Path | None) -> tuple[bytes, ...]:
    """The keys of option or variable, and of a file; ConfigError for a file without any, which would open the door."""
    keys = [] if given is None else [os.fsencode(given)]
    if path is not None:
        try:
            lines = path.read_bytes().splitlines()
        except OSError as problem:
            raise ConfigError(f"--api-key-file {path}: {problem.strerror}") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"--api-key-file {path}: no key is in it")
        keys += found
    return tuple(keys)


def _named(text: str) -> tuple[str, Path]:
    """NAME=FOLDER, or FOLDER, whose own name is taken then."""
    name, sign, folder = text.partition("=")
    return (name, Path(folder)) if sign else (Path(text).resolve().name, Path(text))


def _report(run_folder: Path | None) -> Path | None:
    if run_folder is None:
        return None
    from fusiontree.lab.report import write_report

    return write_report(run_folder)


def _index(folder: Path | None) -> Index | None:
    if folder is None:
        return None
    from fusiontree.deploy.retrieval import Index

    return Index(folder)


def _load(places: Mapping[str, Path], device: str | None, dtype: Precision, limits: Limits) -> list[Served]:
    from fusiontree.deploy import InferenceRuntime
    from fusiontree.deploy.scheduler import Scheduler
    from fusiontree.deploy.server.models import Served

    runtimes = {
        name: InferenceRuntime(model_folder(path), device=device, dtype=dtype_of(dtype))
        for name, path in places.items()
    }
    return [Served(name, runtime, Scheduler(runtime, limits)) for name, runtime in runtimes.items()]
