"""`fusiontree data prepare`, `inspect`, `download` and `clean`."""

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
    workers: Annotated[int, typer.Option(min=1, help="Processes; each takes some 16 MB at a time.")] = 1,
) -> None:
    """Tokenise text once into a memory-mapped folder, to be used as a source with mode: static.

    Run again after an interruption, it goes on."""
    from fusiontree.cli.sources import sources
    from fusiontree.data import load_tokenizer, prepare_static

    texts = sources(files, text_field=text_field, min_length=min_length)
    store = prepare_static(texts, load_tokenizer(tokenizer), out, workers)
    for example in store.bad_records.examples[:5]:
        typer.echo(f"warning: skipped {example}", err=True)
    typer.echo(f"{store.bad_records.summary()}, {int(store.offsets[-1]):,} tokens: {out}")


@app.command()
def inspect(
    files: Annotated[list[str], typer.Argument(help="Files, globs, stdlib, or prepared folders.", show_default=False)],
    tokenizer: Annotated[
        str | None, typer.Option(help="Count tokens with this one: folder, name, or byte; else characters.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="JSONL: the key that holds the text; Parquet: the column.")] = "text",
) -> None:
    """Documents, tokens, lengths, duplicates and bad records of text or prepared folders."""
    from fusiontree.cli.sources import sources
    from fusiontree.data import inspect_source, load_tokenizer

    counter = load_tokenizer(tokenizer) if tokenizer is not None else None
    for name in files:
        prepared = (Path(name).expanduser() / "meta.json").is_file()
        settings = {"mode": "static"} if prepared else {"text_field": text_field}
        (source,) = sources([name], **settings)
        typer.echo(name)
        for line in inspect_source(source, counter).lines():
            typer.echo(f"  {line}")


@app.command()
def download(
    corpus: Annotated[
        str,
        typer.Argument(
            help="wikipedia, wikitext, c4, fineweb-edu, tinystories, or owner/name on the hub.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSONL file to make.", show_default=False)],
    language: Annotated[str, typer.Option(help="wikipedia and c4: the language's code.")] = "en",
    subset: Annotated[str | None, typer.Option(help="The corpus's configuration.")] = None,
    split: Annotated[str, typer.Option(help="The corpus's split.")] = "train",
    text_field: Annotated[str | None, typer.Option(help="The column that holds the text.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many documents.")] = None,
) -> None:
    """Fetch a corpus from the Hugging Face hub as JSONL; run again after an interruption, it goes on."""
    from fusiontree.data import corpus_source
    from fusiontree.data import download as fetch

    bad = fetch(corpus_source(corpus, language, subset, split, text_field), out, limit)
    typer.echo(f"{bad.documents:,} documents: {out}")
    if bad.count:
        typer.echo(f"left out: {bad.summary()}", err=True)


@app.command()
def clean(
    days: Annotated[float, typer.Option(min=0, help="What no run has opened for so long.")] = 30,
    cache_dir: Annotated[
        str | None, typer.Option(help="data.cache_dir of the runs; else $FUSIONTREE_CACHE or the user's cache folder.")
    ] = None,
) -> None:
    """Remove tokens of lazy sources that are no longer used; a run that needs them makes them again."""
    from fusiontree.data import clean_cache

    count, size = clean_cache(days, cache_dir)
    typer.echo(f"removed {count:,} token folders, {size / 1e6:,.0f} MB")
