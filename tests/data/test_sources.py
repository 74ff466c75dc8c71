"""Which files a path means, and which documents are in them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fusiontree.data import BadRecords, DataConfig, SourceConfig, read_texts, stdlib_corpus
from fusiontree.data.sources import expand, read_source
from fusiontree.errors import ConfigError, DataError


def read(source: SourceConfig) -> tuple[list[str], BadRecords]:
    bad = BadRecords()
    return [document.text for document in read_source(source, bad)], bad


def test_stdlib_is_the_running_pythons_sources() -> None:
    files = stdlib_corpus()
    names = {path.name for path in files}
    assert {"argparse.py", "ast.py", "typing.py"} <= names and files == sorted(files)
    assert not any(part in ("site-packages", "test", "tests") for path in files for part in path.parts[-4:-1])
    assert 400 < len(files) < 1200
    assert 6e6 < sum(path.stat().st_size for path in files) < 30e6


def test_globs_are_sorted_and_recursive(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(SourceConfig(path=f"{tmp_path}/*.txt"))[0] == ["a.txt", "b.txt"]
    assert read(SourceConfig(path=f"{tmp_path}/**/*.txt"))[0] == ["a.txt", "b.txt", "deep/er/c.txt"]


def test_a_name_with_brackets_is_a_file_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert [path.name for path in expand(SourceConfig(path=f"{tmp_path}/a[1].txt"))] == ["a[1].txt"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: str(folder / "no.jsonl"), "no such file"),
        (lambda folder: str(folder / "*.jsonl"), "nothing matches"),
        (lambda folder: str(folder), "is a folder: give a glob"),
        (lambda folder: _file(folder / "a.csv"), r"\.csv is not read here"),
        (lambda folder: _file(folder / "a.tar.gz"), r"\.tar\.gz is not read here"),
        (lambda folder: _file(folder / "a.parquet.zst"), r"\.parquet\.zst is not read here"),
    ],
)
def test_paths_that_cannot_be_read_are_named(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(DataError, match=message):
        expand(SourceConfig(path=make(tmp_path)))


def test_a_pipe_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="not an ordinary file"):
        expand(SourceConfig(path=str(tmp_path / "pipe.txt")))


def test_text_files_lose_bom_and_carriage_returns_and_are_cut_at_the_separator(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n===\r\nthree\r")
    assert read(SourceConfig(path=f"{tmp_path}/a.txt"))[0] == ["one\ntwo\n===\nthree\n"]
    assert read(SourceConfig(path=f"{tmp_path}/a.txt", separator="===\n"))[0] == ["one\ntwo\n", "three\n"]


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / f"{index}.py").write_text("x = 1\n")
    (tmp_path / "9.py").write_bytes(b"name = '\xe9'\n")
    texts, bad = read(SourceConfig(path=f"{tmp_path}/*.py"))
    assert len(texts) == 8 and bad.examples == [f"{tmp_path}/9.py:1: invalid UTF-8 at byte 8"]


def test_short_blank_and_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = ["", "   ", *(json.dumps({"text": text}) for text in ("", " \n", "ab", " ab ", "abc", "abcdef"))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("")
    texts, bad = read(SourceConfig(path=f"{tmp_path}/*.jsonl", min_length=3))
    assert texts == ["abc", "abcdef"]
    assert (bad.documents, bad.short, bad.count) == (2, 7, 0)
    with pytest.raises(DataError, match=r"no documents \(0 bad records, 9 empty or shorter than min_length\)"):
        read(SourceConfig(path=f"{tmp_path}/*.jsonl", min_length=7))


def test_the_text_field_and_the_limit_per_file(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        lines = (json.dumps({"body": f"{name}{index}"}) for index in range(5))
        (tmp_path / name).write_text("\n".join(lines))
    texts, _ = read(SourceConfig(path=f"{tmp_path}/*.jsonl", text_field="body", max_samples_per_file=2))
    assert texts == ["a.jsonl0", "a.jsonl1", "b.jsonl0", "b.jsonl1"]


BAD_LINES = [
    '{"text": "half',
    "[]",
    '{"txt": "x"}',
    '{"text": 5}',
    '{"text": "\\udc00"}',
    '{"text": "x", "n": Infinity}',
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(good=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=12), data=st.data())
def test_bad_lines_are_counted_by_place_and_all_others_kept_in_order(tmp_path: Path, good: list[str], data) -> None:
    lines = [(json.dumps({"text": text}), True) for text in good]
    for _ in range(data.draw(st.integers(0, 6))):
        lines.insert(data.draw(st.integers(0, len(lines))), (data.draw(st.sampled_from(BAD_LINES)), False))
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(line for line, _ in lines), encoding="utf-8")
    texts, bad = read(SourceConfig(path=str(path), max_bad_fraction=1.0))
    assert texts == good
    places = [number for number, (_, is_good) in enumerate(lines, start=1) if not is_good]
    assert bad.count == len(places)
    assert [example.split(": ")[0] for example in bad.examples] == [f"{path}:{place}" for place in places]


def test_read_texts_divides_its_budget_among_the_sources(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps({"text": f"{name}{i:090d}"}) for i in range(50)))
    sources = [SourceConfig(path=f"{tmp_path}/{name}") for name in ("a.jsonl", "b.jsonl")]
    texts = list(read_texts(sources, max_bytes=2000))
    assert [text[:7] for text in texts].count("a.jsonl") == [text[:7] for text in texts].count("b.jsonl") < 15
    assert len(list(read_texts(sources))) == 100


@pytest.mark.parametrize(
    "settings_",
    [{"path": ""}, {"path": "a", "weigth": 1.0}, {"path": "a", "min_length": "3"}, {"path": "a", "weight": 0.0},
     {"path": "a", "weight": float("nan")}, {"path": "a", "mode": "stream"}, {"path": "a", "max_bad_fraction": 1.5},
     {"path": "a", "mode": "static", "min_length": 9}],
)  # fmt: skip
def test_impossible_source_settings_are_refused(settings_: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SourceConfig.model_validate(settings_)


def test_weights_are_for_all_training_sources_or_none() -> None:
    weighted, plain = SourceConfig(path="a", weight=2.0), SourceConfig(path="b")
    with pytest.raises(ValidationError, match="every source a weight"):
        DataConfig(train=[weighted, plain])
    with pytest.raises(ValidationError, match="no effect there"):
        DataConfig(train=[plain], validation=[weighted])


def test_a_static_source_has_no_text() -> None:
    with pytest.raises(ConfigError, match="holds tokens, not text"):
        read(SourceConfig(path="somewhere", mode="static"))


def _file(path: Path) -> str:
    path.write_bytes(b"x")
    return str(path)
