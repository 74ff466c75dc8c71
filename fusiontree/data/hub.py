"""Streams of Hugging Face `datasets`: corpora on the hub by name, and local files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusiontree.data.config import SourceConfig
from fusiontree.data.formats import COMPRESSIONS, JSONL, PARQUET, open_sections
from fusiontree.data.records import BadRecords, RecordError, without_surrogates
from fusiontree.data.sources import expand, read_section
from fusiontree.errors import DataError

EDGE_BYTES = 1 << 16
SECTION = "section of a file"  # the key of local records, which no corpus has as a column


def local_files(source: SourceConfig) -> list[Path] | None:
    """The files a path means, or None for a name on the hub. Raises DataError when it looks like files but is none."""
    name = source.path
    looks = name.startswith((".", "/", "~")) or any(sign in name for sign in "*?[")
    suffix = Path(name).suffix.lower() in (*JSONL, *COMPRESSIONS, PARQUET, ".txt")
    if looks or suffix or os.path.exists(name):
        return expand(source)
    return None


def open_stream(source: SourceConfig) -> Any:
    """A datasets.IterableDataset; its records are for `document_of`.

    Raises DataError when the package, the files or the hub cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source.path}: streaming needs the package datasets; pip install 'fusiontree[data]'"
        ) from None
    files = local_files(source)
    if files is not None:
        shards = {"files": [str(path) for path in files], "source": source}
        return datasets.IterableDataset.from_generator(_sections, gen_kwargs=shards)
    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True)
    except Exception as error:  # hub, network and reader errors share no base class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{source.path}: cannot be opened on the Hugging Face hub: {reason}") from error


def document_of(record: Mapping[str, Any], number: int, source: SourceConfig, bad: BadRecords) -> str | None:
    """The text of a stream's record if it is a document; else it is counted in `bad`.

    `number`: which of the stream's records it is, from 1; records of local files know their own lines.
    """
    if SECTION not in record:
        return _field(record, number, source, bad)
    document = read_section(Path(record["path"]), record[SECTION], source, bad)
    return None if document is None else document.text


def _sections(files: Sequence[str], source: SourceConfig) -> Iterator[dict[str, Any]]:
    """Local files by the reader of lazy sources, to which one broken line is one broken line; a file is a shard."""
    for path in files:
        for section in open_sections(Path(path), source, lambda size: None):
            yield {"path": path, SECTION: section}


def _field(record: Mapping[str, Any], number: int, source: SourceConfig, bad: BadRecords) -> str | None:
    text = record.get(source.text_field)
    try:
        if not isinstance(text, str):
            raise RecordError(f'field "{source.text_field}" is not a string but {type(text).__name__}')
        if (size := len(text.encode("utf-8", "surrogatepass"))) > source.max_document_bytes:
            raise RecordError(f"{size} bytes, longer than max_document_bytes {source.max_document_bytes}")
        whole = without_surrogates(text, "replace" if source.invalid_text == "replace" else "strict")
    except RecordError as error:
        bad.add(source.path, number, str(error))
        return None
    if len(whole.strip()) < source.min_length:
        bad.short += 1
        return None
    bad.mended += whole is not text
    return whole


def stream_fingerprint(source: SourceConfig) -> str:
    """Hash of the settings and, for local files, of their names, sizes, beginnings and ends."""
    digest = hashlib.sha256()
    said = source.model_dump_json(exclude={"path", "weight", "mode", "max_bad_fraction"})
    digest.update(said.encode())
    files = local_files(source)
    if files is None:
        digest.update(source.path.encode())
    for path in files or []:
        size = path.stat().st_size
        with path.open("rb") as handle:
            digest.update(f"{path.name}/{size}/".encode() + handle.read(EDGE_BYTES))
            handle.seek(max(size - EDGE_BYTES, 0))
            digest.update(handle.read(EDGE_BYTES))
    return digest.hexdigest()
