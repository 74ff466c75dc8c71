"""A file cut into stretches reads as the whole does: the same records at the same places."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusiontree.data import records, stretches
from fusiontree.data.records import Section, read_sections, separator_pattern
from fusiontree.data.stretches import Bounded, Stretch, cut


def whole(data: bytes, separator: str) -> list[Section]:
    return list(read_sections(io.BytesIO(data), separator_pattern(separator), 20))


def in_stretches(path: Path, separator: str, size: int) -> tuple[list[Stretch], list[Section]]:
    pattern = separator_pattern(separator)
    found, sections = cut(path, pattern, size, lambda size: None), []
    for begin, end, line in found:
        with path.open("rb") as handle:
            handle.seek(begin)
            sections += read_sections(Bounded(handle, end - begin), pattern, 20, begin, line)
    return found, sections


@given(
    pieces=st.lists(st.text("ab\n\r", max_size=12), max_size=25),
    separator=st.sampled_from(["\n", "\n\n", "\n\n\n", "a\n", "aa", "aba", "\r\n"]),
    size=st.integers(0, 40),
    chunk=st.integers(1, 30),
)
def test_stretches_hold_the_records_of_the_whole(tmp_path_factory, pieces, separator, size: int, chunk: int) -> None:
    data = separator.join(pieces).encode()
    path = tmp_path_factory.getbasetemp() / "cut"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        for module in (records, stretches):
            patch.setattr(module, "CHUNK_BYTES", chunk)
        found, sections = in_stretches(path, separator, size)
    assert [stretch.begin for stretch in found[1:]] == [stretch.end for stretch in found[:-1]]
    assert sections == (whole(data, separator) if data else [])
    assert found == [] or (found[0].begin, found[-1].end) == (0, len(data))


def test_a_file_is_really_cut_and_a_long_record_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"123456789\n" * 100 + b"x" * 500 + b"\n" + b"123456789\n" * 10)
    found, _ = in_stretches(path, "\n", 100)
    sizes = [stretch.end - stretch.begin for stretch in found]
    assert sizes == [110] * 9 + [511, 100]
    assert [stretch.line for stretch in found][-2:] == [100, 102]


def test_a_newline_whose_side_is_not_sure_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one" + b"\n" * 7 + b"two\n\nthree")
    found, sections = in_stretches(path, "\n\n", 5)
    assert [stretch.begin for stretch in found] == [0, 15]
    assert [section.data for section in sections] == [b"one", b"", b"", b"\ntwo", b"three"]
