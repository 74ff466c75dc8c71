import json
import sys
import zipfile

import pytest

from fusiontree.errors import DataError
from fusiontree.eval.tasks import records
from fusiontree.eval.tasks.records import Source, from_hub, read_records

ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "é"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def source(name="table", hub=lambda: ROWS):
    return Source(name, ("a", "b"), "https://example.org/table", hub)


def test_a_folder_a_subfolder_a_file_and_a_zip_hold_the_same(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    file = tmp_path / "deep" / "er" / "table.jsonl"
    file.write_text("﻿" + LINES + "\n", encoding="utf-8")
    (tmp_path / "deep" / "other.jsonl").write_text("{}\n")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("data/table.jsonl", LINES)
    for place in (tmp_path / "deep", file, tmp_path / "all.zip"):
        assert read_records(source(), place) == ROWS


def test_json_and_parquet_in_parts(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "table.json").write_text(json.dumps(ROWS))
    assert read_records(source(), tmp_path) == ROWS
    (tmp_path / "table.json").unlink()
    for part, row in enumerate(ROWS):
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"table-0000{part}-of-00002.parquet")
    assert read_records(source(), tmp_path) == ROWS


def test_the_hub_is_asked_only_without_data(tmp_path):
    assert read_records(source(), None) == ROWS
    with pytest.raises(DataError, match=r"has no file table\.jsonl or .*https://example.org/table.*--data"):
        read_records(source(), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table.jsonl", b'{"a": 1, "b": 2}\n{"a": \n', r"table\.jsonl:2: not JSON"),
        ("table.jsonl", b"\xff\xfe", "not UTF-8"),
        ("table.jsonl", b"", "holds no records"),
        ("table.jsonl", b'{"a": 1}\n', "record 1 has no b"),
        ("table.jsonl", b"[1]\n", "record 1 has no a, b"),
        ("table.parquet", b"PAR1", "not a whole Parquet file"),
        ("table.csv", b"a,b", r"\.csv is not read; allowed"),
        ("table.zip", b"PK", "not a whole zip"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_records(source(), tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_not_clear(tmp_path):
    with pytest.raises(DataError, match="nowhere: does not exist"):
        read_records(source(), tmp_path / "nowhere")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "table.jsonl").write_text(LINES)
    with pytest.raises(DataError, match=r"several files could be table: one/table\.jsonl, two/table\.jsonl"):
        read_records(source(), tmp_path)


def test_the_hub_through_datasets(monkeypatch, tmp_path):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: asked.append((args, settings)) or ROWS)
    assert from_hub("someone/table", split="test") == ROWS
    assert asked == [(("someone/table",), {"split": "test"})]

    import huggingface_hub

    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("data/table.jsonl", LINES)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **settings: str(archive))
    assert from_hub("someone/table", "table") == ROWS


def test_a_hub_that_cannot_be_reached_is_waited_for_once(monkeypatch):
    import datasets

    asked = []

    def fail(*args, **settings):
        asked.append(args)
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(records, "UNREACHABLE", {})
    monkeypatch.setattr(datasets, "load_dataset", fail)
    for _ in range(3):
        with pytest.raises(DataError, match="from the Hugging Face hub: Couldn't reach it"):
            from_hub("someone/table", name="one")
    assert len(asked) == 1


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    import datasets

    def fail(*args, **settings):
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"someone/table: cannot be read from the Hugging Face hub: no route to host"):
        from_hub("someone/table")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'fusiontree\[eval\]'"):
        from_hub("someone/table")
