"""Documents out of bytes: bounded reading of JSONL and text files, and the account of what could not be read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from fusiontree.errors import DataError

CHUNK_BYTES = 1 << 20
EXAMPLES_KEPT = 100
ALWAYS_TOLERATED = 5
BOM = b"\xef\xbb\xbf"
LINE_END = re.compile(b"\n")
SURROGATE = re.compile("[\ud800-\udfff]")
Errors = Literal["strict", "replace"]


class RecordError(ValueError):
    """This record cannot be used; the message is the reason."""


@dataclass
class BadRecords:
    """What was left out while reading, in numbers, with the first hundred cases by name."""

    documents: int = 0
    """Good documents."""
    count: int = 0
    """Records that could not be read."""
    short: int = 0
    """Documents left out because they are empty or shorter than `min_length` (not errors)."""
    mended: int = 0
    """Good documents in which something that is no text became U+FFFD (not errors)."""
    examples: list[str] = field(default_factory=list)
    """`file:line: reason` of the first bad records."""

    def add(self, path: str, line: int, reason: str) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{path}:{line}: {reason}")

    def merge(self, other: BadRecords) -> None:
        self.documents += other.documents
        self.count += other.count
        self.short += other.short
        self.mended += other.mended
        self.examples = (self.examples + other.examples)[:EXAMPLES_KEPT]

    def check(self, name: str, max_fraction: float) -> None:
        """Raise DataError when nothing is left or too much is bad.

        Five bad records, but never more than a quarter, are tolerated whatever the fraction (unless it is 0): one
        broken line in a file of twenty is not a broken source.
        """
        seen = self.documents + self.count
        tolerated = min(ALWAYS_TOLERATED, seen / 4) if max_fraction > 0 else 0
        if self.documents and self.count <= max(max_fraction * seen, tolerated):
            return
        first = f"; first {self.examples[0]}" if self.examples else ""
        if not self.documents:
            raise DataError(
                f"{name}: no documents ({self.count} bad records, {self.short} empty or shorter than min_length{first})"
            )
        raise DataError(
            f"{name}: {self.count} of {seen} records are bad, more than max_bad_fraction {max_fraction:g} allows{first}"
        )

    def summary(self) -> str:
        """What was read and what was left out, in one line without the cases."""
        parts = [_counted(self.documents, "document")]
        if self.count:
            parts.append(f"{_counted(self.count, 'bad record')} skipped")
        if self.short:
            parts.append(f"{self.short:,} empty or shorter than min_length left out")
        if self.mended:
            parts.append(f"{self.mended:,} mended")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Section:
    """A stretch of a file between two separators; `data` is None when it is longer than the limit."""

    offset: int
    line: int
    size: int
    data: bytes | None


class Readable(Protocol):
    """A file, or a part of one."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Document:
    """A usable document and where it came from: file, first line (from 1), byte offset and size in the unpacked file.

    In a Parquet file line and offset are both the row (from 1).
    """

    text: str
    path: str
    line: int
    offset: int
    size: int


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def separator_pattern(separator: str) -> re.Pattern[bytes]:
    """Bytes pattern of a separator, in which a newline also matches CRLF."""
    return re.compile(re.escape(separator.encode()).replace(b"\\\n", b"\r?\n"))


def overlap_of(separator: re.Pattern[bytes]) -> int:
    """Bytes that no match is longer than."""
    return 2 * len(separator.pattern)


def read_sections(
    handle: Readable, separator: re.Pattern[bytes] | None, limit: int, offset: int = 0, line: int = 1
) -> Iterator[Section]:
    """Yield the sections of a file in order, holding at most `limit` bytes and a chunk of it (None: one section).

    A section that outgrows `limit` is read to its end and thrown away on the way. An empty file is one empty section.
    `offset` and `line`: where in the file the handle stands, which is the beginning of a section.
    """
    overlap = overlap_of(separator) if separator else 0
    rest = bytearray()
    lost, lost_lines, searched = 0, 0, 0
    while chunk := handle.read(CHUNK_BYTES):
        rest += chunk
        start = 0
        for match in separator.finditer(rest, searched) if separator else ():
            data = bytes(rest[start : match.start()])
            size = lost + len(data)
            yield Section(offset, line, size, data if size <= limit else None)
            offset += size + len(match.group())
            line += lost_lines + data.count(b"\n") + match.group().count(b"\n")
            start, lost, lost_lines = match.end(), 0, 0
        del rest[:start]
        if lost + len(rest) > limit and len(rest) > overlap:
            drop = len(rest) - overlap
            lost, lost_lines = lost + drop, lost_lines + rest.count(b"\n", 0, drop)
            del rest[:drop]
        searched = max(0, len(rest) - overlap)
    if lost or rest or offset == 0:
        size = lost + len(rest)
        yield Section(offset, line, size, bytes(rest) if size <= limit else None)


def decode(section: Section, errors: Errors = "strict") -> str:
    """UTF-8 text of a section, without a byte order mark at the start of the file. Raises RecordError."""
    data = section.data or b""
    if section.offset == 0 and data.startswith(BOM):
        data = data[len(BOM) :]
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise RecordError(f"invalid UTF-8 at byte {error.start}") from None


def parse_text(section: Section, errors: Errors = "strict") -> str:
    """Text with its line ends made `\\n`. Raises RecordError."""
    return decode(section, errors).replace("\r\n", "\n").replace("\r", "\n")


def parse_jsonl(section: Section, text_field: str, errors: Errors = "strict") -> str:
    """The document in one JSONL line. Raises RecordError."""
    try:
        record = json.loads(decode(section, errors), parse_constant=_refuse_constant)
    except RecordError:
        raise
    except json.JSONDecodeError as error:
        raise RecordError(f"malformed JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RecordError("malformed JSON: nested too deeply") from None
    except ValueError:
        raise RecordError("malformed JSON: a number with too many digits") from None
    if not isinstance(record, dict):
        raise RecordError(f"not a JSON object but {type(record).__name__}")
    if text_field not in record:
        raise RecordError(f'no field "{text_field}"')
    text = record[text_field]
    if not isinstance(text, str):
        raise RecordError(f'field "{text_field}" is not a string but {type(text).__name__}')
    return without_surrogates(text, errors)


def _refuse_constant(name: str) -> None:
    raise RecordError(f"malformed JSON: {name} is not a JSON number")


def without_surrogates(text: str, errors: Errors = "strict") -> str:
    """The text, if it can be written as UTF-8; halves of surrogate pairs raise RecordError or are replaced."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if errors == "replace":
            return SURROGATE.sub("\ufffd", text)
        raise RecordError(f"lone surrogate at character {error.start}") from None
    return text
