"""`fusiontree verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusiontree.cli.sampling import Device
from fusiontree.cli.sampling import device as chosen

if TYPE_CHECKING:
    from torch import Tensor

    from fusiontree.eval.verify import Finding

BROKEN = 1  # exit code
ROWS = 8


def _list(wanted: bool) -> None:
    if not wanted:
        return
    from fusiontree.eval.verify import LINES

    for line in LINES:
        typer.echo(f"{line.name:18} {line.claim}")
    raise typer.Exit


def verify(
    model: Annotated[
        str,
        typer.Argument(
            help="Model or run folder (its newest checkpoint), or any Hugging Face causal model: folder or hub name.",
            show_default=False,
        ),
    ],
    lines: Annotated[str, typer.Option(help="Lines by name, a,b,…; left out: all. See --list.")] = "",
    length: Annotated[int, typer.Option(help="Tokens of the texts.", min=16)] = 97,
    text: Annotated[
        Path | None, typer.Option(help="Text to read, with the model's tokenizer; left out: random tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    tolerance: Annotated[
        float, typer.Option(help="Relative error of logits up to which a line holds, where it has none of its own.")
    ] = 1e-4,
    output: Annotated[Path | None, typer.Option(help="JSON file to write what was found to.")] = None,
    device: Device = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with a model.")
    ] = False,
    show_list: Annotated[
        bool, typer.Option("--list", help="Show the lines there are, and end.", is_eager=True, callback=_list)
    ] = False,
) -> None:
    """Hold a model against the contract: however a text is fed to it, its logits must be the same.

    In pieces, cached, padded, packed, in batches, saved, pruned, in bf16, on the GPU. Exit code 1 when one is broken.
    """
    import torch

    from fusiontree.cli.values import model_place
    from fusiontree.deploy import console_progress, cut_branches
    from fusiontree.eval.loading import load_causal_model
    from fusiontree.eval.verify import Specimen, find_lines
    from fusiontree.eval.verify import verify as examine

    wanted = find_lines(*(name.strip() for name in lines.split(",") if name.strip()))
    place = model_place(model)
    network = load_causal_model(place, device=chosen(device), dtype=torch.float32, trust_remote_code=trust_remote_code)
    ids = _tokens(network, place, length, text, seed, trust_remote_code)
    with console_progress("verifying") as progress:
        findings = examine(Specimen(network, ids, cut_branches), wanted, tolerance, progress)
    _tell(network, place, length, findings, output)


def _tokens(network: Any, place: str, length: int, text: Path | None, seed: int, trust_remote_code: bool) -> Tensor:
    """(8, length) token ids: of a text, else drawn."""
    import torch

    from fusiontree.errors import ConfigError, DataError
    from fusiontree.eval.loading import load_tokenizer
    from fusiontree.eval.subject import context_limit
    from fusiontree.eval.verify.rows import NEW_TOKENS

    limit = context_limit(network.config, None)
    if limit is not None and length + NEW_TOKENS > limit:
        raise ConfigError(f"--length {length}: with {NEW_TOKENS} generated tokens more than the model's {limit}")
    size = network.get_input_embeddings().num_embeddings
    if text is None:
        return torch.randint(size, (ROWS, length), generator=torch.Generator().manual_seed(seed))
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {text}: cannot be read: {error}") from None
    found = load_tokenizer(place, trust_remote_code)(words, add_special_tokens=False, verbose=False).input_ids
    if len(found) < ROWS * length:
        raise DataError(f"--text {text}: {len(found):,} tokens; {ROWS} rows of {length} need {ROWS * length:,}")
    ids = torch.tensor(found[: ROWS * length]).view(ROWS, length)
    if int(ids.max()) >= size:
        raise DataError(f"{place}: its tokenizer gives id {int(ids.max())}, the model has {size} embeddings")
    return ids


def _tell(network: Any, place: str, length: int, findings: Sequence[Finding], output: Path | None) -> None:
    """Table, file, and last on standard output one JSON object; exit code 1 when a line is broken."""
    import shlex
    import sys
    from dataclasses import asdict

    from rich.console import Console

    from fusiontree.eval.journal import finite, to_json, write_whole
    from fusiontree.eval.provenance import provenance
    from fusiontree.eval.verify import contract_table
    from fusiontree.models.fingerprint import model_fingerprint

    Console(highlight=False).print(contract_table(place, findings))
    names = {status: [one.name for one in findings if one.status == status] for status in STATUSES}
    facts = {"model": place, "fingerprint": model_fingerprint(network), "length": length}
    if output is not None:
        import json

        record = {
            **facts,
            "command": shlex.join(["fusiontree", *sys.argv[1:]]),
            "provenance": provenance(network.device),
            "lines": [asdict(finding) for finding in findings],
        }
        write_whole(output, json.dumps(finite(record), indent=2, ensure_ascii=False) + "\n")
        typer.echo(f"written: {output}")
    typer.echo(to_json({**facts, **names, "file": None if output is None else str(output)}))
    if names["broken"]:
        raise typer.Exit(BROKEN)


STATUSES = ("holds", "broken", "not offered")
