"""Downloads: names, one file that appears whole, going on after an interruption, a hub that cannot be reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusiontree.data import SourceConfig, corpus_source, download, streaming
from fusiontree.errors import DataError

TEXTS = [f"document {index} é中\nsecond line" for index in range(40)]


@pytest.fixture
def source(jsonl, monkeypatch: pytest.MonkeyPatch) -> SourceConfig:
    """A local file in place of the hub: the same code reads both."""
    monkeypatch.setattr(streaming, "BATCH_DOCUMENTS", 7)
    return SourceConfig(path=jsonl(TEXTS), mode="streaming")


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_names_stand_for_corpora_of_the_hub() -> None:
    wikipedia = corpus_source("wikipedia", "zh")
    assert (wikipedia.path, wikipedia.subset, wikipedia.mode) == ("wikimedia/wikipedia", "20231101.zh", "streaming")
    assert corpus_source("Wikipedia", subset="20240101.de").subset == "20240101.de"
    assert corpus_source("someone/corpus", split="test", text_field="body").text_field == "body"
    with pytest.raises(
        DataError, match=r"mywiki: no corpus of this name; allowed: wikipedia, wikitext, .* or owner/name"
    ):
        corpus_source("mywiki")
    with pytest.raises(DataError, match="not a code such as en"):
        corpus_source("wikipedia", "../x")


@pytest.mark.parametrize("limit", [None, 1, 7, 17])
def test_a_download_is_whole_or_as_long_as_asked(source: SourceConfig, tmp_path: Path, limit: int | None) -> None:
    bad = download(source, tmp_path / "deep" / "out.jsonl", limit)
    assert texts(tmp_path / "deep" / "out.jsonl") == TEXTS[:limit] and bad.documents == (limit or 40)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_an_interrupted_download_goes_on(source, tmp_path: Path, monkeypatch, batches: int) -> None:
    out, done = tmp_path / "out.jsonl", []
    original = streaming.TextStream.documents

    def interrupted(self: streaming.TextStream, most: int | None = None) -> list[str]:
        if len(done) == batches:
            raise KeyboardInterrupt
        done.append(1)
        return original(self, most)

    monkeypatch.setattr(streaming.TextStream, "documents", interrupted)
    with pytest.raises(KeyboardInterrupt, match=f"after {7 * batches} documents; run the same command again"):
        download(source, out)
    assert not out.exists()
    monkeypatch.setattr(streaming.TextStream, "documents", original)
    with (tmp_path / "out.jsonl.part").open("ab") as handle:
        handle.write(b'{"text": "half a line that a kill left')
    if batches:
        with pytest.raises(DataError, match="is half of another download"):
            download(source, out, limit=3)
    assert download(source, out).documents == 40
    assert texts(out) == TEXTS and not list(tmp_path.glob("out.jsonl.part*"))


def test_what_cannot_be_done_is_one_line(source: SourceConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must end in \.jsonl"):
        download(source, tmp_path / "out.txt")
    (tmp_path / "there.jsonl").write_text("mine")
    with pytest.raises(DataError, match="already there"):
        download(source, tmp_path / "there.jsonl")
    with pytest.raises(DataError, match="wikimedia/wikipedia: cannot be opened on the Hugging Face hub: ") as caught:
        download(corpus_source("wikipedia"), tmp_path / "wiki.jsonl")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no documents"):
        download(source.model_copy(update={"text_field": "body"}), tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl.part").write_text("")
    (tmp_path / "x.jsonl.part.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        download(source, tmp_path / "x.jsonl")
    assert not (tmp_path / "wiki.jsonl").exists() and not (tmp_path / "none.jsonl").exists()
