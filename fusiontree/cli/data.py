"""`fusiontree data prepare`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="data", help="Training text.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Training text."""


@app.command()
def prepare(
    files: Annotated[list[str], typer.Argument(help="Files, globs, or stdlib.", show_default=False)],
    tokenizer: Annotated[str, typer.Option(help="Folder, name, or byte.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to make.", show_default=False)],
    text_field: Annotated[str, typer.Option(help="JSONL: the key that holds the text.")] = "text",
    min_length: Annotated[int, typer.Option(help="Characters; shorter documents are left out.")] = 1,
) -> None:
    """Tokenise text once into a memory-mapped folder, to be used as a source with mode: static."""
    from fusiontree.cli.sources import sources
    from fusiontree.data import load_tokenizer, prepare_static

    texts = sources(files, text_field=text_field, min_length=min_length)
    store = prepare_static(texts, load_tokenizer(tokenizer), out)
    for example in store.bad_records.examples[:5]:
        typer.echo(f"warning: skipped {example}", err=True)
    typer.echo(f"{store.bad_records.summary()}, {int(store.offsets[-1]):,} tokens: {out}")
