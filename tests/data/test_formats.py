"""Packed and Parquet files: the same documents as in plain ones, bounded memory, damage named."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from fusiontree.data import BadRecords, SourceConfig, open_source
from fusiontree.data.sources import read_source
from fusiontree.errors import DataError

TEXTS = [f"document {index} é中 " + "words " * (index % 9) for index in range(300)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


def read(path: Path, **settings: object) -> tuple[list[str], BadRecords]:
    bad = BadRecords()
    return [document.text for document in read_source(SourceConfig(path=str(path), **settings), bad)], bad


def write_parquet(path: Path, texts: list[object], kind: pa.DataType | None = None, **settings: object) -> Path:
    column = pa.array(texts, kind or pa.string())
    parquet.write_table(pa.table({"id": list(range(len(texts))), "text": column}), path, **settings)
    return path


@pytest.mark.parametrize("packer", PACKERS)
def test_packed_files_hold_the_documents_of_plain_ones(tmp_path: Path, packer: str) -> None:
    (tmp_path / f"a.jsonl.{packer}").write_bytes(PACKERS[packer](LINES))
    (tmp_path / f"a.txt.{packer}").write_bytes(PACKERS[packer](b"one\r\n===\ntwo"))
    (tmp_path / f"empty.jsonl.{packer}").write_bytes(b"")
    (tmp_path / f"two.jsonl.{packer}").write_bytes(PACKERS[packer](LINES[:5000]) + PACKERS[packer](LINES[5000:]))
    assert read(tmp_path / f"a.jsonl.{packer}")[0] == TEXTS
    assert read(tmp_path / f"two.jsonl.{packer}")[0] == TEXTS
    assert read(tmp_path / f"a.txt.{packer}", separator="===\n")[0] == ["one\n", "two"]
    assert read(tmp_path / f"*.jsonl.{packer}", max_samples_per_file=2)[0] == TEXTS[:2] * 2


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("damage", ["cut", "changed", "foreign"])
def test_a_damaged_packed_file_is_named(tmp_path: Path, packer: str, damage: str) -> None:
    data = PACKERS[packer](LINES)
    middle = len(data) // 2
    changed = data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 50]) + data[middle + 50 :]
    path = tmp_path / f"a.jsonl.{packer}"
    path.write_bytes({"cut": data[:middle], "changed": changed, "foreign": LINES}[damage])
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+: cannot be read after line \d+: ") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packer", PACKERS)
def test_a_small_file_that_unpacks_to_much_takes_bounded_memory(tmp_path: Path, packer: str) -> None:
    path = tmp_path / f"a.jsonl.{packer}"
    path.write_bytes(PACKERS[packer](b'{"text": "first"}\n{"text": "' + b"x" * 100_000_000 + b'"}\n{"text": "last"}\n'))
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    texts, bad = read(path, max_document_bytes=1_000_000, max_bad_fraction=1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["first", "last"] and peak < 10_000_000
    assert bad.examples == [f"{path}:2: 100000012 bytes, longer than max_document_bytes 1000000"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize("group", [7, 1000])
def test_a_parquet_column_is_read_row_by_row(tmp_path: Path, tokenizer, kind: pa.DataType, group: int) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, kind, row_group_size=group)
    assert read(path)[0] == TEXTS
    store = open_source(SourceConfig(path=str(path)), tokenizer)
    assert store.locate(41) == f"{path}:42"


def test_nulls_bad_utf8_long_and_short_cells_are_counted(tmp_path: Path) -> None:
    bad_text = pa.array([b"caf\xe9"]).cast(pa.binary()).view(pa.string())
    texts = pa.chunked_array([pa.array(["good", None, "  ", "x" * 100, "\r\nkept as it is\r\n"]), bad_text])
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": texts}), path)
    found, bad = read(path, max_document_bytes=99, max_bad_fraction=1.0)
    assert found == ["good", "\r\nkept as it is\r\n"] and bad.short == 1
    assert bad.examples == [
        f'{path}:2: field "text" is null',
        f"{path}:4: 100 bytes, longer than max_document_bytes 99",
        f"{path}:6: invalid UTF-8 at byte 3",
    ]


def test_a_parquet_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [f"{index:06d}" * 4000 for index in range(2000)], row_group_size=100)
    before = pa.total_allocated_bytes()
    pa.default_memory_pool().release_unused()
    highest = 0
    for _ in read_source(SourceConfig(path=str(path)), BadRecords()):
        highest = max(highest, pa.total_allocated_bytes() - before)
    assert highest < 20_000_000 < 2000 * 24_000


def test_what_is_no_text_column_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(DataError, match=r'a\.parquet: no column "body"; there are: id, text'):
        read(path, text_field="body")
    with pytest.raises(DataError, match=r'column "id" holds int64, not text'):
        read(path, text_field="id")
    data = path.read_bytes()
    for damaged in (b"", b"PAR1", data[:-100], LINES):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet: not a whole Parquet file: ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_progress_counts_the_bytes_on_disk(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path, TEXTS)
    else:
        path.write_bytes(PACKERS.get(name.rsplit(".", 1)[1], bytes)(LINES))
    told: list[int] = []
    assert len(list(read_source(SourceConfig(path=str(path)), BadRecords(), told.append))) == len(TEXTS)
    assert sum(told) == path.stat().st_size


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet: needs the package pyarrow; pip install 'fusiontree\[data\]'"):
        read(path)
