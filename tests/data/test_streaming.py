"""Streaming through `datasets`: every token in order, exact resume anywhere, mixtures, faults named."""

from __future__ import annotations

import gzip
import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from pydantic import ValidationError

from fusiontree.data import Batch, DataConfig, Loader, SourceConfig, build_loader, prepare_static, streaming
from fusiontree.errors import DataError

TEXTS = [f"<{index}>" + chr(97 + index % 26) * (3 + 11 * index % 70) for index in range(90)]
L = 32


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BATCH_DOCUMENTS", 13)


@pytest.fixture
def files(jsonl) -> str:
    paths = [jsonl(TEXTS[begin : begin + 30], f"s{begin}.jsonl") for begin in (0, 30, 60)]
    return str(Path(paths[0]).parent / "s*.jsonl")


@pytest.fixture
def make(files, tokenizer):
    def build(*, length=L, batch=2, workers=0, rank=0, world=1, longest=None, seed=0, **settings: Any) -> Loader:
        sources = settings.pop("train", [SourceConfig(path=files, mode="streaming")])
        config = DataConfig(train=sources, validation_fraction=0.0, num_workers=workers, **settings)
        return build_loader(config, tokenizer, "train", length, batch, seed, rank, world, longest)

    return build


def text_of(batch: Batch) -> str:
    return "".join(chr(i) if i < 256 else "$" for i in batch["input_ids"].flatten().tolist())


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a["sample_ids"] == b["sample_ids"]
        and all(torch.equal(a[name], b[name]) for name in ("input_ids", "labels", "position_ids"))
        for a, b in zip(left, right, strict=True)
    )


def test_each_pass_has_every_document_once_and_rows_are_full(make) -> None:
    whole = "".join(text + "$" for text in TEXTS)
    text = "".join(text_of(batch) for batch in islice(make(), 3 * len(whole) // (2 * L) + 1))
    passes = [text[begin : begin + len(whole)] for begin in (0, len(whole), 2 * len(whole))]
    for one in passes:
        assert sorted(one.split("$")) == sorted(whole.split("$"))
    assert passes[0] != passes[1], "another order within the batches"
    assert passes[0] != whole


@pytest.mark.parametrize("done", [0, 1, 8, 19, 43])
@pytest.mark.parametrize("workers", [(0, 0), (0, 2), (2, 0)])
def test_resume_gives_the_batch_that_would_have_come(make, done: int, workers: tuple[int, int]) -> None:
    loader = make(workers=workers[0])
    stream = iter(loader)
    for _ in range(done):
        next(stream)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [next(stream) for _ in range(12)]
    resumed = make(workers=workers[1])
    resumed.load_state_dict(state)
    assert json.loads(json.dumps(resumed.state_dict())) == state
    assert same(list(islice(resumed, 12)), expected)
    assert len(json.dumps(state)) < 5000


def test_ranks_divide_each_step_and_another_number_of_ranks_goes_on(make) -> None:
    alone = list(islice(make(batch=4), 12))
    pair = [make(batch=2, rank=rank, world=2) for rank in range(2)]
    found = [list(islice(loader, 6)) for loader in pair]
    for step in range(6):
        assert torch.equal(torch.cat([batches[step]["input_ids"] for batches in found]), alone[step]["input_ids"])
    for loader in pair:
        other = make(batch=4)
        other.load_state_dict(loader.state_dict())
        assert same(list(islice(other, 6)), alone[6:])


@pytest.fixture
def mixed(jsonl, files, tokenizer, tmp_path) -> list[SourceConfig]:
    lazy, text = jsonl(["L" * 40] * 50, "lazy.jsonl"), jsonl(["S" * 30] * 40, "text.jsonl")
    prepare_static([SourceConfig(path=text)], tokenizer, tmp_path / "static")
    return [
        SourceConfig(path=lazy, weight=1.0),
        SourceConfig(path=files, mode="streaming", weight=2.0),
        SourceConfig(path=str(tmp_path / "static"), mode="static", weight=1.0),
    ]


def test_a_mixture_of_all_modes_has_its_shares_and_resumes(make, mixed) -> None:
    loader = make(train=mixed, batch=8)
    stream = iter(loader)
    first = [next(stream) for _ in range(100)]
    text = "".join(text_of(batch) for batch in first)
    shares = [text.count("L") / len(text) * 41 / 40, text.count("S") / len(text) * 31 / 30]
    assert shares == pytest.approx([0.25, 0.25], abs=0.05)
    state = loader.state_dict()
    expected = [next(stream) for _ in range(10)]
    resumed = make(train=mixed, batch=8, workers=2)
    resumed.load_state_dict(state)
    assert same(list(islice(resumed, 10)), expected)
    streamed = "".join(
        text_of(batch)[row * L : (row + 1) * L]
        for batch in first
        for row, sample in enumerate(batch["sample_ids"])
        if loader._mixture.place(sample).source == 1
    )
    whole = "".join(text + "$" for text in TEXTS)
    assert sorted(streamed[: len(whole)].split("$")) == sorted(whole.split("$")), "its rows come in order"


def test_stages_and_synthetic_rows_go_with_a_stream(make) -> None:
    settings = {"longest": 64, "synthetic": {"probability": 0.25, "tasks": ["copy"]}}
    settings["synthetic"] = DataConfig.model_validate({"synthetic": settings["synthetic"]}).synthetic
    loader = make(length=16, batch=8, **settings)
    stream = iter(loader)
    short = [next(stream) for _ in range(4)]
    loader.resize(64, 2)
    state = loader.state_dict()
    long = [next(stream) for _ in range(4)]
    again = make(length=64, batch=2, **settings)
    again.load_state_dict(state)
    assert same(list(islice(again, 4)), long)
    alone = make(length=16, batch=8, **settings)
    assert same(list(islice(alone, 4)), short)


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "jsonl.zst", "parquet"])
def test_local_files_of_other_formats(make, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    line = json.dumps({"text": "one document\nof two lines"}).encode()
    if kind == "txt":
        path.write_text("one document\nof two lines")
    elif kind == "parquet":
        parquet.write_table(pa.table({"text": ["one document\nof two lines"]}), path)
    else:
        path.write_bytes(gzip.compress(line) if kind == "jsonl.gz" else pa.Codec("zstd").compress(line, asbytes=True))
    loader = make(train=[SourceConfig(path=str(path), mode="streaming")])
    assert text_of(next(iter(loader))).startswith("one document\nof two lines$one document")


def test_unusable_records_are_counted_and_too_many_stop(make, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ["good text", None, "ab", "x" * 300] + ["fine"] * 38)
    )
    source = {"path": str(path), "mode": "streaming", "min_length": 3, "max_document_bytes": 200}
    loader = make(train=[SourceConfig(**source)])
    list(islice(loader, 3))
    bad = loader.bad_records
    assert (bad.documents, bad.count, bad.short) == (39, 2, 1)
    assert bad.examples == [
        f'{path}:2: field "text" is not a string but NoneType',
        f"{path}:4: 312 bytes, longer than max_document_bytes 200",
    ]
    strict = make(train=[SourceConfig(**source, max_bad_fraction=0.0)])
    with pytest.raises(DataError, match="records are bad, more than max_bad_fraction 0 allows"):
        list(islice(strict, 9))
    with pytest.raises(DataError, match="no documents"):
        next(iter(make(train=[SourceConfig(**{**source, "text_field": "body"})])))


