"""Stretches of a large file that can be read apart from each other, cut where a record surely ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fusiontree.data.records import CHUNK_BYTES, overlap_of


class Stretch(NamedTuple):
    """Bytes [begin, end) of a file; `line` is the number (from 1) of the line that begin is on."""

    begin: int
    end: int
    line: int


class Bounded:
    """The next `left` bytes of a file, as a file."""

    def __init__(self, handle: BinaryIO, left: int) -> None:
        self._handle, self._left = handle, left

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        data = self._handle.read(min(size, self._left))
        self._left -= len(data)
        return data


def cut(path: Path, separator: re.Pattern[bytes], size: int, advance: Callable[[int], None]) -> list[Stretch]:
    """Stretches of some `size` bytes that tile a file, each but the last ending behind a separator.

    Reads all but the last, to count lines, and tells `advance`. Where no sure separator comes for long, a stretch is
    longer.
    """
    stretches, begin, line = [], 0, 1
    total = path.stat().st_size
    with path.open("rb") as handle:
        while total - begin > size + size // 2:
            end = _sure_end(handle, separator, begin + size, total)
            stretches.append(Stretch(begin, end, line))
            line += _newlines(handle, begin, end)
            advance(end - begin)
            begin = end
    return [*stretches, Stretch(begin, total, line)] if begin < total else stretches


def _sure_end(handle: BinaryIO, separator: re.Pattern[bytes], start: int, total: int) -> int:
    """Where the first separator from `start` on ends that is one wherever reading began; `total` when there is none.

    In `a↵↵↵b` a blank line begins at the first or at the second newline, depending on what was before: only
    a match that no earlier one overlaps is sure.
    """
    overlap = overlap_of(separator)
    position, reach = max(start - overlap, 0), 0
    while True:
        handle.seek(position)
        data, place = handle.read(CHUNK_BYTES + overlap), 0
        while match := separator.search(data, place):
            first, last = position + match.start(), position + match.end()
            if first >= max(start, reach):
                return last
            reach, place = max(reach, last), match.start() + 1
        if position + len(data) >= total:
            return total
        position += len(data) - overlap


def _newlines(handle: BinaryIO, begin: int, end: int) -> int:
    handle.seek(begin)
    part, count = Bounded(handle, end - begin), 0
    while chunk := part.read(CHUNK_BYTES):
        count += chunk.count(b"\n")
    return count
