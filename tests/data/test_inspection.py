"""Inspection: the numbers of a source, the same from files and from a prepared folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusiontree.data import SourceConfig, inspect_source, prepare_static
from fusiontree.errors import DataError

TEXTS = ["a" * size for size in (1, 2, 3, 4, 7, 8, 100)] + ["a" * 100, "é" * 50]


def test_documents_lengths_duplicates_and_bad_lines(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in [*TEXTS, " "]]
    path.write_text("\n".join([*lines[:2], "{broken", *lines[2:], '{"txt": 1}']))
    found = inspect_source(SourceConfig(path=str(path)))
    assert found.unit == "characters" and found.lengths.tolist() == [len(text) for text in TEXTS]
    assert (found.duplicates, found.bad_records.count, found.bad_records.short) == (1, 2, 1)
    assert found.histogram() == [(2, 1), (4, 2), (8, 2), (16, 1), (32, 0), (64, 1), (128, 2)]
    report = list(found.lines())
    assert report[:3] == ["documents   9", "characters  275", "duplicates  1 (11.1%)"]
    assert f"  {path}:3: malformed JSON: " in "\n".join(report)
    assert "characters per document: mean 31, 5% 1, 25% 3, 50% 7, 75% 50, 95% 100, longest 100" in report
    in_tokens = inspect_source(SourceConfig(path=str(path)), tokenizer)
    assert in_tokens.lengths.tolist() == [len(text.encode()) + 1 for text in TEXTS]


def test_a_prepared_folder_says_the_same(jsonl, tokenizer, tmp_path: Path) -> None:
    source = SourceConfig(path=jsonl(TEXTS))
    prepare_static([source], tokenizer, tmp_path / "static")
    ours = inspect_source(SourceConfig(path=str(tmp_path / "static"), mode="static"))
    assert list(ours.lines()) == list(inspect_source(source, tokenizer).lines())


def test_a_source_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="no documents"):
        inspect_source(SourceConfig(path=str(tmp_path / "a.jsonl")))
