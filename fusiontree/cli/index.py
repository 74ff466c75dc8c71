"""`fusiontree index`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fusiontree.deploy.retrieval import Hit

app = typer.Typer(name="index", no_args_is_help=True, help="Make local files searchable for --retrieve.")


@app.command()
def build(
    files: Annotated[list[str], typer.Argument(help="Text, JSONL or Parquet files, or globs.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the index; an older index there is replaced.")],
    passage_characters: Annotated[int, typer.Option(help="Length of a passage, about.", min=1)] = 800,
) -> None:
    """Cut files into passages and index them by their words (BM25)."""
    from fusiontree.deploy.retrieval import build_index

    typer.echo(f"index: {build_index(files, out, passage_characters):,} passages in {out}")


@app.command()
def search(
    index: Annotated[Path, typer.Argument(help="Folder that `index build` made.", show_default=False)],
    text: Annotated[str, typer.Argument(help="What to look for.", show_default=False)],
    most: Annotated[int, typer.Option(help="Passages at most.", min=1)] = 4,
) -> None:
    """Show the passages that --retrieve would find for a text."""
    from fusiontree.deploy.retrieval import Index

    for hit in Index(index).search(text, most):
        typer.echo(f"{hit.score:.2f}  {place_of(hit)}\n{hit.passage.text}\n")


def place_of(hit: Hit) -> str:
    """Where a passage stands."""
    return f"{hit.passage.source}:{hit.passage.line}"


def tell_sources(hits: list[Hit]) -> None:
    """Name the passages an answer was given from, apart from the answer itself."""
    typer.echo(f"sources: {', '.join(map(place_of, hits)) or 'none fits'}", err=True)
