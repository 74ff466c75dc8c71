"""`fusiontree gates`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusiontree.cli.sampling import Device
from fusiontree.cli.sampling import device as chosen
from fusiontree.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fusiontree.eval.gates import ReadText


def gates(
    model: Annotated[
        str, typer.Argument(help="Model folder, or run folder (its newest checkpoint).", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="Folder for page, pictures and numbers.", show_default=False)],
    text: Annotated[
        Path | None, typer.Option(help="A text file: its beginning is shown token by token.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text for the statistics: file or glob, may be given again; stdlib. None: the text's."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens per row; left out: 512, or all positions of a shorter model.", min=2)
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows to read at most.", min=1)] = 64,
    show: Annotated[int, typer.Option(help="Tokens on the page at most.", min=1)] = 400,
    device: Device = "auto",
) -> None:
    """Show which branch each layer listens to on a text: heat maps, a table, and a page to read token by token."""
    import torch

    from fusiontree.cli.values import model_place
    from fusiontree.eval.gates import watch
    from fusiontree.eval.gates.observe import gated_layers
    from fusiontree.eval.loading import load_causal_model, load_tokenizer

    if text is None and not data:
        raise ConfigError("gates: give --text FILE, --data FILE, or both")
    place = model_place(model)
    network = load_causal_model(place, device=chosen(device), dtype=torch.float32)
    gated_layers(network)
    longest = network.config.max_position_embeddings
    length = length or min(512, longest)
    if length > longest:
        raise ConfigError(f"--length {length}: this model has {longest} positions; at most {longest} is allowed")
    tokenizer = load_tokenizer(place)
    read = None if text is None else _read(tokenizer, text)
    batches = list(_batches(data, tokenizer, length, rows)) if data else read.rows(length, rows)  # type: ignore[union-attr]
    record = watch(network, batches, _shown(read, batches, tokenizer, min(show, length)), tokenizer)
    _write({"model": place, **record}, network, output)


def _read(tokenizer: Any, path: Path) -> ReadText:
    from fusiontree.eval.gates import read_text

    try:
        read = read_text(tokenizer, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {path}: cannot be read: {error}") from None
    if not read.ids:
        raise DataError(f"--text {path}: there is no text in it")
    return read


def _batches(data: list[str], tokenizer: Any, length: int, rows: int) -> Iterable[Mapping[str, Any]]:
    from itertools import islice

    from fusiontree.cli.prune import held_out
    from fusiontree.data import build_loader

    loader = build_loader(held_out(data, None), tokenizer, split="validation", sequence_length=length, batch_size=1)
    return islice(loader, rows)


def _shown(read: ReadText | None, batches: list[Any], tokenizer: Any, most: int) -> ReadText:
    """The beginning of the text, else of the longest stretch of one document in the data."""
    from fusiontree.eval.gates import ReadText
    from fusiontree.eval.gates.observe import pieces_of

    if read is not None:
        return ReadText(read.ids[:most], read.pieces[:most])
    ids = max((stretch for batch in batches for stretch in _stretches(batch)), key=len, default=[])[:most]
    return ReadText(ids, pieces_of(tokenizer, ids))


def _stretches(batch: Any) -> Iterable[list[int]]:
    """Ids of each document in a packed batch."""
    for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
        begins = [i for i, position in enumerate(positions) if i == 0 or position == 0]
        yield from (ids[begin:end] for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True))


def _write(record: dict[str, Any], network: Any, output: Path) -> None:
    """Page, pictures, numbers; a table on the console, and last on standard output one JSON object."""
    import json
    import shlex
    import sys

    from fusiontree.eval.gates import draw_gates, gate_page
    from fusiontree.eval.journal import finite, to_json, write_whole
    from fusiontree.eval.provenance import provenance
    from fusiontree.models.fingerprint import model_fingerprint

    facts = {"fingerprint": model_fingerprint(network), "command": shlex.join(["fusiontree", *sys.argv[1:]])}
    pictures = draw_gates(record)
    write_whole(output / "gates.html", gate_page(record, pictures))
    for name, png in pictures.items():
        (output / f"{name}.png").write_bytes(png)
    content = finite({**facts, "provenance": provenance(network.device), **record})
    write_whole(output / "gates.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    _print(record)
    for name in ("gates.html", "gates.json", *(f"{name}.png" for name in pictures)):
        typer.echo(f"written: {output / name}")
    means = {str(layer["layer"]): layer["gate"] and layer["gate"]["mean"] for layer in record["layers"]}
    typer.echo(to_json({"model": record["model"], **facts, "tokens": record["tokens"], "mean_gate": means}))


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fusiontree.eval.gates.page import kind_of

    classes = [name for name, count in record["class_tokens"].items() if count]
    table = Table("layer", "branches", box=None, pad_edge=False)
    for head in ("mean", "spread", *classes):
        table.add_column(head, justify="right")
    for layer in record["layers"]:
        gate = layer["gate"]
        numbers = [gate["mean"], gate["std"], *(gate["classes"][name] for name in classes)] if gate else []
        table.add_row(str(layer["layer"]), kind_of(layer), *(f"{number:.3f}" for number in numbers))
    Console(highlight=False).print(table)
