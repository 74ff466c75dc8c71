"""Rows 13 to 19 and 25 of the fault matrix, where text is read and batches are made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusiontree.data import BadRecords, DataConfig, Loader, SourceConfig, build_loader, byte_tokenizer
from fusiontree.data.sources import read_source
from fusiontree.data.store import TokenStore
from fusiontree.errors import DataError

HUGE_LINE = """
import resource, sys
from pathlib import Path
from fusiontree.data import DataConfig, SourceConfig, build_loader, byte_tokenizer
path, megabytes = sys.argv[1], int(sys.argv[2])
with open(path, "wb") as handle:
    handle.write(b'{"text": "a good document that stays"}\\n' * 50 + b'{"text": "')
    handle.seek(megabytes * 1_000_000, 1)
    handle.write(b'"}\\n{"text": "the last one"}\\n')
tokenizer = byte_tokenizer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 200_000_000,) * 2)
source = SourceConfig(path=path, max_document_bytes=1_000_000)
loader = build_loader(DataConfig(train=[source], validation=[source]), tokenizer, "train", 32, 2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *loader.bad_records.examples, sep="|")
"""

FULL_DISK = """
import resource, sys
from pathlib import Path
from fusiontree.data import SourceConfig, byte_tokenizer, prepare_static
from fusiontree.errors import DataError
text, out = sys.argv[1:]
Path(text).write_text("word " * 200_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    prepare_static([SourceConfig(path=text)], byte_tokenizer(), out)
except DataError as error:
    print(error)
"""
TEXTS = [f"document {index} " + "words " * (index % 7) for index in range(60)]


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loader_of(*sources: SourceConfig, length: int = 16, batch: int = 2, **settings: Any) -> Loader:
    config = DataConfig(train=list(sources), validation_fraction=0.0, **settings)
    return build_loader(config, byte_tokenizer(), "train", length, batch)


def text_of(loader: Loader) -> str:
    """Everything that comes in an epoch of batches of one row, `$` at the end of a document."""
    batches = list(islice(loader, loader.samples_per_epoch))
    assert all(batch["input_ids"].numel() and batch["position_ids"].numel() for batch in batches)
    ids = [token for batch in batches for token in batch["input_ids"].flatten().tolist() if token != 257]
    return bytes(ord("$") if token == 256 else token for token in ids).decode()


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


@pytest.mark.fault(row=13)
@pytest.mark.parametrize("mode", ["lazy", "streaming"])
def test_changed_text_is_refused_unless_it_is_allowed(jsonl, tmp_path: Path, mode: Any, caplog) -> None:
    """Row 13: one of several files is edited; the message names the way out, and the way out goes on at the place."""
    for number in range(3):
        jsonl(TEXTS[20 * number : 20 * number + 20], f"s{number}.jsonl")
    source = SourceConfig(path=f"{tmp_path}/s*.jsonl", mode=mode)
    before = loader_of(source)
    for _ in islice(before, 5):
        pass
    jsonl([*TEXTS[20:39], "something else"], "s1.jsonl")
    with pytest.raises(DataError, match=r"changed since it was saved \(fingerprint .* data\.allow_changed: true"):
        loader_of(source).load_state_dict(before.state_dict())
    after = loader_of(source, allow_changed=True)
    after.load_state_dict(before.state_dict())
    assert after.position == 10 and next(iter(after))["sample_ids"] == [10, 11]
    assert "going on at sample 10 as asked" in caplog.text
    loader_of(source).load_state_dict(after.state_dict())  # what is saved from now on fits the new text
    with pytest.raises(DataError, match="packing was True"):
        loader_of(SourceConfig(path=source.path), packing=False, allow_changed=True).load_state_dict(
            before.state_dict()
        )


GOOD = [{"text": text} for text in ("plain", "中文", "a\nb", 'quo"te', "x" * 50)]
BAD = st.one_of(
    st.tuples(st.sampled_from(GOOD), st.floats(0, 0.99)).map(
        lambda drawn: (whole := json.dumps(drawn[0]).encode())[: max(1, int(len(whole) * drawn[1]))]
    ),
    st.sampled_from([b"[1]", b"3", b"null", b'"text"', b"{}", b'{"txt": "a"}', b'{"text": 3}', b"\xff"]),
)  # fmt: skip


@pytest.mark.fault(row=14)
@given(good=st.lists(st.sampled_from(GOOD), min_size=1, max_size=20), data=st.data())
def test_every_bad_line_is_counted_and_every_other_one_kept(tmp_path_factory, good: list[Any], data) -> None:
    """Row 14: k bad lines among good ones: k are counted with their lines, the good ones come in order."""
    lines: list[tuple[bool, bytes]] = [(True, json.dumps(record).encode()) for record in good]
    for bad_line in data.draw(st.lists(BAD, max_size=10)):
        lines.insert(data.draw(st.integers(0, len(lines))), (False, bad_line))
    path = tmp_path_factory.getbasetemp() / "row14.jsonl"
    path.write_bytes(b"\n".join(line for _, line in lines))
    bad = BadRecords()
    documents = list(read_source(SourceConfig(path=str(path), max_bad_fraction=1.0), bad))
    assert [document.text for document in documents] == [record["text"] for record in good]
    numbers = [number for number, (is_good, _) in enumerate(lines, 1) if not is_good]
    assert [int(example.split(":")[1]) for example in bad.examples] == numbers
    assert (bad.documents, bad.count) == (len(good), len(numbers))


@pytest.mark.fault(row=14)
def test_too_many_bad_lines_end_it_and_a_few_are_said(write, fault_figure) -> None:
    """Row 14: the rate at which it ends is a setting."""
    path = write("a.jsonl", b'{"text": "good"}\n' * 90 + b"{half\n" * 10)
    loader = loader_of(SourceConfig(path=path, max_bad_fraction=0.1))
    assert loader.bad_records.summary() == "90 documents, 10 bad records skipped"
    with pytest.raises(
        DataError, match=r"10 of 100 records are bad, more than max_bad_fraction 0\.09 allows; first .*:91:"
    ):
        loader_of(SourceConfig(path=path, max_bad_fraction=0.09))
    fault_figure("bad lines counted", 10)


# name: (content, then for skip and for replace: the text of an epoch, bad records, documents mended)
ODD: dict[str, tuple[bytes, tuple[str, int, int], tuple[str, int, int]]] = {
    "a.jsonl": (b'{"text": "caf\xe9"}\n{"text": "b"}', ("b$", 1, 0), ("b$caf\ufffd$", 0, 1)),
    "cut.jsonl": (b'{"text": "b"}\n{"text": "\xe4\xb8"}', ("b$", 1, 0), ("b$\ufffd$", 0, 1)),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16") + b'\n{"text": "b"}', ("b$", 1, 0), ("b$", 1, 0)),
    "bom.jsonl": (b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}', ("a$b$", 0, 0), ("a$b$", 0, 0)),
    "crlf.jsonl": (b'{"text": "a"}\r\n{"text": "b"}\r\n', ("a$b$", 0, 0), ("a$b$", 0, 0)),
    "nul.jsonl": (b'{"text": "a\\u0000"}\n{"text": "\0"}\n{"text": "b"}', ("a\0$b$", 1, 0), ("a\0$b$", 1, 0)),
    "half.jsonl": (b'{"text": "\\ud83d!"}\n{"text": "b"}', ("b$", 1, 0), ("b$\ufffd!$", 0, 1)),
    "odd.txt": (b"\xef\xbb\xbfa\r\nb\0\r\n\r\n\xff\n\nc", ("a\nb\0$c$", 1, 0), ("a\nb\0$c$\ufffd$", 0, 1)),
}


@pytest.mark.fault(row=15)
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("policy", ["skip", "replace"])
@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_that_are_no_text_are_skipped_or_mended(write, name: str, policy: Any, workers: int) -> None:
    """Row 15: invalid UTF-8, byte order mark, CRLF, NUL, lone surrogate: counted, and batches come."""
    content, *outcomes = ODD[name]
    text, bad, mended = outcomes[policy == "replace"]
    separator = "\n\n" if name.endswith(".txt") else None
    source = SourceConfig(path=write(name, content), separator=separator, invalid_text=policy, max_bad_fraction=1.0)
    loader = loader_of(source, length=256, batch=1, num_workers=workers)
    assert sorted(text_of(loader).split("$")) == sorted(text.split("$"))
    assert (loader.bad_records.count, loader.bad_records.mended) == (bad, mended)


EMPTY: dict[str, tuple[bytes, str]] = {
    "empty documents.jsonl": (b'{"text": ""}\n{"text": "a"}\n{"text": ""}\n', "a$"),
    "blank documents.jsonl": (b'{"text": " \\n\\t"}\n{"text": "a"}\n', "a$"),
    "blank lines.jsonl": (b'\n\n{"text": "a"}\n\n \n{"text": "b"}\n\n', "a$b$"),
    "no last newline.jsonl": (b'{"text": "a"}\n{"text": "b"}', "a$b$"),
    "blank text.txt": (b"\n\n \n\na\n\n\n\n\t\n\nb", "a$b$"),
    "empty.jsonl": (b"", ""),
}


@pytest.mark.fault(row=16)
@pytest.mark.parametrize("name", EMPTY)
def test_empty_documents_and_files_make_no_empty_batch(write, tmp_path: Path, name: str) -> None:
    """Row 16: beside a good file each is left out and counted; alone, what has nothing is refused."""
    content, text = EMPTY[name]
    path, good = write(name, content), write("good" + Path(name).suffix, b'{"text": "good"}')
    separator = "\n\n" if name.endswith(".txt") else None
    whole = b'{"text": "good"}'.decode() if separator else "good"
    source = SourceConfig(path=f"{tmp_path}/*{Path(name).suffix}", separator=separator)
    loader = loader_of(source, length=8, batch=1)
    assert sorted("".join(text_of(loader))) == sorted(text + whole + "$")
    assert loader.bad_records.count == 0 and loader.bad_records.documents == text.count("$") + 1
    os.remove(good)
    if not text:
        with pytest.raises(DataError, match="no documents"):
            loader_of(SourceConfig(path=path, separator=separator))


@pytest.mark.fault(row=17)
def test_a_300_mb_line_is_skipped_by_name_in_bounded_memory(tmp_path: Path, fault_figure) -> None:
    """Row 17: with 200 MB of address space to spare."""
    path = tmp_path / "a.jsonl"
    growth, *examples = run(HUGE_LINE, str(path), "300").split("|")
    assert int(growth) < 40_000, "kilobytes"
    assert examples == [f"{path}:51: 300000012 bytes, longer than max_document_bytes 1000000"]
    fault_figure("MB of growth at a 300 MB line", int(growth) / 1000, largest=True)


@pytest.mark.fault(row=18)
def test_json_that_is_too_much_is_a_bad_record(write) -> None:
    """Row 18: 100,000 levels, 5,000 digits, NaN."""
    lines = [b'{"text": "a", "n": ' + odd + b"}" for odd in (b"[" * 100_000, b"9" * 5_000, b"NaN")]
    path = write("a.jsonl", b"\n".join([*lines, *[b'{"text": "good"}'] * 20]))
    bad = loader_of(SourceConfig(path=path)).bad_records
    assert (bad.documents, bad.count) == (20, 3)
    assert [example.removeprefix(f"{path}:") for example in bad.examples] == [
        "1: malformed JSON: nested too deeply",
        "2: malformed JSON: a number with too many digits",
        "3: malformed JSON: NaN is not a JSON number",
    ]


@pytest.mark.fault(row=19)
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("batch", "world"), [(5, 1), (1, 5), (3, 2)])
def test_data_smaller_than_a_step_is_refused_at_once(jsonl, packing: bool, batch: int, world: int) -> None:
    """Row 19: fewer rows than a batch, or than there are processes; each process says so before it waits for others."""
    config = DataConfig(train=[SourceConfig(path=jsonl(["a" * 100]))], validation_fraction=0.0, packing=packing)
    for rank in range(world):
        with pytest.raises(DataError, match="101 tokens make 4 rows of up to 32, fewer than one step needs"):
            build_loader(config, byte_tokenizer(), "train", 32, batch, rank=rank, world_size=world)
    assert build_loader(config, byte_tokenizer(), "train", 32, 4).samples_per_epoch == 4


@pytest.mark.fault(row=19)
def test_a_small_stream_is_read_again_and_again(jsonl) -> None:
    """Row 19: a stream has no end, so no batch is too large for it."""
    loader = loader_of(SourceConfig(path=jsonl(["a" * 100]), mode="streaming"), length=32, batch=5000)
    assert next(iter(loader))["input_ids"].shape == (5000, 32)


@pytest.mark.fault(row=25)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_in_a_loader_worker_names_it_and_the_text(jsonl, monkeypatch, workers: int) -> None:
    """Row 25: workers are threads, which cannot be killed alone; what goes wrong in one comes out, with its place."""
    path = jsonl(TEXTS)
    loader = loader_of(SourceConfig(path=path), num_workers=workers)
    original, reads = TokenStore.read, iter(range(30))

    def broken(self: TokenStore, begin: int, end: int) -> Any:
        if next(reads, None) is None:
            raise OSError("Input/output error")
        return original(self, begin, end)

    monkeypatch.setattr(TokenStore, "read", broken)
    stream = iter(loader)
    who = "loader worker [01]" if workers else "loader"
    with pytest.raises(DataError, match=rf"^{who}, sample \d+ \({path}:\d+ to {path}:\d+\): OSError: Input") as caught:
        for _ in range(100):
            next(stream)
    assert isinstance(caught.value.__cause__, OSError)
    done = loader.position
    assert 0 < done < 60 and next(stream, None) is None, "the stream is over, not stuck"
    monkeypatch.undo()
    assert next(iter(loader))["sample_ids"] == [done, done + 1], "and can be taken up where it failed"


@pytest.mark.fault(row=4)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """Row 4: while text is prepared."""
    out = tmp_path / "static"
    message = run(FULL_DISK, str(tmp_path / "a.txt"), str(out))
    assert message == f"{out}: cannot be written: File too large"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["a.txt"]
