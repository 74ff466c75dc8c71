"""Several processes at once: one does the work and the others find it; a killed one blocks nobody and leaves nobody."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from fusiontree.data import (
    DataConfig,
    SourceConfig,
    TokenizerConfig,
    build_loader,
    locks,
    parts,
    prepare,
    prepare_static,
    resolve_tokenizer,
    tokenizer,
    tokenizer_hash,
    workers,
)
from fusiontree.data.locks import locked
from fusiontree.errors import DataError

TEXTS = [f"document {index} of some words " * (index % 9 + 1) for index in range(120)]
SECONDS = 60
fork = get_context("fork")  # real processes that inherit what is patched here


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def told(path: Path, what: str, original: Callable[..., Any], then: Callable[[], None] = lambda: None) -> Any:
    """`original`, which first writes its process id into a file."""

    def wrapper(*args: Any) -> Any:
        with path.open("a") as handle:
            handle.write(f"{what} {os.getpid()}\n")
        then()
        return original(*args)

    return wrapper


def start_run(folder: Path, source: SourceConfig, out: Any, begin: Any) -> None:
    """What each process of a run does first."""
    begin.wait(SECONDS)
    made = resolve_tokenizer(TokenizerConfig(train_vocab_size=280), [source], folder / "run" / "tokenizer")
    loader = build_loader(DataConfig(train=[source]), made, "train", 32, 4)
    out.put((tokenizer_hash(made), loader.fingerprint, next(iter(loader))["input_ids"].tolist()))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is written who trained a tokenizer and who tokenised."""
    path = tmp_path / "work.log"
    monkeypatch.setattr(tokenizer, "train_tokenizer", told(path, "train", tokenizer.train_tokenizer))
    monkeypatch.setattr(prepare, "_build", told(path, "build", prepare._build))
    return path


def test_four_processes_that_start_at_once_share_the_work(jsonl, tmp_path: Path, work: Path) -> None:
    source, out, begin = SourceConfig(path=jsonl(TEXTS)), fork.SimpleQueue(), fork.Barrier(4)
    processes = [fork.Process(target=start_run, args=(tmp_path, source, out, begin)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0] * 4
    found = [out.get() for _ in processes]
    assert found == [found[0]] * 4
    assert sorted(line.split()[0] for line in lines(work)) == ["build", "train"]
    left = [path.name for path in tmp_path.rglob("*") if path.suffix in (".lock", ".tmp")]
    assert left == []


@pytest.mark.fault(row=25)
@pytest.mark.parametrize("what", ["train", "build"])
def test_a_killed_holder_does_not_block_the_others(jsonl, tmp_path: Path, monkeypatch, work: Path, what: str) -> None:
    """Row 25: the process that holds the lock is killed at its work; one of those that wait does it anew."""
    source, out, begin = SourceConfig(path=jsonl(TEXTS)), fork.SimpleQueue(), fork.Barrier(1)
    with monkeypatch.context() as patch:
        if what == "train":
            patch.setattr(tokenizer, "_core", told(work, "stop", tokenizer._core, lambda: time.sleep(SECONDS)))
        else:
            patch.setattr(prepare, "tokenise", told(work, "stop", prepare.tokenise, lambda: time.sleep(SECONDS)))
        holder = fork.Process(target=start_run, args=(tmp_path, source, out, begin))
        holder.start()
    wait_until(lambda: any(line.startswith("stop") for line in lines(work)))
    others = [fork.Process(target=start_run, args=(tmp_path, source, out, begin)) for _ in range(3)]
    for process in others:
        process.start()
    time.sleep(0.3)
    assert all(process.is_alive() for process in others), "nobody works while the holder lives"
    holder.kill()
    for process in (holder, *others):
        process.join(SECONDS)
    assert [process.exitcode for process in others] == [0] * 3
    found = [out.get() for _ in others]
    assert found == [found[0]] * 3
    assert sum(line.startswith(what) for line in lines(work)) == 2


def _hold(target: Path, count: Path, turns: int) -> None:
    for _ in range(turns):
        with locked(target):
            number = int(count.read_text())
            time.sleep(0.001)
            count.write_text(str(number + 1))


def test_a_lock_keeps_others_out_although_its_file_goes_away(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    arguments = (tmp_path / "target", tmp_path / "count", 20)
    processes = [fork.Process(target=_hold, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    assert (tmp_path / "count").read_text() == "80" and not (tmp_path / "target.lock").exists()


def test_a_lock_whose_file_was_taken_away_meanwhile_is_none(tmp_path: Path, monkeypatch) -> None:
    real, opened = os.open, []

    def overtaken(path: Path, *rest: int) -> int:
        opened.append(real(path, *rest))
        if len(opened) == 1:
            path.unlink()  # the holder before let go between our opening the file and our locking it
        return opened[-1]

    monkeypatch.setattr(locks.os, "open", overtaken)
    with locked(tmp_path / "target"):
        assert len(opened) == 2 and (tmp_path / "target.lock").exists()


def _prepare(source: SourceConfig, made: Any, folder: Path) -> None:
    prepare_static([source], made, folder, workers=2)


@pytest.mark.fault(row=25)
def test_workers_of_a_killed_prepare_end_and_the_next_one_goes_on(jsonl, tmp_path: Path, monkeypatch) -> None:
    """Row 25: kill -9 of `data prepare` while its workers write: they end too, and nothing half-made is used."""
    log = tmp_path / "work.log"
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
    monkeypatch.setattr(workers, "get_context", lambda method: fork)
    source, made = SourceConfig(path=jsonl(TEXTS)), tokenizer.byte_tokenizer()
    with monkeypatch.context() as patch:
        patch.setattr(parts, "tokenise", told(log, "stop", parts.tokenise, lambda: time.sleep(SECONDS)))
        parent = fork.Process(target=_prepare, args=(source, made, tmp_path / "static"))
        parent.start()
        wait_until(lambda: len(lines(log)) == 2)
    parent.kill()
    parent.join(SECONDS)
    pids = [int(line.split()[1]) for line in lines(log)]
    try:
        wait_until(lambda: not any(is_running(worker) for worker in pids))
    finally:
        for worker in filter(is_running, pids):
            os.kill(worker, signal.SIGKILL)
    store = prepare_static([source], made, tmp_path / "static", workers=2)
    assert store.meta["documents"] == len(TEXTS)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("static")) == ["static"]


def is_running(process: int) -> bool:
    """Whether a process is there and not a zombie that nobody has asked for yet."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_place_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path}/file: cannot be written"), locked(tmp_path / "file" / "target"):
        pass
