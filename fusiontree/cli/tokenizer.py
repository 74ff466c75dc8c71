"""`fusiontree tokenizer train`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="tokenizer", help="Tokenizers.", no_args_is_help=True)


@app.callback()
def tokenizer() -> None:
    """Tokenizers."""


@app.command()
def train(
    data: Annotated[list[str], typer.Argument(help="Files, globs, or stdlib.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to make.", show_default=False)],
    vocab_size: Annotated[int, typer.Option(help="Ids, special tokens included.")] = 16000,
    text_field: Annotated[str, typer.Option(help="JSONL: the key that holds the text.")] = "text",
) -> None:
    """Train a byte-level BPE on text and save it the Hugging Face way."""
    from fusiontree.cli.sources import sources
    from fusiontree.data import train_tokenizer

    made = train_tokenizer(sources(data, text_field=text_field), vocab_size, out)
    typer.echo(f"tokenizer with {len(made):,} tokens: {out}")