@pytest.mark.fault(row=14)
def test_a_broken_line_is_skipped_by_name_and_the_rest_kept(make, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"<{number}>"}).encode() for number in range(300)]
    lines[7], lines[200] = b"{broken", b'{"text": "\xff"}'
    path.write_bytes(b"\n".join(lines))
    loader = make(train=[SourceConfig(path=str(path), mode="streaming")])
    read = "".join(text_of(batch) for batch in islice(loader, 60))
    assert {int(number) for number in re.findall(r"<(\d+)>", read)} == set(range(300)) - {7, 200}
    assert loader.bad_records.examples[:2] == [
        f"{path}:8: malformed JSON: Expecting property name enclosed in double quotes at column 2",
        f"{path}:201: invalid UTF-8 at byte 10",
    ]


def test_what_cannot_be_read_is_named(make, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 3)[:-12])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read after line \d+: ") as caught:
        next(iter(make(train=[SourceConfig(path=str(tmp_path / "a.jsonl.gz"), mode="streaming")])))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        make(train=[SourceConfig(path=str(tmp_path / "none.jsonl"), mode="streaming")])
    with pytest.raises(DataError, match="nobody/nothing: cannot be opened on the Hugging Face hub: "):
        make(train=[SourceConfig(path="nobody/nothing", mode="streaming", subset="20231101.en")])


def test_a_changed_file_another_weight_or_a_missing_state_is_refused(make, files, mixed) -> None:
    loader = make()
    state = loader.state_dict()
    with pytest.raises(DataError, match="says nothing of a streaming source"):
        make().load_state_dict({name: value for name, value in state.items() if name != "streams"})
    path = Path(files.replace("s*", "s30"))
    path.write_text(path.read_text().replace("<30>", "<3O>"))
    with pytest.raises(DataError, match="fingerprint"):
        make().load_state_dict(state)
    with pytest.raises(DataError, match="fingerprint"):
        make(train=mixed).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": [{"path": "a", "mode": "streaming", "separator": "x"}]}, "separator has no effect on a streaming"),
        ({"train": [{"path": "a", "subset": "en"}]}, "subset has no effect on a lazy source"),
        ({"train": [{"path": "a", "mode": "streaming"}, {"path": "b"}]}, "give every source a weight"),
        ({"train": [{"path": "a", "mode": "streaming"}], "packing": False}, "a streaming source needs it"),
        ({"validation": [{"path": "a", "mode": "streaming"}]}, "streaming has no end"),
        ({"train": [{"path": "a", "mode": "streaming"}], "synthetic": {"probability": 0.1}}, "a needle lies in"),
    ],
)
def test_settings_that_do_not_fit_a_stream_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(settings)


def test_nothing_is_held_out_of_a_stream(make, files, tokenizer) -> None:
    config = DataConfig(train=[SourceConfig(path=files, mode="streaming")])
    with pytest.raises(DataError, match="nothing is held out of streaming sources"):
        build_loader(config, tokenizer, "validation", L, 2)
