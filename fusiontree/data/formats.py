"""Formats of text files: what a name says of the content, and the records inside, one at a time, in bounded memory.

A file is JSONL (.jsonl, .ndjson), Parquet (.parquet) or else plain text; JSONL and text may be compressed (.gz, .zst).
A damaged compressed or Parquet file is an error and not a bad record: how much of it is lost cannot be counted.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from fusiontree.data.config import SourceConfig
from fusiontree.data.records import (
    LINE_END,
    Errors,
    RecordError,
    Section,
    decode,
    parse_jsonl,
    parse_text,
    read_sections,
    separator_pattern,
)
from fusiontree.data.stretches import Bounded, Stretch
from fusiontree.errors import DataError

Kind = Literal["jsonl", "text", "parquet"]
Compression = Literal["gz", "zst"]
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
JSONL = {".jsonl", ".ndjson"}
PARQUET = ".parquet"
UNREADABLE = {
    ".json", ".arrow", ".csv", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z", ".pdf", ".docx", ".bin", ".npy", ".npz",
    ".pt", ".safetensors", ".pkl", ".pyc", ".so", ".exe", ".png", ".jpg",
}  # fmt: skip
ALLOWED = ".jsonl, .ndjson, .txt and source code, each also .gz or .zst, and .parquet"
BATCH_BYTES = 4 << 20
LARGEST_BATCH = 4096


class Format(NamedTuple):
    """Content and compression of a file."""

    kind: Kind
    compression: Compression | None


def format_of(path: Path) -> Format:
    """The format that a file's name says. Raises DataError for one that is not read here."""
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    compression = COMPRESSIONS.get(suffixes[-1])
    inner = (suffixes[-2] if len(suffixes) > 1 else "") if compression else suffixes[-1]
    if inner in UNREADABLE or (compression and inner in (PARQUET, *COMPRESSIONS)):
        name = f"{inner}{suffixes[-1]}" if compression else inner
        raise DataError(f"{path}: {name} is not read here; allowed: {ALLOWED}")
    if inner == PARQUET:
        return Format("parquet", None)
    return Format("jsonl" if inner in JSONL else "text", compression)


def separator_of(form: Format, source: SourceConfig) -> re.Pattern[bytes] | None:
    """What stands between two records of a file; None: it is one record."""
    if form.kind == "jsonl":
        return LINE_END
    return separator_pattern(source.separator) if source.separator else None


def open_sections(
    path: Path, source: SourceConfig, advance: Callable[[int], None], stretch: Stretch | None = None
) -> Iterator[Section]:
    """Records of a file, or of a stretch of it, in order; `advance` is told the bytes of the file read since.

    Raises DataError when the file cannot be read or is damaged.
    """
    form = format_of(path)
    begin, line = (stretch.begin, stretch.line) if stretch else (0, 1)
    try:
        if form.kind == "parquet":
            yield from _parquet_sections(path, source, advance)
            return
        separator = separator_of(form, source)
        with path.open("rb") as raw, _decompressed(raw, form.compression, path) as whole:
            told = raw.seek(begin)
            handle = Bounded(raw, stretch.end - begin) if stretch else whole
            for section in read_sections(handle, separator, source.max_document_bytes, begin, line):
                advance(raw.tell() - told)
                told, line = raw.tell(), section.line
                yield section
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read after line {line}: {reason}") from error


def parse(form: Format, section: Section, text_field: str, errors: Errors = "strict") -> str:
    """The document in a record. Raises RecordError."""
    if form.kind == "jsonl":
        return parse_jsonl(section, text_field, errors)
    if form.kind == "text":
        return parse_text(section, errors)
    if section.data is None:
        raise RecordError(f'field "{text_field}" is null')
    return decode(section, errors)


@contextmanager
def _decompressed(raw: BufferedReader, compression: Compression | None, path: Path) -> Iterator[BinaryIO]:
    if compression == "gz":
        with gzip.GzipFile(fileobj=raw) as handle:
            yield cast(BinaryIO, handle)
    elif compression == "zst":
        arrow = _arrow(path)
        if raw.peek(1):  # Arrow takes an empty file for a cut one
            with arrow.CompressedInputStream(arrow.PythonFile(raw, mode="r"), "zstd") as handle:
                yield handle
        else:
            yield raw
    else:
        yield raw


def _parquet_sections(path: Path, source: SourceConfig, advance: Callable[[int], None]) -> Iterator[Section]:
    """One section per row, its line the row's number; `data` None is a null unless the row is too long."""
    arrow = _arrow(path)
    from pyarrow import parquet

    size = path.stat().st_size
    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            _check_column(path, file.schema_arrow, source.text_field, arrow)
            rows, row = max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(_batch_rows(file.metadata), columns=[source.text_field]):
                for value in batch.column(0):
                    row += 1
                    yield _cell(row, value, source.max_document_bytes)
                advance(size * row // rows - size * (row - len(batch)) // rows)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file: {' '.join(str(error).split())[:200]}") from error


def _cell(row: int, value: Any, limit: int) -> Section:
    """The bytes of a text cell, not copied when they are too many."""
    if not value.is_valid:
        return Section(row, row, 0, None)
    data = value.as_buffer()
    return Section(row, row, data.size, data.to_pybytes() if data.size <= limit else None)


def _check_column(path: Path, schema: Any, name: str, arrow: Any) -> None:
    if name not in schema.names:
        raise DataError(f'{path}: no column "{name}"; there are: {", ".join(schema.names)[:200]}')
    kind = schema.field(name).type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise DataError(f'{path}: column "{name}" holds {kind}, not text')


def _batch_rows(metadata: Any) -> int:
    """Rows that take a few megabytes, so that memory is bounded whatever the rows' size."""
    rows = max(metadata.num_rows, 1)
    total = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return int(min(max(BATCH_BYTES * rows // max(total, 1), 1), LARGEST_BATCH))


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: needs the package pyarrow; pip install 'fusiontree[data]'") from None
    return pyarrow
