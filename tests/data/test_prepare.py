"""Token stores: whole or absent, found again, refused when they do not fit, split without overlap."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from fusiontree.data import (
    SourceConfig,
    TokenStore,
    clean_cache,
    open_source,
    parts,
    prepare,
    prepare_static,
    sources,
    train_tokenizer,
    workers,
)
from fusiontree.data.splits import all_pieces, hold_out
from fusiontree.errors import ConfigError, DataError

TEXTS = [f"document {index} " + "words " * (index % 7) for index in range(60)]


def documents(store: TokenStore) -> list[str]:
    bounds = zip(store.offsets[:-1], store.offsets[1:], strict=True)
    return [bytes(store.read(begin, end)[:-1].tolist()).decode() for begin, end in bounds]


def test_a_store_holds_each_document_with_its_end_and_origin(jsonl, tokenizer) -> None:
    path = jsonl(TEXTS)
    store = open_source(SourceConfig(path=path), tokenizer)
    assert documents(store) == TEXTS
    assert all(store.read(end - 1, end)[0] == tokenizer.eos_token_id for end in store.offsets[1:])
    assert store.locate(7) == f"{path}:8"
    offset, size = store.origins[7, 2:]
    assert json.loads(Path(path).read_bytes()[offset : offset + size])["text"] == TEXTS[7]


def test_the_name_of_a_special_token_in_the_text_stays_text(jsonl, tokenizer) -> None:
    store = open_source(SourceConfig(path=jsonl(["a<|endoftext|>b<|pad|>"])), tokenizer)
    assert documents(store) == ["a<|endoftext|>b<|pad|>"]


def test_static_and_lazy_give_the_same_tokens(jsonl, tokenizer, tmp_path: Path) -> None:
    source = SourceConfig(path=jsonl(TEXTS))
    lazy, static = open_source(source, tokenizer), prepare_static([source], tokenizer, tmp_path / "static")
    opened = open_source(SourceConfig(path=str(tmp_path / "static"), mode="static"), tokenizer)
    assert lazy.fingerprint == static.fingerprint == opened.fingerprint
    assert documents(opened) == TEXTS
    assert sorted(os.listdir(tmp_path)) == ["cache", "static", "text.jsonl"]


def test_a_second_opening_reads_no_text(jsonl, tokenizer, monkeypatch) -> None:
    source = SourceConfig(path=jsonl(TEXTS))
    first = open_source(source, tokenizer)
    monkeypatch.setattr(prepare, "read_source", lambda *a: pytest.fail("read again"))
    assert open_source(source, tokenizer).fingerprint == first.fingerprint


@pytest.mark.parametrize("change", ["text", "setting", "tokenizer"])
def test_a_change_makes_another_store(jsonl, tokenizer, tmp_path: Path, change: str) -> None:
    source = SourceConfig(path=jsonl(TEXTS))
    first = open_source(source, tokenizer)
    if change == "text":
        jsonl([*TEXTS[:-1], TEXTS[-1].replace("words", "wards")])
    elif change == "setting":
        source = source.model_copy(update={"min_length": 20})
    else:
        tokenizer = train_tokenizer([source], 270, tmp_path / "tokenizer")
    assert open_source(source, tokenizer).fingerprint != first.fingerprint


def test_a_copy_elsewhere_has_the_same_fingerprint(jsonl, tokenizer) -> None:
    one, two = (open_source(SourceConfig(path=jsonl(TEXTS, name)), tokenizer) for name in ("a.jsonl", "b.jsonl"))
    assert one.folder != two.folder and one.fingerprint == two.fingerprint


def test_an_interruption_leaves_nothing_and_a_restart_works(jsonl, tokenizer, tmp_path, monkeypatch) -> None:
    source, folder = SourceConfig(path=jsonl(TEXTS)), tmp_path / "static"

    def interrupted(*args: object) -> object:
        yield next(original(*args))
        raise KeyboardInterrupt

    original = prepare.tokenise
    monkeypatch.setattr(prepare, "tokenise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_static([source], tokenizer, folder)
    assert not folder.exists() and not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    (tmp_path / "static.tmp").mkdir()  # a killed process cannot tidy up
    (tmp_path / "static.tmp/tokens.bin").write_bytes(b"half")
    assert documents(prepare_static([source], tokenizer, folder)) == TEXTS
    assert not list(tmp_path.glob("*.tmp"))


def test_preparing_again_returns_what_is_there_and_never_overwrites(jsonl, tokenizer, tmp_path: Path) -> None:
    source, folder = SourceConfig(path=jsonl(TEXTS)), tmp_path / "static"
    first = prepare_static([source], tokenizer, folder)
    assert prepare_static([source], tokenizer, folder).fingerprint == first.fingerprint
    with pytest.raises(DataError, match="other text or another tokenizer"):
        prepare_static([SourceConfig(path=jsonl(TEXTS[1:], "b.jsonl"))], tokenizer, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no meta\.json"):
        prepare_static([source], tokenizer, tmp_path / "mine")
    with pytest.raises(ConfigError, match="weights belong to training"):
        prepare_static([source.model_copy(update={"weight": 2.0})], tokenizer, tmp_path / "w")


def test_a_static_store_of_another_tokenizer_is_refused(jsonl, tokenizer, tmp_path: Path) -> None:
    source = SourceConfig(path=jsonl(TEXTS))
    prepare_static([source], tokenizer, tmp_path / "static")
    other = train_tokenizer([source], 270, tmp_path / "tokenizer")
    with pytest.raises(DataError, match="another tokenizer"):
        open_source(SourceConfig(path=str(tmp_path / "static"), mode="static"), other)


DAMAGES = {
    "meta": lambda folder: (folder / "meta.json").write_text("{"),
    "foreign": lambda folder: (folder / "meta.json").write_text('{"format": "other"}'),
    "tokens": lambda folder: os.truncate(folder / "tokens.bin", 100),
    "gone": lambda folder: (folder / "hashes.npy").unlink(),
    "offsets": lambda folder: np.save(folder / "offsets.npy", np.arange(3)),
    "empty": lambda folder: (folder / "origins.npy").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_refused_and_a_damaged_cache_made_again(jsonl, tokenizer, tmp_path, damage, caplog) -> None:
    source = SourceConfig(path=jsonl(TEXTS))
    prepare_static([source], tokenizer, tmp_path / "static")
    DAMAGES[damage](tmp_path / "static")
    with pytest.raises(DataError, match="static"):
        open_source(SourceConfig(path=str(tmp_path / "static"), mode="static"), tokenizer)
    cached = open_source(source, tokenizer)
    DAMAGES[damage](cached.folder)
    assert documents(open_source(source, tokenizer)) == TEXTS
    assert "tokenising again" in caplog.text


def test_tokens_that_no_run_opened_for_long_are_removed(jsonl, tokenizer, cache: Path) -> None:
    old, new, opened = (SourceConfig(path=jsonl(TEXTS[index:], f"{index}.jsonl")) for index in range(3))
    folders = [open_source(source, tokenizer).folder for source in (old, new, opened)]
    draft = folders[0].with_name("f" * 32 + ".tmp")  # left by a killed process
    shutil.copytree(folders[0], draft)
    for folder in (folders[0], folders[2], draft):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (time.time() - 31 * 86400,) * 2)
    size = sum(path.stat().st_size for path in folders[0].iterdir())
    open_source(opened, tokenizer)
    assert clean_cache(30) == (2, 2 * size)
    assert sorted((cache / "tokens").iterdir()) == sorted(folders[1:])
    assert documents(open_source(old, tokenizer)) == TEXTS
    assert clean_cache(0)[0] == 3 and clean_cache(0, cache / "nowhere") == (0, 0)


def test_bad_records_are_remembered_and_judged_at_each_opening(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join('{"text": "x"}\n' for _ in range(9)) + "{\n")
    source = SourceConfig(path=str(path))
    assert open_source(source, tokenizer).bad_records.examples[0].startswith(f"{path}:10: malformed JSON")
    assert open_source(source, tokenizer).bad_records.count == 1
    with pytest.raises(DataError, match="1 of 10 records are bad"):
        open_source(source.model_copy(update={"max_bad_fraction": 0.0}), tokenizer)


def test_a_cache_that_cannot_be_written_is_named(jsonl, tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path}/file/.*cannot be written"):
        open_source(SourceConfig(path=jsonl(TEXTS)), tokenizer, tmp_path / "file")


@pytest.mark.parametrize(
    ("texts", "fraction"),
    [(TEXTS, 0.1), (TEXTS, 0.001), (TEXTS[:5], 0.5), (["one long book " * 50], 0.1), (["a" * 90, "b" * 30], 0.01)],
)
def test_the_two_sides_tile_the_text_without_overlap(jsonl, tokenizer, texts: list[str], fraction: float) -> None:
    store = open_source(SourceConfig(path=jsonl(texts)), tokenizer)
    sides = [hold_out(store, fraction, split, "a") for split in ("train", "validation")]
    tokens = [
        token
        for side in sides
        for begin, length in zip(side.begins, side.lengths, strict=True)
        for token in range(begin, begin + length)
    ]
    assert sorted(tokens) == list(range(int(store.offsets[-1])))
    assert sides[1].lengths.max() >= 2
    assert sides[1].lengths.sum() <= max(0.2, 2 * fraction) * len(tokens)


def test_what_is_held_out_does_not_depend_on_the_order_of_documents(jsonl, tokenizer) -> None:
    held = []
    for name, texts in (("a.jsonl", TEXTS), ("b.jsonl", TEXTS[::-1])):
        store = open_source(SourceConfig(path=jsonl(texts, name)), tokenizer)
        side = hold_out(store, 0.1, "validation", "a")
        held.append({bytes(store.read(b, b + n - 1).tolist()) for b, n in zip(side.begins, side.lengths, strict=True)})
    assert held[0] == held[1]


def test_no_fraction_holds_nothing_out(jsonl, tokenizer) -> None:
    store = open_source(SourceConfig(path=jsonl(TEXTS)), tokenizer)
    assert hold_out(store, 0.0, "train", "a").lengths.sum() == all_pieces(store).lengths.sum()
    with pytest.raises(DataError, match="nothing left for validation"):
        hold_out(store, 0.0, "validation", "a")
    tiny = open_source(SourceConfig(path=jsonl(["a"], "tiny.jsonl")), tokenizer)
    with pytest.raises(DataError, match="nothing left for validation"):
        hold_out(tiny, 0.01, "validation", "a")


def test_several_at_once_do_the_work_once(jsonl, tokenizer, monkeypatch) -> None:
    source, built = SourceConfig(path=jsonl(TEXTS)), []
    original = prepare._build
    monkeypatch.setattr(prepare, "_build", lambda *a: built.append(1) or original(*a))
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: open_source(source, tokenizer), range(4)))
    assert len(built) == 1 and all(documents(store) == TEXTS for store in stores)


@pytest.fixture
def many(jsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[SourceConfig]:
    """Two sources of several files, one file empty, one with a bad line, in parts of one or two files."""
    monkeypatch.setattr(parts, "PART_BYTES", 600)
    for number in range(6):
        jsonl(TEXTS[10 * number : 10 * number + 10], f"a{number}.jsonl")
    jsonl([], "a9.jsonl")
    (tmp_path / "a3.jsonl").write_text((tmp_path / "a3.jsonl").read_text() + "{broken\n")
    return [SourceConfig(path=f"{tmp_path}/a*.jsonl"), SourceConfig(path=jsonl(TEXTS[:40], "b.jsonl"))]


def same_files(one: Path, other: Path) -> bool:
    return all((one / path.name).read_bytes() == path.read_bytes() for path in other.iterdir())


@pytest.mark.parametrize("count", [1, 2])
def test_parts_make_the_same_folder_to_the_byte(many, tokenizer, tmp_path: Path, monkeypatch, count: int) -> None:
    assert len(parts.divide(many, tmp_path / "p", "k")) > 3
    prepare_static(many, tokenizer, tmp_path / "parts", count)
    monkeypatch.setattr(parts, "PART_BYTES", 0)
    prepare_static(many, tokenizer, tmp_path / "files")
    monkeypatch.setattr(prepare, "divide", lambda *a: [None])
    whole = prepare_static(many, tokenizer, tmp_path / "whole")
    assert same_files(tmp_path / "parts", whole.folder) and same_files(tmp_path / "files", whole.folder)
    assert whole.bad_records.count == 1
    assert not [path for path in tmp_path.iterdir() if "parts." in path.name or "files." in path.name]


LARGE = {
    "lines.jsonl": b"\xef\xbb\xbf"
    + b"".join(b'{"text": "line %d %s"}\r\n' % (index, b"words " * (index % 9)) for index in range(300))
    + b'{broken\n{"text": "' + b"x" * 3000 + b'"}\n\n{"text": "the last, without an end"}',
    "blank.txt": b"\n\n\n".join(b"paragraph %d\nof two lines" % index + b"\n" * (index % 4) for index in range(200)),
}  # fmt: skip


@pytest.fixture(params=LARGE)
def large(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[SourceConfig]:
    """One file with odd places in it, between two small ones."""
    monkeypatch.setattr(parts, "PART_BYTES", 1000)
    name = request.param
    for number, data in enumerate((LARGE[name][:300], LARGE[name], LARGE[name][300:400])):
        (tmp_path / f"{number}-{name}").write_bytes(data)
    separator = "\n\n" if name.endswith(".txt") else None
    return [SourceConfig(path=f"{tmp_path}/*{name}", separator=separator, max_document_bytes=2500)]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes that start at once; that fresh ones work too is seen in `..._to_the_byte[2]`."""
    monkeypatch.setattr(workers, "get_context", lambda method: get_context("fork"))


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("count", [1, 2])
def test_one_large_file_is_cut_and_makes_the_same_folder(large, tokenizer, tmp_path, monkeypatch, count: int) -> None:
    made = parts.divide(large, tmp_path / "p", "k")
    assert sum(part.stretch is not None for part in made) > 5 and made[0].stretch is made[-1].stretch is None
    assert sum(part.size for part in made) == sum(path.stat().st_size for path in sources.expand(large[0]))
    prepare_static(large, tokenizer, tmp_path / "parts", count)
    monkeypatch.setattr(prepare, "divide", lambda *a: [None])
    whole = prepare_static(large, tokenizer, tmp_path / "whole")
    assert same_files(tmp_path / "parts", whole.folder)
    bad = whole.bad_records
    assert bad.count == (5 if "jsonl" in large[0].path else 0) and bad.documents > 200


