"""Bounded reading: sections tile the file whatever the chunk size, and each broken record is named."""

from __future__ import annotations

import io
import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusiontree.data import records
from fusiontree.data.records import BadRecords, RecordError, Section, parse_jsonl, read_sections, separator_pattern
from fusiontree.errors import DataError


def sections(data: bytes, separator: re.Pattern[bytes] | None, limit: int = 1000) -> list[Section]:
    return list(read_sections(io.BytesIO(data), separator, limit))


@given(
    pieces=st.lists(st.text("ab\n", max_size=12), max_size=12),
    separator=st.sampled_from(["\n", "\n\n", "---\n", "<>"]),
    chunk=st.integers(1, 9),
)
def test_sections_equal_splitting_the_whole_file(pieces: list[str], separator: str, chunk: int) -> None:
    data = separator.join(pieces).encode()
    expected = data.split(separator.encode())
    if len(expected) > 1 and not expected[-1]:
        expected.pop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK_BYTES", chunk)
        found = sections(data, separator_pattern(separator))
    assert [section.data for section in found] == expected
    for section in found:
        assert data[section.offset : section.offset + section.size] == section.data
        assert section.line == 1 + data[: section.offset].count(b"\n")


@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=15), chunk=st.integers(1, 20), limit=st.integers(1, 40))
def test_long_sections_are_thrown_away_and_the_others_kept(sizes: list[int], chunk: int, limit: int) -> None:
    data = b"".join(b"x" * size + b"\n" for size in sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK_BYTES", chunk)
        found = sections(data, records.LINE_END, limit)
    assert [(section.size, section.data is None) for section in found] == [(size, size > limit) for size in sizes]
    assert [section.line for section in found] == list(range(1, len(sizes) + 1))


def test_a_newline_in_a_separator_matches_crlf() -> None:
    found = sections(b"one\r\n\r\ntwo\n\nthree", separator_pattern("\n\n"))
    assert [section.data for section in found] == [b"one", b"two", b"three"]
    assert [section.line for section in found] == [1, 3, 5]


def test_without_separator_the_file_is_one_section() -> None:
    assert sections(b"a\n\nb", None) == [Section(0, 1, 4, b"a\n\nb")]
    assert sections(b"", None) == [Section(0, 1, 0, b"")]
    assert sections(b"x" * 50, None, limit=49) == [Section(0, 1, 50, None)]


def test_a_50_mb_line_takes_bounded_memory() -> None:
    class Endless(io.RawIOBase):
        left = 50_000_000

        def read(self, size: int = -1) -> bytes:
            size = min(size, self.left)
            self.left -= size
            return b"x" * size

    tracemalloc.start()
    (section,) = read_sections(Endless(), records.LINE_END, 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert section.size == 50_000_000 and section.data is None
    assert peak < 6_000_000


BROKEN = {
    b'{"text": "half': "malformed JSON: Unterminated string",
    b"[1, 2]": "not a JSON object but list",
    b"3": "not a JSON object but int",
    b'{"other": "x"}': 'no field "text"',
    b'{"text": 3}': "is not a string but int",
    b'{"text": null}': "is not a string but NoneType",
    b'{"text": "a", "n": NaN}': "NaN is not a JSON number",
    b'{"text": "a", "n": -Infinity}': "-Infinity is not a JSON number",
    b'{"text": "caf\xe9"}': "invalid UTF-8 at byte 13",
    b'{"text": "\\ud83d"}': "lone surrogate at character 0",
    b'{"text": ' + b"[" * 100_000: "nested too deeply",
    b'{"text": "a", "n": ' + b"9" * 5_000 + b"}": "a number with too many digits",
    b'{"text": "a"} {"text": "b"}': "malformed JSON: Extra data",
    "{'text': 'a'}".encode("utf-16"): "invalid UTF-8",
}


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_each_broken_line_has_its_reason(line: bytes) -> None:
    with pytest.raises(RecordError) as caught:
        parse_jsonl(Section(0, 1, len(line), line), "text")
    assert BROKEN[line] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'\xef\xbb\xbf{"text": "a"}', "a"),
        (b'{"text": "a"}\r', "a"),
        (b'{"text": "a\\u0000b"}', "a\0b"),
        (b'{"text": "\\ud83d\\ude00"}', "😀"),
        ('{"text": "中"}'.encode(), "中"),
    ],
)
def test_odd_but_good_lines_are_read(line: bytes, text: str) -> None:
    assert parse_jsonl(Section(0, 1, len(line), line), "text") == text


@pytest.mark.parametrize(
    ("documents", "count", "fraction", "refused"),
    [(99, 1, 0.01, False), (1000, 12, 0.01, True), (20, 3, 0.01, False), (8, 4, 0.01, True), (99, 1, 0.0, True)],
)
def test_too_many_bad_records_are_an_error(documents: int, count: int, fraction: float, refused: bool) -> None:
    bad = BadRecords(documents=documents, count=count, examples=["a.jsonl:3: broken"])
    if not refused:
        bad.check("a.jsonl", fraction)
        return
    with pytest.raises(DataError, match=r"first a\.jsonl:3: broken"):
        bad.check("a.jsonl", fraction)


def test_examples_are_bounded_but_all_are_counted() -> None:
    bad = BadRecords()
    for line in range(1000):
        bad.add("a", line, "broken")
    assert (bad.count, len(bad.examples)) == (1000, records.EXAMPLES_KEPT)