def test_what_cannot_be_cut_stays_whole(jsonl, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    path = jsonl(TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    whole = [
        SourceConfig(path=f"{tmp_path}/a.jsonl.gz"),
        SourceConfig(path=f"{tmp_path}/a.txt"),
        SourceConfig(path=path, max_samples_per_file=50),
    ]
    assert [part.stretch for part in parts.divide(whole, tmp_path / "p", "k")] == [None] * 3
    assert len(parts.divide([SourceConfig(path=path)], tmp_path / "p", "k")) > 10


def test_parts_that_are_done_are_kept_over_an_interruption(many, tokenizer, tmp_path: Path, monkeypatch) -> None:
    made: list[int] = []
    original = parts.make_part

    def interrupted(part, *rest) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        original(part, *rest)

    monkeypatch.setattr(parts, "make_part", interrupted)
    with pytest.raises(KeyboardInterrupt, match="keeps the parts that are done"):
        prepare_static(many, tokenizer, tmp_path / "static")
    assert not (tmp_path / "static").exists() and len(list((tmp_path / "static.parts").iterdir())) == 2
    again: list[int] = []
    monkeypatch.setattr(parts, "make_part", lambda *a: again.append(1) or original(*a))
    store = prepare_static(many, tokenizer, tmp_path / "static")
    assert len(again) == len(parts.divide(many, tmp_path / "x", "k")) - 2
    assert documents(store) == [*TEXTS, *TEXTS[:40]]
    assert not (tmp_path / "static.parts").exists()


def test_too_much_that_is_bad_stops_parts_too(many, tokenizer, tmp_path: Path) -> None:
    strict = [source.model_copy(update={"max_bad_fraction": 0.0}) for source in many]
    with pytest.raises(DataError, match="1 of 61 records are bad"):
        prepare_static(strict, tokenizer, tmp_path / "static")
    assert not (tmp_path / "static").exists() and not list(tmp_path.glob("*.tmp"))


@pytest.mark.fault(row=25)
@pytest.mark.usefixtures("forked")
def test_a_worker_that_is_killed_is_named_and_nothing_hangs(many, tokenizer, tmp_path: Path, monkeypatch) -> None:
    """Row 25: kill -9 of a process that prepares text."""
    victim = TEXTS[0]
    with monkeypatch.context() as patch:
        patch.setattr(parts, "tokenise", _die_at_the_third)
        with pytest.raises(DataError, match=r"a worker process died .* run the same command again") as caught:
            prepare_static(many, tokenizer, tmp_path / "static", workers=2)
    assert re.search(rf"worker [01] at {tmp_path}/[ab]\d?\.jsonl:3\b", str(caught.value))
    assert documents(prepare_static(many, tokenizer, tmp_path / "static"))[0] == victim


def _die_at_the_third(texts, tokenizer) -> None:
    for _ in range(3):
        next(texts)
    os.kill(os.getpid(), signal.SIGKILL)
